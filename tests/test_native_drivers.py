"""Kernels without torch, at every vector width and under ASan and UBSan, each by a driver that includes what it needs.

The linear layers are built apart from their driver, by test_kernels_native.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from fanin_compile.kernels import build

from .native_support import SANITIZE, needs_sanitizers, run_driver

# random cases at each vector width, and under sanitizers
CASES = {
    "attention": (400, 200),
    "conv": (150, 150),
    "depthwise": (150, 60),
    "pool": (400, 200),
    "skinny": (400, 200),
}
# compiled apart: half vectors, which the driver takes in every second case where there are some
SOURCES = {"conv": [build.SOURCES / "conv_half.cpp"]}


@pytest.mark.parametrize("vec_bytes", [4, 16, 64])
@pytest.mark.parametrize("kernel", CASES)
def test_every_vector_width_is_right_on_this_host(tmp_path: Path, kernel: str, vec_bytes: int) -> None:
    cases, _ = CASES[kernel]
    flags = ("-O1", f"-DFANIN_VEC_BYTES={vec_bytes}")
    printed = run_driver(tmp_path, f"{kernel}_driver.cpp", SOURCES.get(kernel, []), flags, cases)
    assert printed == f"{cases} cases at {vec_bytes // 4} lanes\n"


@pytest.mark.parametrize("kernel", CASES)
def test_no_read_or_write_outside_the_arrays_and_no_undefined_behaviour(tmp_path: Path, kernel: str) -> None:
    needs_sanitizers()
    _, cases = CASES[kernel]
    printed = run_driver(tmp_path, f"{kernel}_driver.cpp", SOURCES.get(kernel, []), ("-O1", *SANITIZE), cases)
    assert printed.startswith(f"{cases} cases")
