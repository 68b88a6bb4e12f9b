"""The build: cache key, several processes at once, messages when something is missing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fanin_compile.errors import BuildError
from fanin_compile.kernels import build


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A source folder with one small kernel, and an empty cache."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int tiny() { return 42; }\n'
    )
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("FANIN_CACHE_DIR", str(tmp_path / "cache"))
    build.toolchain.cache_clear()
    build._load_once.cache_clear()
    yield sources
    build.toolchain.cache_clear()
    build._load_once.cache_clear()


def test_a_library_is_built_once_and_found_again(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fanin_compile"):
        first = build.library_path()
        assert "building the kernels" in caplog.text
        caplog.clear()
        assert build.library_path() == first
        assert not caplog.records
    assert [file.suffix for file in sorted(first.parent.iterdir())] == [".lock", ".so"], (
        "left-overs of the build"
    )


def test_one_process_loads_one_library_whatever_happens_to_the_sources(tiny: Path) -> None:
    loaded = build.load()
    (tiny / "tiny.cpp").write_text("int tiny() { return 44; }\n")
    assert build.load() == loaded


def test_the_key_covers_sources_flags_and_torch(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return build._key(sorted(tiny.iterdir()))

    keys = {key()}
    (tiny / "tiny.cpp").write_text("int tiny() { return 43; }\n")
    keys.add(key())
    (tiny / "tiny.h").write_text("")
    keys.add(key())
    monkeypatch.setenv("FANIN_CXXFLAGS", "-DX=1")
    keys.add(key())
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.add(key())
    assert len(keys) == 5


@pytest.mark.parametrize("capability", build.CAPABILITY_FLAGS)
def test_narrower_instructions_are_another_library(
    tiny: Path, capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    source, files = tiny / "tiny.cpp", sorted(tiny.iterdir())
    command, key = build.compile_command(source, source), build._key(files)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    assert set(build.compile_command(source, source)) - set(command) == set(
        build.CAPABILITY_FLAGS[capability]
    )
    assert build._key(files) != key
    macros = [*build.compile_command(source, source)[:-4], "-dM", "-E", "-x", "c++", os.devnull]
    defined = subprocess.run(macros, capture_output=True, check=True, text=True).stdout
    assert "__AVX512F__" not in defined
    assert ("__AVX__" in defined) <= (capability == "avx2")


def test_processes_that_build_at_once_share_one_library(tiny: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fanin_compile.kernels import build;"
        f"build.SOURCES = Path({str(tiny)!r}); print(build.library_path())"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), results
    assert results[0][0] == results[1][0]
    assert sum("building the kernels" in stderr for _, stderr in results) == 1


def test_a_missing_compiler_is_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="'no-such-compiler' not found: install g"):
        build.library_path()


def test_a_source_that_does_not_compile_shows_the_compilers_words(tiny: Path) -> None:
    (tiny / "tiny.cpp").write_text("int broken( {")
    with pytest.raises(BuildError, match=r"tiny\.cpp.*\n(.*\n)*.*error"):
        build.library_path()


def test_a_cache_that_cannot_be_written_is_named(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FANIN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="set FANIN_CACHE_DIR"):
        build.library_path()


def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path: Path) -> None:
    script = """
import logging, torch
from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.packing import pack
logging.basicConfig()
packed = pack(CondensedWeight.from_dense(torch.tensor([[2.0, 0.0, 3.0]])))
for _ in range(2):
    y = ops.gather_matmul(torch.tensor([[1.0, 10.0, 100.0]]), packed.values, packed.structure, None, 1)
    assert y.tolist() == [[302.0]], y
"""
    environment = os.environ | {"CXX": "no-such-compiler", "FANIN_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no-such-compiler") == 1, done.stderr
