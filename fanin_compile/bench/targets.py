"""`fanin bench targets`: everything the linear kernels aim at, next to what this host reaches, in one run.

Ratios are of medians taken side by side. Where a peer cannot run here its published time stands in, scaled by the dense
layer of the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.progress import track

from fanin_compile.bench import kernel_targets as parts
from fanin_compile.bench.linear import LAYERS
from fanin_compile.bench.output import Target, TargetTable
from fanin_compile.bench.roofline import host


def bench_targets(*, threads: Sequence[int], seconds: float, quick: bool = False) -> TargetTable:
    """All of it, `seconds` of measuring each line or so; quick: small layers, to see that it runs."""
    layers = ((64, 96),) if quick else LAYERS
    seconds = min(seconds, 0.02) if quick else seconds
    lines: list[Iterator[Target]] = [
        parts.stacks(layers[-1], threads, seconds, quick),
        parts.shares(layers, seconds),
        parts.peers(layers[0], seconds, quick),
        parts.scaling(layers, threads, seconds),
        parts.memory(layers),
        parts.structures(layers, seconds),
        parts.half_values(layers[0], seconds, quick),
        parts.overhead(seconds),
        parts.scratch(),
    ]
    if not quick:
        lines.append(parts.build_times())
    return TargetTable(host(), tuple(t for part in track(lines, "measuring", transient=True) for t in part))
