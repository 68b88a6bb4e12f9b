"""`fanin bench conv`: condensed convolutions of ResNet-50's shapes against oneDNN's dense ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.bench.cases import constant_fan_in_mask
from fanin_compile.bench.contenders import frozen
from fanin_compile.bench.measure import expect_agreement, geometric_mean
from fanin_compile.bench.output import Target
from fanin_compile.bench.roofline import handover_ns, peak_macs_per_ns
from fanin_compile.condensed import CondensedWeight
from fanin_compile.ops_conv import gather_conv
from fanin_compile.packing_conv import pack_conv
from fanin_compile.timing import interleaved, threads


@dataclass(frozen=True)
class ConvCase:
    """A square layer with padding kernel // 2, of constant fan-in."""

    fan_in_channels: int
    out_channels: int
    size: int
    kernel: int
    stride: int = 1

    @property
    def name(self) -> str:
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{self.fan_in_channels}->{self.out_channels} {self.kernel}x{self.kernel}{stride} at {self.size}"
        )

    @property
    def pixels(self) -> int:
        """Of one output channel."""
        return ((self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1) ** 2

    def target(self, batch: int) -> float:
        """The least ratio aimed at."""
        return 2.0 if batch == 1 and self.size // self.stride <= 7 else 3.0


LAYERS = 8  # of one shape, with weights of their own, in a call: of 4, what the call itself costs took a tenth of ours
CONTIGUOUS, CHANNELS_LAST = FORMATS = ("contiguous", "channels_last")
WAYS = ("eager", "compiled")
GEOMETRIC_MEAN = 5.0  # least ratio aimed at over all layers of a batch size and thread count
FMA_SHARE = 50.0  # per cent of the peak in useful multiply-adds that every 3x3 layer aims at

RESNET50 = (
    ConvCase(64, 64, 56, 3),
    ConvCase(128, 128, 28, 3),
    ConvCase(256, 256, 14, 3),
    ConvCase(512, 512, 7, 3),
    ConvCase(128, 128, 56, 3, 2),
    ConvCase(256, 256, 28, 3, 2),
    ConvCase(512, 512, 14, 3, 2),
    ConvCase(64, 256, 56, 1),
    ConvCase(256, 64, 56, 1),
    ConvCase(512, 128, 28, 1),
    ConvCase(1024, 256, 14, 1),
    ConvCase(2048, 512, 7, 1),
)


@dataclass(frozen=True)
class ConvRow:
    """One case: median microseconds a layer, of LAYERS in a call, so that what a compiled call costs hardly counts.

    Attributes:
        way: eager, or compiled (dense with frozen weights), whichever left ours the smaller ratio.
        dense_us, dense: in that way, of the faster memory format, and which it was.
        ours_us, ours: likewise.
        ours_other_us: in the other memory format.
        macs_per_ns: useful multiply-adds, over all threads, called in the way that is faster for them.
        peak: multiply-adds per ns that this many cores do at most, the larger of before and after.
        handover_ns: of a cache line, from core to core, before; None for one thread.
        kernel: its size in one dimension.
    """

    name: str
    batch: int
    threads: int
    way: str
    dense_us: float
    dense: str
    ours_us: float
    ours: str
    ours_other_us: float
    macs_per_ns: float
    target: float
    kernel: int
    peak: float
    handover_ns: float | None

    @property
    def ratio(self) -> float:
        return self.dense_us / self.ours_us

    @property
    def share(self) -> float:
        """Per cent of the FMA peak, in useful multiply-adds."""
        return 100 * self.macs_per_ns / self.peak

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio, "share": self.share}


def bench_conv(
    *,
    cases: Sequence[ConvCase] = RESNET50,
    batches: Sequence[int] = (1, 8),
    sparsity: float = 0.9,
    threads_used: Sequence[int] = (1,),
    seconds: float = 1.0,
) -> Iterator[ConvRow]:
    """Every combination, `seconds` of interleaved measuring each. Raises: DisagreementError."""
    for count in threads_used:
        with threads(count), torch.no_grad():
            for batch in batches:
                for case in cases:
                    yield _row(case, batch, count, sparsity, seconds)


class _Layers(nn.Module):
    """Several masked layers of one shape side by side: one call of a compiled graph runs them all."""

    def __init__(self, case: ConvCase, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.case = case
        self.weights = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [F.conv2d(x, weight, None, self.case.stride, self.case.kernel // 2) for weight in self.weights]


def _row(case: ConvCase, batch: int, count: int, sparsity: float, seconds: float) -> ConvRow:
    generator = torch.Generator().manual_seed(0)
    shape = (case.out_channels, case.fan_in_channels, case.kernel, case.kernel)
    mask = constant_fan_in_mask(shape[0], math.prod(shape[1:]), sparsity, generator).view(shape)
    weights = [torch.randn(shape, generator=generator) * mask for _ in range(LAYERS)]
    torch._dynamo.reset()
    x = torch.randn(batch, case.fan_in_channels, case.size, case.size, generator=generator)
    x_last = x.contiguous(memory_format=torch.channels_last)

    stride, pads, ones = [case.stride] * 2, [case.kernel // 2] * 2, [1, 1]
    packed = [
        pack_conv(CondensedWeight.from_dense(w, mask), stride=stride, padding=pads, dilation=ones, groups=1)
        for w in weights
    ]

    def ours(x: Tensor) -> list[Tensor]:
        return [gather_conv(x, p.values, p.structure, None, shape, stride, pads, ones, 1) for p in packed]

    dense, dense_last = (
        _Layers(case, [w.contiguous(memory_format=format) for w in weights])
        for format in (torch.contiguous_format, torch.channels_last)
    )
    compiled = torch.compile(
        dense, backend="fanin", options={"strict": True, "cost_gate": False}, dynamic=False
    )
    runs: dict[tuple[str, str, str], Callable[[], list[Tensor]]] = {
        ("ours", "eager", CONTIGUOUS): lambda: ours(x),
        ("ours", "compiled", CONTIGUOUS): lambda: compiled(x),
        ("ours", "eager", CHANNELS_LAST): lambda: ours(x_last),
        ("ours", "compiled", CHANNELS_LAST): lambda: compiled(x_last),
        ("dense", "eager", CONTIGUOUS): lambda: dense(x),
        ("dense", "eager", CHANNELS_LAST): lambda: dense_last(x_last),
        ("dense", "compiled", CONTIGUOUS): frozen(dense, x),
        ("dense", "compiled", CHANNELS_LAST): frozen(dense, x_last),
    }
    exact = [F.conv2d(x[:1].double(), w.double(), None, case.stride, case.kernel // 2) for w in weights]
    for key, run in runs.items():
        for y, expected in zip(run(), exact, strict=True):
            expect_agreement(f"{case.name}: {', '.join(key)}", y[:1], expected)
    handover, peak = handover_ns(), peak_macs_per_ns()
    timings = interleaved(list(runs.values()), seconds)
    peak = max(peak, peak_macs_per_ns())
    us = {key: timing.us / LAYERS for key, timing in zip(runs, timings, strict=True)}

    def best(side: str, way: str) -> str:
        return min(FORMATS, key=lambda format: us[side, way, format])

    way = min(WAYS, key=lambda way: us["dense", way, best("dense", way)] / us["ours", way, best("ours", way)])
    mine, theirs = best("ours", way), best("dense", way)
    (other,) = (format for format in FORMATS if format != mine)
    least_us = min(us["ours", way, best("ours", way)] for way in WAYS)
    return ConvRow(
        name=case.name,
        batch=batch,
        threads=count,
        way=way,
        dense_us=us["dense", way, theirs],
        dense=theirs,
        ours_us=us["ours", way, mine],
        ours=mine,
        ours_other_us=us["ours", way, other],
        macs_per_ns=batch * int(mask.sum()) * case.pixels / (1e3 * least_us),
        target=case.target(batch),
        kernel=case.kernel,
        peak=peak * count,
        handover_ns=handover,
    )


def targets(rows: Sequence[ConvRow]) -> list[Target]:
    """For each batch size and thread count: mean of the ratios, least of each aim, share of the FMA peak."""
    lines = []
    for count, batch in dict.fromkeys((row.threads, row.batch) for row in rows):
        chosen = [row for row in rows if (row.threads, row.batch) == (count, batch)]
        where = f"{count} thread{'s' * (count > 1)}, batch {batch}"
        mean = geometric_mean([row.ratio for row in chosen])
        lines.append(Target(f"{where}: geometric mean over the best dense", GEOMETRIC_MEAN, mean))
        for aim in sorted({row.target for row in chosen}, reverse=True):
            least = min((row for row in chosen if row.target == aim), key=lambda row: row.ratio)
            lines.append(Target(f"{where}: least of its aim, {least.name}", aim, least.ratio))
        if spatial := [row for row in chosen if row.kernel == 3]:
            least = min(spatial, key=lambda row: row.share)
            what = f"{where}: least useful share of FMA, 3x3, {least.name}"
            lines.append(Target(what, FMA_SHARE, least.share, "%"))
    return lines


def table(rows: Sequence[ConvRow]) -> str:
    """All rows against their targets, then what they amount to against the targets of the whole."""
    headers = ["layer", "threads", "batch", "called"]
    headers += ["dense us", "x and y", "ours us", "x and y", "ours, other"]
    headers += ["x best dense", "target", "MAC/ns", "of FMA peak", "core to core, ns"]
    cells = [
        [
            *(row.name, row.threads, row.batch, row.way, f"{row.dense_us:.0f}", row.dense),
            *(f"{row.ours_us:.0f}", row.ours, f"{row.ours_other_us:.0f}", f"{row.ratio:.2f}"),
            *(
                f">= {row.target:g} {'met' if row.ratio >= row.target else 'MISSED'}",
                *(f"{row.macs_per_ns:.1f}", f"{row.share:.0f}%"),
                "" if row.handover_ns is None else f"{row.handover_ns:.0f}",
            ),
        ]
        for row in rows
    ]
    layers = tabulate(cells, headers, disable_numparse=True, stralign="right")
    whole = [target.cells() for target in targets(rows)]
    return f"{layers}\n{tabulate(whole, ['what', 'aim', 'reached', ''], disable_numparse=True)}"
