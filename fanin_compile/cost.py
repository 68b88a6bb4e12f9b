"""Condensed, dense on the active neurons alone, or dense: which is fastest for a layer on this host?

Rates are measured once, kept in the user's cache and read from there.

A layer of `nnz` active weights out of out x in, on `batch` positions, is estimated as

    dense      batch * out * in / dense_rate(batch)
    active     batch * active * in / dense_rate(batch) + batch * out / place_rate(batch)
    condensed  batch * nnz / condensed_rate(batch)

with rates in multiply-adds per nanosecond, and in outputs per nanosecond for placing those of active neurons among
those of ablated ones (passes/compute_active.py). Those of linears are measured on one layer at a few batch sizes and
interpolated in log(batch); those of convolutions on a pointwise and a 3x3 layer of ResNet-50, and on a grouped one as
ResNeXt has them. All are rates of useful work, so padding, packing and dispatch are in them. There are two sets
of them: of one linear called over and over, and, for graphs whose dense weights exceed the last-level cache, of
several in turn, as there each call finds its weights in memory, which a few rows do not make up for: dense reads ten
times the bytes at 90 %.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops, ops_conv, timing  # noqa: F401  (they define the operators called below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.kernels import build
from fanin_compile.packed import Packed
from fanin_compile.packing import pack
from fanin_compile.packing_conv import pack_conv
from fanin_compile.records import Layer, Skip, left_dense

Gate = Callable[[Layer], Skip | None]

log = logging.getLogger("fanin_compile")

BATCHES = (1, 4, 16, 64, 256)
REFERENCE = (1024, 1024)  # out, in: leaves L2 as a dense weight, so that its traffic is in the rate
# out, in, kernel, output height and width, groups
CONVOLUTIONS = ((128, 512, 1, 28, 1), (128, 128, 3, 28, 1), (256, 256, 3, 14, 32))
SPARSITY = 0.9
FEW = 16  # batch rows up to which reading the weights is what a dense layer waits for
MARGIN = 0.95  # a layer is rewritten if it is estimated to take less than this share of the time otherwise


@dataclass(frozen=True)
class Rates:
    """Multiply-adds, and outputs placed, per nanosecond for one number of threads: of linears at BATCHES, of
    CONVOLUTIONS in order."""

    threads: int
    dense: tuple[float, ...]
    condensed: tuple[float, ...]
    place: tuple[float, ...]
    conv_dense: tuple[float, ...]
    conv_condensed: tuple[float, ...]
    conv_place: tuple[float, ...]

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Rates:
        """The inverse of asdict(); ValueError, KeyError or TypeError for anything else."""
        lengths = {
            "dense": len(BATCHES),
            "condensed": len(BATCHES),
            "place": len(BATCHES),
            "conv_dense": len(CONVOLUTIONS),
            "conv_condensed": len(CONVOLUTIONS),
            "conv_place": len(CONVOLUTIONS),
        }
        sides = {side: tuple(map(float, stored[side])) for side in lengths}
        if any(len(sides[side]) != length or min(sides[side]) <= 0 for side, length in lengths.items()):
            raise ValueError(f"rates are {sides}, expected {lengths} positive numbers")
        return cls(int(stored["threads"]), **sides)

    def dense_us(self, layer: Layer) -> float:
        return layer.dense_macs / _rate(layer, self.dense, self.conv_dense) / 1e3

    def condensed_us(self, layer: Layer) -> float:
        return layer.sparse_macs / _rate(layer, self.condensed, self.conv_condensed) / 1e3

    def active_us(self, layer: Layer) -> float:
        """Active neurons alone as a dense layer, then their outputs put among those of ablated ones."""
        outputs = layer.batch * layer.shape[0]
        placing = outputs / _rate(layer, self.place, self.conv_place) / 1e3
        return layer.active_share * self.dense_us(layer) + placing


def gate_for(nbytes: int) -> Gate:
    """The gate for layers of a graph with so many bytes of dense weights."""
    return functools.partial(gate, streamed=nbytes > last_level_cache())


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux tells; 32 MiB where nothing does."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) << 10)
    return max(sizes) or 32 << 20


def gate(layer: Layer, *, streamed: bool = False) -> Skip | None:
    """Refuse a layer that the host's rates say would not gain, with the estimates in microseconds.

    One with ablated neurons has a third: its Skip is `active` where dense on the active ones alone is the fastest.

    Args:
        streamed: dense weights come from memory, not from cache.
    """
    if layer.groups > 1 and layer.shape[1] == 1:
        # measured: dense depthwise kernels are memory bound, there is nothing to gain
        return Skip(layer.name, "depthwise convolutions are as fast dense", {"groups": layer.groups})
    threads = torch.get_num_threads()
    rates = host_rates(threads, streamed=True) if streamed else host_rates(threads)
    us = {"dense": rates.dense_us(layer)}
    if layer.active_share < 1:
        us["active"] = rates.active_us(layer)
    us["condensed"] = rates.condensed_us(layer)
    active = us.get("active", math.inf) < MARGIN * us["dense"]
    if us["condensed"] < MARGIN * us["active" if active else "dense"]:
        return None
    values = {"sparsity": f"{layer.sparsity:.1%}", "batch": layer.batch}
    return left_dense(layer.name, "is estimated", us, active=active, **values)


@functools.cache
def host_rates(threads: int, *, streamed: bool = False) -> Rates:
    """The rates of this host, from the cache or measured now (half a second to a second)."""
    path = _cache_file(threads, streamed)
    try:
        return Rates.parse(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("measuring the rates of this host: %s", error)
    rates = measure(threads, streamed=streamed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(rates)))
        partial.replace(path)  # several processes may measure at once: last one wins, each file whole
    except OSError as error:
        log.info("rates of this host are not kept: %s", error)
    return rates


def measure(threads: int, seconds: float = 0.04, *, streamed: bool = False) -> Rates:
    """Time the reference layers dense, condensed and placing, interleaved, `seconds` for each measurement."""
    # each layer holds 4 MiB: together twice the cache
    copies = max(1, 2 * last_level_cache() // (4 * math.prod(REFERENCE))) if streamed else 1
    with timing.threads(threads):
        linears = [_linear_rates(batch, seconds, copies if batch <= FEW else 1) for batch in BATCHES]
        convolutions = [_conv_rates(*shape, seconds) for shape in CONVOLUTIONS]
    return Rates(threads, *_transposed(linears), *_transposed(convolutions))


def _transposed(rates: Sequence[tuple[float, ...]]) -> tuple[tuple[float, ...], ...]:
    """Each layer's rates of all sides -> each side's of all layers."""
    return tuple(zip(*rates, strict=True))


def _linear_rates(batch: int, seconds: float, copies: int) -> tuple[float, ...]:
    dense, weight = _masked(REFERENCE)
    out, fan_in = REFERENCE
    x = torch.randn(batch, fan_in)
    denses = [dense.clone() for _ in range(copies)]
    packeds = [pack(weight)]
    packeds += [Packed(packeds[0].values.clone(), packeds[0].structure.clone()) for _ in range(copies - 1)]

    def run_dense() -> None:
        for d in denses:
            F.linear(x, d)

    def run_condensed() -> None:
        for p in packeds:
            torch.ops.fanin.gather_matmul(x, p.values, p.structure, None, out)

    constants, active = torch.randn(out).expand(batch, out), torch.arange(0, out, 2)
    a = torch.randn(batch, len(active))
    macs = copies * batch
    sides = (
        (run_dense, macs * dense.numel()),
        (run_condensed, macs * weight.nnz),
        (lambda: torch.index_copy(constants, 1, active, a), batch * out),
    )
    return _rates(sides, seconds)


def _conv_rates(
    out: int, channels: int, kernel: int, size: int, groups: int, seconds: float
) -> tuple[float, ...]:
    dense, weight = _masked((out, channels // groups, kernel, kernel))
    x, padding = torch.randn(1, channels, size, size), kernel // 2
    pads, ones = [padding, padding], [1, 1]
    packed = pack_conv(weight, stride=ones, padding=pads, dilation=ones, groups=groups)
    args = (x, packed.values, packed.structure, None, weight.shape, ones, pads, ones, groups)
    position, constants = torch.arange(out) // 2, torch.randn(out, 1, 1)
    a, active = torch.randn(1, -(-out // 2), size, size), torch.arange(out).view(-1, 1, 1) % 2 == 0
    pixels = size * size
    sides = (
        (lambda: F.conv2d(x, dense, padding=padding, groups=groups), pixels * dense.numel()),
        (lambda: torch.ops.fanin.gather_conv(*args), pixels * weight.nnz),
        (lambda: torch.where(active, a.index_select(1, position), constants), pixels * out),
    )
    return _rates(sides, seconds)


def _masked(shape: tuple[int, ...]) -> tuple[Tensor, CondensedWeight]:
    """A random weight of constant fan-in at SPARSITY."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).flatten(1)
    k = round((1 - SPARSITY) * weight.shape[1])
    columns = torch.rand(weight.shape, generator=generator).topk(k).indices
    mask = torch.zeros(weight.shape, dtype=torch.bool).scatter_(1, columns, True)
    dense = (weight * mask).view(shape)
    return dense, CondensedWeight.from_dense(dense, mask.view(shape))


def _rates(sides: Sequence[tuple[Callable[[], object], int]], seconds: float) -> tuple[float, ...]:
    """Work per nanosecond of each pair of a function and the work it does."""
    # the least: what else the host does meanwhile is not the layer's
    times = timing.interleaved([run for run, _ in sides], seconds)
    return tuple(work / t.least for (_, work), t in zip(sides, times, strict=True))


def _rate(layer: Layer, linear: Sequence[float], convolutions: Sequence[float]) -> float:
    if layer.op == "linear":
        return _interpolate(linear, layer.batch)
    if layer.groups > 1:
        return convolutions[2]
    return convolutions[0 if math.prod(layer.shape[2:]) == 1 else 1]


def _interpolate(rates: Sequence[float], batch: int) -> float:
    if batch <= BATCHES[0]:
        return rates[0]
    if batch >= BATCHES[-1]:
        return rates[-1]
    right = bisect.bisect_right(BATCHES, batch)
    low, high = BATCHES[right - 1], BATCHES[right]
    share = math.log(batch / low) / math.log(high / low)
    return rates[right - 1] * (1 - share) + rates[right] * share


def _cache_file(threads: int, streamed: bool) -> Path:
    # named after the library, whose own name covers sources, compiler, ISA and torch's version
    library = build.library_path()
    return library.with_name(f"{library.stem}-{platform.node()}-{threads}{'-streamed' * streamed}-rates.json")
