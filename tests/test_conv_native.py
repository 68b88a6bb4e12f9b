"""The convolution kernels without torch: every vector width, and under ASan and UBSan."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fanin_compile.kernels import build

DRIVER = Path(__file__).parent / "native" / "conv_driver.cpp"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run_driver(tmp_path: Path, flags: tuple[str, ...], cases: int) -> str:
    """Build the driver, run so many random cases, return what it printed; it exits with 1 at a wrong one."""
    binary = tmp_path / "driver"
    command = [build.toolchain().compiler, "-std=c++20", "-march=native", "-ffp-contract=fast", "-Wno-psabi"]
    command += [*flags, f"-I{build.SOURCES}", str(DRIVER), "-o", str(binary)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([str(binary), str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("vec_bytes", [4, 16, 64])
def test_every_vector_width_is_right_on_this_host(tmp_path: Path, vec_bytes: int) -> None:
    printed = run_driver(tmp_path, ("-O1", f"-DFANIN_VEC_BYTES={vec_bytes}"), 150)
    assert printed == f"150 cases at {vec_bytes // 4} lanes\n"


def test_no_read_or_write_outside_the_arrays_and_no_undefined_behaviour(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    command = [build.toolchain().compiler, *SANITIZE, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler has no libasan or libubsan")
    assert run_driver(tmp_path, ("-O1", *SANITIZE), 150).startswith("150 cases")
