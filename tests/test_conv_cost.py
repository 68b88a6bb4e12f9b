"""The cost of a convolution from its shape, and the benchmark that measures it."""

from __future__ import annotations

import math

import pytest

from fanin_compile.bench.conv import ConvCase, bench_conv
from fanin_compile.kernels.conv_cost import ConvShape, condensed_us, dense_us


def shape(case: ConvCase, sparsity: float, batch: int = 1) -> ConvShape:
    weight = (case.out_channels, case.fan_in_channels, case.kernel, case.kernel)
    side = math.isqrt(case.pixels)
    nnz = round((1 - sparsity) * math.prod(weight))
    return ConvShape(nnz, weight, (case.size,) * 2, (side,) * 2, (case.stride,) * 2, batch=batch)


# microseconds measured warm on the core the constants are given for (48 multiply-adds per ns)
@pytest.mark.parametrize(
    ("case", "measured"),
    [
        (ConvCase(64, 64, 56, 3), 554),
        (ConvCase(128, 128, 28, 3), 521),
        (ConvCase(256, 256, 14, 3), 491),
        (ConvCase(512, 512, 7, 3), 525),
        (ConvCase(128, 128, 56, 3, 2), 727),
        (ConvCase(256, 256, 28, 3, 2), 611),
        (ConvCase(512, 512, 14, 3, 2), 654),
        (ConvCase(64, 256, 56, 1), 327),
        (ConvCase(256, 64, 56, 1), 362),
        (ConvCase(512, 128, 28, 1), 301),
        (ConvCase(1024, 256, 14, 1), 277),
        (ConvCase(2048, 512, 7, 1), 302),
    ],
)
def test_estimate_is_near_what_was_measured(case: ConvCase, measured: float) -> None:
    assert condensed_us(shape(case, 0.9)) == pytest.approx(measured, rel=0.25)


def test_sparsity_decides() -> None:
    case = ConvCase(256, 256, 14, 3)
    assert condensed_us(shape(case, 0.9)) < dense_us(shape(case, 0.9)) / 4
    assert condensed_us(shape(case, 0.3)) > dense_us(shape(case, 0.3))
    assert condensed_us(shape(case, 0.9, batch=8)) == pytest.approx(
        8 * condensed_us(shape(case, 0.9)), rel=0.1
    )


def test_a_faster_core_takes_less() -> None:
    layer = shape(ConvCase(64, 64, 56, 3), 0.9)
    assert condensed_us(layer, peak=96) < 0.51 * condensed_us(layer) + 4


def test_benchmark_rows_are_checked_and_complete() -> None:
    (row,) = bench_conv(cases=(ConvCase(8, 12, 9, 3, 2),), batches=(2,), seconds=0.0)
    assert (row.name, row.batch, row.threads) == ("8->12 3x3 stride 2 at 9", 2, 1)
    assert row.ratio == pytest.approx(row.dense_us / row.ours_us)
    assert row.dense in ("contiguous", "channels_last")
    assert row.macs_per_ns == pytest.approx(2 * 12 * 7 * 25 / row.ours_us / 1e3)
    assert row.to_dict()["ratio"] == row.ratio
