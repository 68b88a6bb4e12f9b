"""`fanin bench depthwise`: MobileNetV2's depthwise convolutions by our kernel against oneDNN's, through inductor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fanin_compile.bench.contenders import frozen
from fanin_compile.bench.measure import expect_agreement, geometric_mean
from fanin_compile.ops_depthwise import depthwise_conv
from fanin_compile.timing import interleaved, threads


@dataclass(frozen=True)
class DepthwiseCase:
    """A square 3x3 layer with bias and relu6, padded as TensorFlow does; `uses` in one MobileNetV2."""

    channels: int
    size: int
    stride: int
    uses: int

    @property
    def name(self) -> str:
        return f"{self.channels} at {self.size}" + (f" stride {self.stride}" if self.stride > 1 else "")

    @property
    def padding(self) -> tuple[int, int, int, int]:
        return (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1)


MOBILENET_V2 = (
    DepthwiseCase(32, 112, 1, 1),
    DepthwiseCase(96, 112, 2, 1),
    DepthwiseCase(144, 56, 1, 1),
    DepthwiseCase(144, 56, 2, 1),
    DepthwiseCase(192, 28, 1, 2),
    DepthwiseCase(192, 28, 2, 1),
    DepthwiseCase(384, 14, 1, 4),
    DepthwiseCase(576, 14, 1, 2),
    DepthwiseCase(576, 14, 2, 1),
    DepthwiseCase(960, 7, 1, 3),
)


@dataclass(frozen=True)
class DepthwiseRow:
    """One case: median microseconds of a compiled call, the dense ones' of pad, convolution and relu6."""

    name: str
    batch: int
    threads: int
    ours_us: float
    contiguous_us: float
    channels_last_us: float
    gigabytes_per_second: float  # ours, of x and y alone
    uses: int

    @property
    def ratio(self) -> float:
        """Of the faster dense one, which is channels_last mostly and then wants its x so."""
        return min(self.contiguous_us, self.channels_last_us) / self.ours_us

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}


class _Dense(nn.Module):
    def __init__(self, case: DepthwiseCase) -> None:
        super().__init__()
        left, right, top, bottom = case.padding
        channels = case.channels
        self.pad = nn.ZeroPad2d((left, right, top, bottom))
        self.conv = nn.Conv2d(channels, channels, 3, case.stride, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(self.conv(self.pad(x)))


def bench_depthwise(
    *,
    cases: Sequence[DepthwiseCase] = MOBILENET_V2,
    batches: Sequence[int] = (1, 8),
    threads_used: Sequence[int] = (1,),
    seconds: float = 1.0,
) -> Iterator[DepthwiseRow]:
    """Every combination, `seconds` of interleaved measuring each. Raises: DisagreementError."""
    for count in threads_used:
        with threads(count), torch.no_grad():
            for batch in batches:
                for case in cases:
                    yield _row(case, batch, count, seconds)


def _row(case: DepthwiseCase, batch: int, count: int, seconds: float) -> DepthwiseRow:
    torch.manual_seed(0)
    torch._dynamo.reset()
    dense = _Dense(case).eval().requires_grad_(False)
    x = torch.randn(batch, case.channels, case.size, case.size)
    weight, bias = dense.conv.weight, dense.conv.bias
    assert bias is not None

    def layer(x: Tensor) -> Tensor:
        return depthwise_conv(x, weight, bias, case.stride, case.padding, activation="relu6")

    compiled = torch.compile(
        layer, dynamic=False
    )  # as the dense ones are: a compiled call has a cost of its own

    def ours() -> Tensor:
        return compiled(x)

    formats = (torch.contiguous_format, torch.channels_last)
    runs = [ours, *(frozen(dense, x.contiguous(memory_format=format)) for format in formats)]
    exact = nn.functional.relu6(
        nn.functional.conv2d(
            dense.pad(x[:1].double()), weight.double(), bias.double(), case.stride, groups=case.channels
        )
    )
    for name, run in zip(("ours", "contiguous", "channels_last"), runs, strict=True):
        expect_agreement(f"{case.name}: {name}", run()[:1], exact)
    mine, contiguous, last = interleaved(runs, seconds)
    return DepthwiseRow(
        name=case.name,
        batch=batch,
        threads=count,
        ours_us=mine.us,
        contiguous_us=contiguous.us,
        channels_last_us=last.us,
        gigabytes_per_second=(x.nbytes + ours().nbytes) / mine.median,
        uses=case.uses,
    )


def table(rows: Sequence[DepthwiseRow]) -> str:
    """All rows, then the sums over the layers of one MobileNetV2 and the mean of the ratios."""
    headers = ["layer", "uses", "threads", "batch", "ours us", "contiguous us", "channels_last us"]
    headers += ["x best dense", "GB/s"]
    cells: list[list[object]] = [
        [
            *(row.name, row.uses, row.threads, row.batch, f"{row.ours_us:.0f}", f"{row.contiguous_us:.0f}"),
            *(f"{row.channels_last_us:.0f}", f"{row.ratio:.2f}", f"{row.gigabytes_per_second:.1f}"),
        ]
        for row in rows
    ]
    for count, batch in dict.fromkeys((row.threads, row.batch) for row in rows):
        chosen = [row for row in rows if (row.threads, row.batch) == (count, batch)]
        sums = [
            sum(getattr(row, what) * row.uses for row in chosen)
            for what in ("ours_us", "contiguous_us", "channels_last_us")
        ]
        mean = geometric_mean([row.ratio for row in chosen])
        numbers = [f"{total:.0f}" for total in sums]
        cells.append(["all (mean of ratios)", "", count, batch, *numbers, f"{mean:.2f}", ""])
    text: str = tabulate(cells, headers, disable_numparse=True, stralign="right")
    return text
