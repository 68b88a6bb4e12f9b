"""The native linear kernels against the plain reference in fp64, over shapes, dtypes, structures and threads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.kernels.variants import VARIANTS, Variant, run_variant

from .helpers import assert_close_fp64
from .strategies import masked_weights

BATCHES = (0, 1, 2, 7, 8, 9, 33, 64, 257)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


def random_condensed(out: int, width: int, k: int, *, ragged: bool = False, seed: int = 0) -> CondensedWeight:
    """k non-zeros a row, or on average, with about one row in eight ablated when ragged."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(out, width, generator=generator)
    if ragged:
        mask = scores < k / max(width, 1)
        mask[torch.rand(out, generator=generator) < 0.125] = False
    else:
        mask = torch.zeros(out, width, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    return CondensedWeight.from_dense(torch.randn(out, width, generator=generator), mask)


def check(
    weight: CondensedWeight,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    planned: bool = True,
) -> Tensor:
    """The kernel's output, after comparing every element with the dense product in fp64."""
    out, width = weight.shape
    plan = ops.gather_matmul_plan(weight.indices, weight.row_ptr, width) if planned else None
    y = ops.gather_matmul(
        x, weight.values, weight.indices, weight.row_ptr, weight.rows, bias, plan, out, activation, residual
    )
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    dense, x64 = weight.to_dense().double(), x.double()
    z, magnitude = x64 @ dense.t(), x64.abs() @ dense.abs().t()
    for addend in (bias, residual):
        if addend is not None:
            z, magnitude = z + addend.double(), magnitude + addend.double().abs()
    expected = ops.ACTIVATIONS[activation].forward(z)
    if activation != "none":
        magnitude = magnitude + expected.abs()  # its own 4 ulp: sigmoid is 0.5 where the sum is 0
    assert_close_fp64(
        y, expected, magnitude, k=int(weight.row_fan_in().max()) if len(weight.row_fan_in()) else 0
    )
    return y


def poison() -> None:
    """Leaves NaN in memory that the allocator hands out next: an element the kernel does not write shows."""
    for size in (64, 1000, 30000):
        torch.full((size,), math.nan)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), weight=masked_weights(kernels=((),)))
def test_any_masked_weight(data: st.DataObject, weight: Any) -> None:
    w = CondensedWeight.from_dense(weight.weight, weight.mask)
    batch = data.draw(st.sampled_from(BATCHES))
    dtype, values_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    w = CondensedWeight(w.values.to(values_dtype), w.indices, w.row_ptr, w.rows, w.shape)
    bias = (
        torch.randn(w.shape[0]).to(data.draw(st.sampled_from(DTYPES))) if data.draw(st.booleans()) else None
    )
    residual = torch.randn(batch, w.shape[0]).to(dtype) if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(list(ops.ACTIVATIONS)))
    poison()
    x = torch.randn(batch, w.shape[1]).to(dtype)
    check(w, x, bias=bias, activation=activation, residual=residual, planned=data.draw(st.booleans()))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("out", "width", "k"),
    [(300, 700, 70), (700, 300, 30), (1, 3000, 300), (2000, 40, 4), (513, 129, 129)],
)
def test_sizes_that_cross_blocks_and_chunks(out: int, width: int, k: int, ragged: bool) -> None:
    weight = random_condensed(out, width, k, ragged=ragged)
    for batch in BATCHES:
        poison()
        check(weight, torch.randn(batch, width), bias=torch.randn(out))


def test_wide_columns_are_int32() -> None:
    weight = random_condensed(9, 70000, 100)
    assert weight.indices.dtype == torch.int32
    for batch in (1, 5, 40):
        check(weight, torch.randn(batch, 70000))


def test_no_active_column_and_no_active_row() -> None:
    for k_zero in (torch.zeros(5, 0), torch.zeros(0, 0)):
        rows = torch.arange(len(k_zero), dtype=torch.int32)
        bias = torch.randn(5)
        for batch in (1, 3):
            plan = ops.gather_matmul_plan(k_zero.to(torch.uint8), None, 6)
            y = ops.gather_matmul(
                torch.randn(batch, 6), k_zero, k_zero.to(torch.uint8), None, rows, bias, plan, 5, "relu"
            )
            torch.testing.assert_close(y, bias.relu().expand(batch, 5))


def test_strides_and_leading_dimensions() -> None:
    weight = random_condensed(30, 50, 5)
    base = torch.randn(4, 6, 50)
    for x in (base, base.transpose(0, 1), base[:, ::2], base[0], base[0, 0], base.expand(2, 4, 6, 50)):
        check(weight, x)
    for x in (
        torch.randn(50, 9).t(),
        torch.randn(9, 100)[:, ::2],
        torch.randn(9, 77)[:, 3:53],
        torch.randn(1, 50).expand(9, 50),
    ):
        check(weight, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_inputs_are_not_read_into_the_result(dtype: torch.dtype) -> None:
    weight = random_condensed(40, 90, 6)
    used = weight.mask().any(0)
    for batch in (1, 2, 40):
        x = torch.randn(batch, 90).to(dtype)
        poisoned = torch.where(used, x, math.nan)
        plan = ops.gather_matmul_plan(weight.indices, None, 90)
        for planned in (plan, None):
            y, y2 = (ops.gather_matmul(v, weight.values, weight.indices, plan=planned) for v in (x, poisoned))
            assert torch.equal(y, y2)


@pytest.mark.parametrize("ragged", [False, True])
def test_the_same_bits_for_any_thread_count(ragged: bool) -> None:
    weight = random_condensed(900, 700, 70, ragged=ragged)
    before = torch.get_num_threads()
    try:
        for batch in (1, 5, 33, 100):
            x = torch.randn(batch, 700)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(check(weight, x, activation="gelu"))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(before)


def test_a_plan_is_an_in_place_copy_away_from_another_of_its_shape() -> None:
    first, second = random_condensed(300, 600, 60, seed=1), random_condensed(300, 600, 60, seed=2)
    plan = ops.gather_matmul_plan(first.indices, None, 600)
    assert plan.shape == (ops.plan_size(300, 600),)
    plan.copy_(ops.gather_matmul_plan(second.indices, None, 600))
    x = torch.randn(20, 600)
    y = ops.gather_matmul(x, second.values, second.indices, plan=plan)
    assert torch.equal(y, check(second, x))


def test_x_of_another_width_is_refused_with_and_without_a_plan() -> None:
    weight = random_condensed(30, 300, 30)
    plan = ops.gather_matmul_plan(weight.indices, None, 300)
    for batch in (1, 3):
        for planned in (plan, None):
            with pytest.raises(ValueError, match="20"):
                ops.gather_matmul(torch.randn(batch, 20), weight.values, weight.indices, plan=planned)


def test_columns_out_of_range_or_order_have_no_plan() -> None:
    for columns, width in (([[0, 600]], 600), ([[500, 3]], 600)):
        with pytest.raises(ValueError, match="in_features = 600"):
            ops.gather_matmul_plan(torch.tensor(columns, dtype=torch.int32), None, width)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_right_at_every_batch(variant: Variant, ragged: bool) -> None:
    weight = random_condensed(100, 300, 30, ragged=ragged)
    plan = ops.gather_matmul_plan(weight.indices, weight.row_ptr, 300)
    dense = weight.to_dense().double()
    for batch in BATCHES:
        x = torch.randn(batch, 300)
        poison()
        y = run_variant(
            variant.name, x, weight.values, weight.indices, weight.row_ptr, weight.rows, None, plan, 100
        )
        x64 = x.double()
        assert_close_fp64(y, x64 @ dense.t(), x64.abs() @ dense.abs().t(), k=int(weight.row_fan_in().max()))


def test_an_unknown_variant_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'lanes9'"):
        run_variant("lanes9", torch.randn(2, 3), torch.randn(1, 1), torch.zeros(1, 1, dtype=torch.uint8))


@pytest.mark.parametrize(("activation", "ulps"), [("sigmoid", 4), ("tanh", 4), ("silu", 4)])
def test_activations_are_accurate_to_a_few_ulp(activation: str, ulps: int) -> None:
    x = torch.cat(
        [torch.linspace(-20, 20, 100001), torch.logspace(-30, 1, 10000), -torch.logspace(-30, 1, 10000)]
    )
    y = activated(x, activation)
    expected = exact(x, activation)
    spacing = (
        torch.nextafter(expected.float().abs(), torch.tensor(math.inf)).double()
        - expected.float().abs().double()
    )
    error = (y.double() - expected).abs() / spacing.clamp_min(torch.finfo(torch.float32).tiny)
    assert error.max() <= ulps, f"{float(error.max()):.1f} ulp at x = {float(x[error.argmax()])}"


# Far below 0 the result is what is left of 1 + erf, or depends on a rounded exponent: relative to 1, as in torch.
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gelu_is_accurate_relative_to_its_argument(activation: str) -> None:
    x = torch.cat([torch.linspace(-20, 20, 100001), torch.logspace(-30, 1, 10000)])
    error = (activated(x, activation).double() - exact(x, activation)).abs() / x.double().abs().clamp_min(
        1e-37
    )
    assert error.max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_of_extreme_arguments(activation: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e38, -1e38, 1e-40, math.inf, -math.inf, math.nan] * 2)
    y, expected = activated(x, activation), ops.ACTIVATIONS[activation].forward(x)
    # x * sigmoid(x) at -inf is NaN by the formula, 0 by the limit: torch's own kernels give either
    finite = ~(x.isneginf() & (activation in ("gelu", "gelu_tanh", "silu", "hardswish")))
    torch.testing.assert_close(y[finite], expected[finite], equal_nan=True, rtol=1e-6, atol=1e-37)


def activated(x: Tensor, activation: str) -> Tensor:
    """activation(x) as the kernel's epilogue computes it: a layer of one input and weight 1."""
    one = torch.ones(1, 1)
    return ops.gather_matmul(x[:, None], one, torch.zeros(1, 1, dtype=torch.uint8), activation=activation)[
        :, 0
    ]


def exact(x: Tensor, activation: str) -> Tensor:
    return ops.ACTIVATIONS[activation].forward(x.double())
