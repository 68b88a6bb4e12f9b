"""Fair timing of alternatives: side by side, in turn, on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Nanoseconds of one alternative over all rounds."""

    median: float
    least: float
    spread: float  # third quartile less first, as a share of the median

    @property
    def us(self) -> float:
        return self.median / 1e3


def interleaved(
    functions: Sequence[Callable[[], object]], seconds: float, *, least_rounds: int = 3, burst: int = 4
) -> list[Timing]:
    """Time the functions in turn for about `seconds`, so that the machine's drift meets all alike.

    In each round a function runs `burst` times in a row, of which the first is not counted: it finds the caches as the
    function before it left them, the others as a model run over and over finds them. Runs without grad.
    """
    with torch.no_grad():
        times: list[list[int]] = [[] for _ in functions]
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[0]) < least_rounds * (burst - 1):
            for function, measured in zip(functions, times, strict=True):
                function()
                for _ in range(burst - 1):
                    start = time.perf_counter_ns()
                    function()
                    measured.append(time.perf_counter_ns() - start)
    return [_summary(measured) for measured in times]


def _summary(times: Sequence[int]) -> Timing:
    median = statistics.median(times)
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else (median, median, median)
    return Timing(median, min(times), (third - first) / median if median else 0.0)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run a block with torch.set_num_threads(number)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
