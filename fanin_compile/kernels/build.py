"""Builds the C++ sources beside this file with the host's toolchain, once, into a user cache, and loads them.

The cache key covers sources, flags, the compiler's version, the ISA it targets and torch's version, so that a
library found under its key is always the right one. Environment:

    FANIN_CACHE_DIR   where libraries are kept (default: $XDG_CACHE_HOME/fanin_compile, ~/.cache/fanin_compile)
    FANIN_CXXFLAGS    flags appended to every compile and link, e.g. -fsanitize=address or -DFANIN_VEC_BYTES=16
    CXX               the compiler (default: the one torch.compile uses)
    ATEN_CPU_CAPABILITY   avx2 or default: the narrower instruction sets of the host, as torch and inductor then use
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import BuildError

log = logging.getLogger("fanin_compile")

SOURCES = Path(__file__).parent
# -ffp-contract=fast: a * b + c becomes one FMA, which -std=c++20 alone forbids.
KERNEL_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-Wno-psabi")
BINDING_FLAGS = ("-O1", "-fopenmp")  # calls and checks; what is hot is in the kernels
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden")
# What torch leaves unused of the host's instructions, by ATEN_CPU_CAPABILITY.
CAPABILITY_FLAGS = {"avx2": ("-mno-avx512f",), "default": ("-mno-avx",)}
_load_lock = threading.Lock()


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler and what its predefined macros (version, ISA under -march=native) hash to."""

    compiler: str
    fingerprint: str


@functools.cache
def toolchain() -> Toolchain:
    """The host's compiler. BuildError if there is none that works."""
    compiler = os.environ.get("CXX") or _torch_compiler()
    command = [*shlex.split(compiler), "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise BuildError(
            f"C++ compiler {compiler!r} not found: install g++ (12 or newer) or set CXX to a compiler"
        ) from None
    except subprocess.CalledProcessError as error:
        raise BuildError(
            f"C++ compiler {compiler!r} does not work: {error.stderr.decode().strip()[-500:]}"
        ) from None
    return Toolchain(compiler, hashlib.sha256(macros).hexdigest())


def _torch_compiler() -> str:
    from torch._inductor import cpp_builder, exc

    try:
        return str(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return "g++"


def cache_dir() -> Path:
    """Where libraries are kept."""
    if path := os.environ.get("FANIN_CACHE_DIR"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fanin_compile"


def _is_binding(source: Path) -> bool:
    """Files named *bindings.cpp include torch headers; the others must not, they would take minutes."""
    return source.stem.endswith("bindings")


def compile_command(source: Path, output: Path) -> list[str]:
    """The command that compiles one source."""
    flags = list(KERNEL_FLAGS)
    if _is_binding(source):
        from torch.utils.cpp_extension import include_paths

        abi = int(torch.compiled_with_cxx11_abi())
        flags = [*BINDING_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
        folders = (*include_paths("cpu"), sysconfig.get_path("include"))
        flags += [f"-isystem{path}" for path in folders]
    compiler = shlex.split(toolchain().compiler)
    return [*compiler, *COMMON_FLAGS, *flags, *_extra_flags(), "-c", str(source), "-o", str(output)]


def _link_command(objects: list[Path], output: Path) -> list[str]:
    torch_lib = Path(str(torch.__file__)).parent / "lib"
    command = [*shlex.split(toolchain().compiler), "-shared", "-fopenmp", *_extra_flags()]
    command += [*map(str, objects), "-o", str(output), f"-L{torch_lib}", "-lc10", "-ltorch_cpu"]
    return command


def _extra_flags() -> list[str]:
    capability = CAPABILITY_FLAGS.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ())
    return [*capability, *shlex.split(os.environ.get("FANIN_CXXFLAGS", ""))]


def _key(files: list[Path]) -> str:
    digest = hashlib.sha256()
    parts = [
        KERNEL_FLAGS,
        BINDING_FLAGS,
        COMMON_FLAGS,
        _extra_flags(),
        toolchain(),
        torch.__version__,
        sys.platform,
    ]
    digest.update(repr(parts).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:32]


def library_path() -> Path:
    """Path of the built library, building it if the cache has none. BuildError says what is missing."""
    files = sorted(file for file in SOURCES.iterdir() if file.suffix in (".cpp", ".h", ".inc"))
    folder = cache_dir()
    target = folder / f"fanin_{_key(files)}.so"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{target.stem}.lock").open("w")
    except OSError as error:
        raise BuildError(
            f"cache directory {folder} is not writable: set FANIN_CACHE_DIR ({error})"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, even by a crash
        if not target.exists():
            _build([file for file in files if file.suffix == ".cpp"], target)
    return target


def _build(sources: list[Path], target: Path) -> None:
    log.warning(
        "building the kernels with %s into %s (about 20 s, once)", toolchain().compiler, target.parent
    )
    start = time.perf_counter()
    # the slowest first: what includes others, bindings, then by size
    sources = sorted(
        sources, key=lambda s: (not s.stem.endswith("_half"), not _is_binding(s), -s.stat().st_size)
    )
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
            list(pool.map(lambda pair: _run(compile_command(*pair)), zip(sources, objects, strict=True)))
        library = Path(scratch) / target.name
        _run(_link_command(objects, library))
        library.replace(target)  # atomic: other processes see all of it or nothing
    log.info("built %s in %.1f s", target, time.perf_counter() - start)


def _run(command: list[str]) -> None:
    try:
        subprocess.run(command, capture_output=True, check=True, text=True)
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)}\nfailed:\n{error.stderr.strip()[-2000:]}") from None


@functools.cache
def _load_once() -> Path:
    path = library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"cannot load {path}: {error}") from error
    return path


def load() -> Path:
    """Build if needed and load the native kernels, once in a process; the path of the library."""
    with _load_lock:
        return _load_once()


def python_library() -> ctypes.PyDLL | None:
    """The functions of the loaded library that read Python objects; None if it is not loaded, or was built on a machine
    without Python's headers."""
    return _python_library(_load_once()) if _load_once.cache_info().currsize else None


@functools.cache
def _python_library(path: Path) -> ctypes.PyDLL | None:
    library = ctypes.PyDLL(str(path))
    try:
        state, unchanged, attributes = library.fanin_state, library.fanin_unchanged, library.fanin_attributes
    except AttributeError:
        return None
    state.argtypes = (ctypes.py_object, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    state.restype = ctypes.c_int64
    unchanged.argtypes = attributes.argtypes = (ctypes.py_object, ctypes.c_void_p, ctypes.c_int64)
    return library
