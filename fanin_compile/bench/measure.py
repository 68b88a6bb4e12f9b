"""Run the contenders of one case side by side, after checking that they agree."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile.bench.contenders import CONTENDERS, DENSE
from fanin_compile.bench.models import compared
from fanin_compile.bench.roofline import Roofline
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FaninError
from fanin_compile.packing import pack
from fanin_compile.timing import Timing, interleaved, threads

TOLERANCE = 1e-4  # of the largest output


class DisagreementError(FaninError):
    """A contender's output differs from the masked dense model's by more than rounding, or none would be seen to."""


@dataclass(frozen=True)
class Row:
    """One case: median microseconds a call of each contender, and what follows from them.

    Attributes:
        dense: the dense contender that was fastest.
        macs_per_ns: useful (non-zero) multiply-adds of ours per nanosecond, over all threads.
        target: the least ratio aimed at, if one is set for the case.
        nbytes: of the packed weights, where they are what bounds a call: at one batch row.
        alone: the same contenders on the masked layers alone, where that was measured.
    """

    name: str
    sparsity: float
    batch: int
    threads: int
    times: Mapping[str, Timing]
    nnz_macs: int
    target: float | None = None
    nbytes: int | None = None
    alone: Mapping[str, Timing] | None = None

    @property
    def dense(self) -> str:
        return _fastest_dense(self.times)

    @property
    def ratio(self) -> float:
        return _ratio(self.times)

    def ratio_of(self, name: str) -> float:
        """Of the fastest dense contender's time to that of `name`."""
        return _ratio(self.times, name)

    @property
    def ratio_alone(self) -> float | None:
        return None if self.alone is None else _ratio(self.alone)

    @property
    def macs_per_ns(self) -> float:
        return self.nnz_macs / self.times["fanin"].median

    def share(self, roofline: Roofline) -> tuple[float, str]:
        """Of what the host can do: of its peak in multiply-adds, or of streaming the weights at one batch row."""
        if self.nbytes is None:
            return self.macs_per_ns / roofline.macs_per_ns / self.threads, "FMA"
        bandwidth = roofline.stream(self.nbytes) * self.threads
        return self.nbytes / self.times["fanin"].median / bandwidth, "stream"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sparsity": self.sparsity,
            "batch": self.batch,
            "threads": self.threads,
            "times_us": {name: timing.us for name, timing in self.times.items()},
            "spread": {name: timing.spread for name, timing in self.times.items()},
            "dense": self.dense,
            "ratio": self.ratio,
            "macs_per_ns": self.macs_per_ns,
            "target": self.target,
            "layers_alone": None if self.alone is None else _alone(self.alone),
        }


def _fastest_dense(times: Mapping[str, Timing]) -> str:
    return min((name for name in times if name in DENSE), key=lambda name: times[name].median)


def _ratio(times: Mapping[str, Timing], name: str = "fanin") -> float:
    return times[_fastest_dense(times)].median / times[name].median


def _alone(times: Mapping[str, Timing]) -> dict[str, Any]:
    return {
        "times_us": {name: timing.us for name, timing in times.items()},
        "spread": {name: timing.spread for name, timing in times.items()},
        "dense": _fastest_dense(times),
        "ratio": _ratio(times),
    }


def run_case(
    model: nn.Module,
    x: Tensor,
    *,
    name: str,
    sparsity: float,
    threads_used: int,
    contenders: Iterable[str],
    seconds: float,
    nnz_macs: int,
    target: float | None = None,
    nbytes: int | None = None,
) -> Row:
    """Build the contenders at `threads_used` threads, compare each with fp64, then time them in turn.

    Raises: DisagreementError, also where the output hardly depends on the input, as comparing proves nothing then.
    """
    torch._dynamo.reset()  # each case is a model of its own: nothing may be shared or run into recompile limits
    with threads(threads_used), torch.no_grad():
        runs = {}
        for contender in contenders:
            run = CONTENDERS[contender](model, x)
            if run is not None:
                runs[contender] = run
        _check(model, x, {contender: run() for contender, run in runs.items()})
        timings = interleaved(list(runs.values()), seconds)
    times = dict(zip(runs, timings, strict=True))
    return Row(name, sparsity, len(x), threads_used, times, nnz_macs, target, nbytes)


def _check(model: nn.Module, x: Tensor, outputs: Mapping[str, object], rows: int = 64) -> None:
    """Against the model in fp64, on the first rows: the relative error of fp32 sums this long stays below 1e-4."""
    few = x[:rows].double() if x.is_floating_point() else x[:rows]
    exact = compared(copy.deepcopy(model).double()(few))
    expect_dependence(model, x[:rows])
    for name, output in outputs.items():
        expect_agreement(name, compared(output)[:rows], exact)


def expect_agreement(name: str, output: Tensor, exact: Tensor) -> None:
    """Raises: DisagreementError where `output` is off by 1e-4 or more of the largest of `exact`, or NaN."""
    error = _relative(output, exact)
    if not error < TOLERANCE:
        raise DisagreementError(
            f"{name} is off by {error:.1e} of the largest output, expected less than {TOLERANCE:.0e}"
        )


def expect_dependence(model: nn.Module, x: Tensor) -> None:
    """Raises: DisagreementError where other values of `x` change the largest output by a share of 1e-2 or less."""
    if x.is_floating_point():
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    else:
        other = torch.where(x > 0, x - 1, x + 1)  # another token each
    change = _relative(compared(model(other)), compared(model(x)))
    if not change > 100 * TOLERANCE:
        raise DisagreementError(
            f"another input changes the output by {change:.1e} of the largest, "
            f"expected more than {100 * TOLERANCE:.0e}: comparing outputs would prove nothing"
        )


def _relative(output: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest of `exact`."""
    return float((output - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def nnz_of(model: nn.Module) -> int:
    """Non-zero weights of all linear layers: the multiply-adds of one batch row."""
    return sum(int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, nn.Linear))


def packed_nbytes(model: nn.Module) -> int:
    """Bytes of all linear layers' weights when packed."""
    weights = (m.weight for m in model.modules() if isinstance(m, nn.Linear))
    return sum(pack(CondensedWeight.from_dense(weight)).nbytes for weight in weights)


def geometric_mean(numbers: Sequence[float]) -> float:
    return float(torch.tensor(numbers, dtype=torch.float64).log().mean().exp())
