"""Does condensing a layer pay on this host? Rates are measured once, kept in the user's cache and read from there.

A layer of `nnz` active weights out of out x in, on `batch` positions, is estimated as

    dense      batch * out * in / dense_rate(batch)
    condensed  batch * nnz / condensed_rate(batch)

with rates in multiply-adds per nanosecond, measured on one reference layer at a few batch sizes and thread counts and
interpolated in log(batch). Both sides are rates of useful work, so padding, packing and dispatch are in them.
"""

from __future__ import annotations

import bisect
import functools
import json
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops, timing
from fanin_compile.condensed import CondensedWeight
from fanin_compile.kernels import build
from fanin_compile.records import Layer, Skip

log = logging.getLogger("fanin_compile")

BATCHES = (1, 4, 16, 64, 256)
REFERENCE = (
    1024,
    1024,
    0.9,
)  # out, in, sparsity: leaves L2 as a dense weight, so that its traffic is in the rate
MARGIN = 0.95  # a layer is condensed if it is estimated to take less than this share of the dense time


@dataclass(frozen=True)
class Rates:
    """Multiply-adds per nanosecond of linear layers at BATCHES, for one number of threads."""

    threads: int
    dense: tuple[float, ...]
    condensed: tuple[float, ...]

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Rates:
        """The inverse of asdict(); ValueError, KeyError or TypeError for anything else."""
        sides = [tuple(map(float, stored[side])) for side in ("dense", "condensed")]
        if any(len(side) != len(BATCHES) or min(side) <= 0 for side in sides):
            raise ValueError(f"rates are {sides}, expected {len(BATCHES)} positive numbers each")
        return cls(int(stored["threads"]), *sides)

    def dense_us(self, layer: Layer) -> float:
        return layer.dense_macs / _interpolate(self.dense, layer.batch) / 1e3

    def condensed_us(self, layer: Layer) -> float:
        return layer.sparse_macs / _interpolate(self.condensed, layer.batch) / 1e3


def gate(layer: Layer) -> Skip | None:
    """Refuse a layer that the host's rates say would not gain, with both estimates in microseconds."""
    if layer.op != "linear":
        return Skip(layer.name, "no native convolution kernel yet", {"op": layer.op})
    rates = host_rates(torch.get_num_threads())
    dense, condensed = rates.dense_us(layer), rates.condensed_us(layer)
    if condensed < MARGIN * dense:
        return None
    values = {
        "sparsity": f"{layer.sparsity:.1%}",
        "batch": layer.batch,
        "dense": f"{dense:.0f} us",
        "condensed": f"{condensed:.0f} us",
    }
    return Skip(layer.name, "dense is estimated to be faster", values)


@functools.cache
def host_rates(threads: int) -> Rates:
    """The rates of this host, from the cache or measured now (about half a second)."""
    path = _cache_file(threads)
    try:
        return Rates.parse(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("measuring the rates of this host: %s", error)
    rates = measure(threads)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(rates)))
        partial.replace(path)  # several processes may measure at once: last one wins, each file whole
    except OSError as error:
        log.info("rates of this host are not kept: %s", error)
    return rates


def measure(threads: int, seconds: float = 0.04) -> Rates:
    """Time the reference layer dense and condensed at every batch size of BATCHES, the two sides interleaved."""
    out, fan_in, sparsity = REFERENCE
    generator = torch.Generator().manual_seed(0)
    k = round((1 - sparsity) * fan_in)
    scores = torch.rand(out, fan_in, generator=generator)
    mask = torch.zeros(out, fan_in, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    dense = torch.randn(out, fan_in, generator=generator) * mask
    weight = CondensedWeight.from_dense(dense, mask)
    plan = ops.gather_matmul_plan(weight.indices, weight.row_ptr, fan_in)
    rates = []
    with timing.threads(threads):
        for batch in BATCHES:
            x = torch.randn(batch, fan_in, generator=generator)

            def run_dense(x: Tensor = x) -> Tensor:
                return F.linear(x, dense)

            def run_condensed(x: Tensor = x) -> Tensor:
                y: Tensor = torch.ops.fanin.gather_matmul(
                    x, weight.values, weight.indices, weight.row_ptr, weight.rows, None, plan, out
                )
                return y

            times = timing.interleaved([run_dense, run_condensed], seconds)
            macs = (batch * dense.numel(), batch * weight.nnz)
            # the least: what else the host does meanwhile is not the layer's
            rates.append(tuple(m / t.least for m, t in zip(macs, times, strict=True)))
    return Rates(threads, *(tuple(side) for side in zip(*rates, strict=True)))


def _interpolate(rates: Sequence[float], batch: int) -> float:
    if batch <= BATCHES[0]:
        return rates[0]
    if batch >= BATCHES[-1]:
        return rates[-1]
    right = bisect.bisect_right(BATCHES, batch)
    low, high = BATCHES[right - 1], BATCHES[right]
    share = math.log(batch / low) / math.log(high / low)
    return rates[right - 1] * (1 - share) + rates[right] * share


def _cache_file(threads: int) -> Path:
    # named after the library, whose own name covers sources, compiler, ISA and torch's version
    library = build.library_path()
    return library.with_name(f"{library.stem}-{platform.node()}-{threads}-rates.json")
