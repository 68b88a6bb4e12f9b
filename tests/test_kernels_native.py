"""The linear kernels without torch: every vector width, and under ASan and UBSan."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanin_compile.kernels import build

from .native_support import SANITIZE, needs_sanitizers, run_driver

SOURCES = sorted(build.SOURCES.glob("linear_*.cpp"))


@pytest.mark.parametrize("vec_bytes", [4, 16, 64])
def test_every_vector_width_is_right_on_this_host(tmp_path: Path, vec_bytes: int) -> None:
    flags = ("-O0", f"-DFANIN_VEC_BYTES={vec_bytes}")
    printed = run_driver(tmp_path, "linear_driver.cpp", SOURCES, flags, 150)
    assert printed == f"150 cases at {vec_bytes // 4} lanes\n"


def test_no_read_or_write_outside_the_arrays_and_no_undefined_behaviour(tmp_path: Path) -> None:
    needs_sanitizers()
    printed = run_driver(tmp_path, "linear_driver.cpp", SOURCES, ("-O1", *SANITIZE), 150)
    assert printed.startswith("150 cases")
