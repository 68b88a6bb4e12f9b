"""The host's limits, measured by the native library: peak multiply-adds and read bandwidth of one core."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fanin_compile.kernels import build


@dataclass(frozen=True)
class Roofline:
    """Per core: fp32 multiply-adds per ns; bytes per ns read from a working set of `bytes`.

    Attributes:
        gathered: multiply-adds per ns that load an operand from scattered places in L1, each address loaded just
            before it is used, and four places ahead.
    """

    macs_per_ns: float
    read: dict[int, float]
    gathered: tuple[float, float]

    def stream(self, nbytes: int) -> float:
        """Bytes per ns when reading a working set of that size: that of the next larger one measured."""
        larger = [size for size in self.read if size >= nbytes]
        return self.read[min(larger)] if larger else self.read[max(self.read)]


WORKING_SETS = tuple(1 << shift for shift in range(14, 27))  # 16 KiB to 64 MiB


def _native(name: str, *arguments: type[ctypes._SimpleCData[Any]]) -> Callable[..., float]:
    """A function of the native library that returns a double."""
    function = getattr(ctypes.CDLL(str(build.load())), name)
    function.restype, function.argtypes = ctypes.c_double, arguments
    return function  # type: ignore[no-any-return]


@functools.cache
def roofline() -> Roofline:
    """Measure this host, in about a second; the best of three of each."""
    read = _native("fanin_read_bytes_per_ns", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    gathered = _native("fanin_gathered_macs_per_ns", ctypes.c_int64, ctypes.c_bool)
    data = torch.ones(max(WORKING_SETS) // 4)
    bandwidth = {}
    for size in WORKING_SETS:
        rounds = max(1, (1 << 27) // size)
        bandwidth[size] = max(read(data.data_ptr(), size // 4, rounds) for _ in range(3))
    late, early = (max(gathered(10_000, ahead) for _ in range(3)) for ahead in (False, True))
    return Roofline(peak_macs_per_ns(), bandwidth, (late, early))


def peak_macs_per_ns() -> float:
    """Peak fp32 multiply-adds of a core per ns, now, in some 20 ms: clocks of a shared host vary by a tenth."""
    measure = _native("fanin_peak_macs_per_ns", ctypes.c_int64)
    return max(measure(4_000_000) for _ in range(3))


def handover_ns() -> float | None:
    """Nanoseconds a cache line takes from one thread's core to another's, now; None where there is one thread.

    A virtual machine's cores may share a cache or be moved apart while it runs: what threads share is slower then.
    """
    measure = _native("fanin_handover_ns", ctypes.c_int64)
    ns = [measure(20_000) for _ in range(3)]
    return None if any(math.isnan(took) for took in ns) else min(ns)


def host() -> str:
    """One line naming the machine, for tables."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor without that line
    isa = torch.backends.cpu.get_cpu_capability()
    bound = any(
        os.environ.get(name, "false").lower() != "false" for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY")
    )
    threads = "threads bound to cores" if bound else "threads free to move (OMP_PROC_BIND=true binds them)"
    return f"{model}, {isa}, torch {torch.__version__}, Python {platform.python_version()}, {threads}"
