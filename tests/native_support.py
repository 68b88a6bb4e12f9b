"""Builds and runs the drivers in tests/native: kernels without torch, at any vector width and under sanitizers."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from fanin_compile.kernels import build

DRIVERS = Path(__file__).parent / "native"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++20", "-march=native", "-ffp-contract=fast", "-Wno-psabi", "-pthread")


def run_driver(folder: Path, name: str, sources: list[Path], flags: tuple[str, ...], cases: int) -> str:
    """Build driver `name` with the kernels' `sources`, run so many random cases, return what it printed.

    It exits with 1 at a wrong case, which fails the test with its words.
    """
    binary = folder / "driver"
    command = [*shlex.split(build.toolchain().compiler), *FLAGS, *flags, f"-I{build.SOURCES}"]
    subprocess.run(
        [*command, str(DRIVERS / name), *map(str, sources), "-o", str(binary)],
        check=True,
        capture_output=True,
        text=True,
    )
    done = subprocess.run([str(binary), str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def _has_sanitizers() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cpp"
        probe.write_text("int main() {}")
        command = [*shlex.split(build.toolchain().compiler), *SANITIZE, str(probe), "-o", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0


def needs_sanitizers() -> None:
    """Skip the test where the compiler comes without libasan or libubsan."""
    if not _has_sanitizers():
        pytest.skip("the compiler has no libasan or libubsan")
