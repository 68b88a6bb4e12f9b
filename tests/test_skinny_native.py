"""The dense kernel of few rows without torch: every vector width, and under ASan and UBSan."""

from __future__ import annotations

from pathlib import Path

import pytest

from .native_support import SANITIZE, needs_sanitizers, run_driver

DRIVER = "skinny_driver.cpp"  # it includes the source which it needs


@pytest.mark.parametrize("vec_bytes", [4, 16, 64])
def test_every_vector_width_is_right_on_this_host(tmp_path: Path, vec_bytes: int) -> None:
    printed = run_driver(tmp_path, DRIVER, [], ("-O1", f"-DFANIN_VEC_BYTES={vec_bytes}"), 400)
    assert printed == f"400 cases at {vec_bytes // 4} lanes\n"


def test_no_read_or_write_outside_the_arrays_and_no_undefined_behaviour(tmp_path: Path) -> None:
    needs_sanitizers()
    assert run_driver(tmp_path, DRIVER, [], ("-O1", *SANITIZE), 200).startswith("200 cases")
