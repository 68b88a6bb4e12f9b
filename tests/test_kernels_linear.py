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
from fanin_compile.kernels.variants import VARIANTS, Variant
from fanin_compile.packed import Header, Packed
from fanin_compile.packing import pack

from .helpers import assert_close_fp64
from .strategies import masked_weights

BATCHES = (0, 1, 2, 7, 8, 9, 33, 64, 100)
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


def apply(packed: Packed, x: Tensor, out: int, *args: Any) -> Tensor:
    return ops.gather_matmul(x, packed.values, packed.structure, args[0] if args else None, out, *args[1:])


def check(
    weight: CondensedWeight,
    x: Tensor,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """The kernel's output, after comparing every element with the dense product in fp64."""
    y = apply(packed or pack(weight), x, weight.shape[0], bias, activation, residual)
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
    assert_close_fp64(y, expected, magnitude, k=weight.max_fan_in)
    return y


def poison() -> None:
    """Leaves NaN in memory that the allocator hands out next: an element the kernel does not write shows."""
    for size in (64, 1000, 30000):
        torch.full((size,), math.nan)


@settings(deadline=None, max_examples=120)
@given(data=st.data(), weight=masked_weights(kernels=((),)))
def test_any_masked_weight(data: st.DataObject, weight: Any) -> None:
    w = CondensedWeight.from_dense(weight.weight, weight.mask)
    batch = data.draw(st.sampled_from(BATCHES))
    dtype = data.draw(st.sampled_from(DTYPES))
    w = w.with_dtype(data.draw(st.sampled_from(DTYPES)))
    bias = (
        torch.randn(w.shape[0]).to(data.draw(st.sampled_from(DTYPES))) if data.draw(st.booleans()) else None
    )
    residual = torch.randn(batch, w.shape[0]).to(dtype) if data.draw(st.booleans()) else None
    activation = data.draw(st.sampled_from(list(ops.ACTIVATIONS)))
    packed = pack(
        w,
        width=data.draw(st.sampled_from((None, 1, 7, 40, 255, 256, 65535))),
        block_rows=data.draw(st.sampled_from((1, 5, 96, 384))),
        tile=data.draw(st.integers(1, 3)),
    )
    poison()
    x = torch.randn(batch, w.shape[1]).to(dtype)
    check(w, x, bias=bias, activation=activation, residual=residual, packed=packed)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("out", "width", "k"),
    [(300, 700, 70), (700, 300, 30), (1, 3000, 300), (2000, 40, 4), (513, 129, 129), (769, 511, 40)],
)
def test_sizes_that_cross_blocks_and_chunks(out: int, width: int, k: int, ragged: bool) -> None:
    weight = random_condensed(out, width, k, ragged=ragged)
    packed, bias = pack(weight), torch.randn(out)
    for batch in (*BATCHES, 257):
        poison()
        check(weight, torch.randn(batch, width), bias=bias, packed=packed)


# 352 KiB of x are packed at a time: 24 lanes of 3755 columns, 8 of 11264. Above 3072 rows a thread keeps no more sums.
@pytest.mark.parametrize(
    ("out", "width", "k"),
    [(50, 9100, 900), (401, 12000, 300), (3200, 4000, 30), (9, 70000, 7000), (3, 140000, 50)],
)
@pytest.mark.parametrize("tile", [1, 3])
@pytest.mark.usefixtures("threads")
def test_inputs_wider_than_what_is_packed_at_once(out: int, width: int, k: int, tile: int) -> None:
    weight = random_condensed(out, width, k, ragged=True)
    packed, bias = pack(weight, tile=tile), torch.randn(out)
    for count in (1, 2):
        torch.set_num_threads(count)
        for batch in (1, 2, 25, 60):
            poison()
            check(weight, torch.randn(batch, width), bias=bias, packed=packed)


@pytest.mark.parametrize("batch", [1, 5])
def test_no_active_column_and_no_active_row(batch: int) -> None:
    bias = torch.randn(5)
    for shape in ((5, 6), (5, 0)):
        packed = pack(CondensedWeight.from_dense(torch.zeros(shape)))
        x = torch.full((batch, shape[1]), math.nan)
        torch.testing.assert_close(apply(packed, x, 5, bias, "relu"), bias.relu().expand(batch, 5))
        assert torch.equal(apply(packed, x, 5), torch.zeros(batch, 5))
    empty = pack(CondensedWeight.from_dense(torch.zeros(0, 6)))
    assert apply(empty, torch.randn(batch, 6), 0).shape == (batch, 0)


def test_strides_and_leading_dimensions() -> None:
    weight = random_condensed(30, 50, 5)
    base = torch.randn(4, 6, 50)
    for x in (base, base.transpose(0, 1), base[:, ::2], base[0], base[0, 0], base.expand(2, 4, 6, 50)):
        check(weight, x)
        check(weight, x, residual=torch.randn(30, *x.shape[:-1]).movedim(0, -1))
    for x in (
        torch.randn(50, 9).t(),
        torch.randn(9, 100)[:, ::2],
        torch.randn(9, 77)[:, 3:53],
        torch.randn(1, 50).expand(9, 50),
    ):
        check(weight, x, bias=torch.randn(60)[::2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [7, 255, 1023])
def test_inactive_inputs_are_not_read_into_the_result(dtype: torch.dtype, width: int) -> None:
    """Neither through the entries that fill up groups nor from one chunk into the next."""
    weight = random_condensed(40, 600, 6, ragged=True)
    packed, used = pack(weight, width=width), weight.mask().any(0)
    assert not used.all()
    for batch in (1, 2, 40):
        x = torch.randn(batch, 600).to(dtype)
        poisoned = torch.where(used, x, math.nan)
        assert torch.equal(apply(packed, x, 40), apply(packed, poisoned, 40))


def test_a_nan_or_infinity_reaches_the_rows_that_read_it_alone() -> None:
    weight = random_condensed(40, 600, 6, ragged=True)
    packed = pack(weight)
    for batch in (1, 2, 40):
        for value in (math.nan, math.inf):
            x = torch.randn(batch, 600)
            x[-1, 77] = value
            y = apply(packed, x, 40)
            assert torch.equal(y[-1].isfinite(), ~weight.mask()[:, 77])
            assert bool(y[:-1].isfinite().all())


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("threads")
def test_the_same_bits_for_any_thread_count(ragged: bool, dtype: torch.dtype) -> None:
    weight = random_condensed(900, 700, 70, ragged=ragged)
    packed = pack(weight)
    for batch in (1, 5, 33, 100):
        x = torch.randn(batch, 700).to(dtype)
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(apply(packed, x, 900, None, "gelu"))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", [(900, 700, 70), (60, 9100, 900)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.usefixtures("threads")
def test_the_same_bits_whatever_else_is_in_the_batch(shape: tuple[int, int, int], activation: str) -> None:
    """From two rows on: a row's result depends on the row alone. One row by itself sums in another order."""
    out, width, k = shape
    packed = pack(random_condensed(out, width, k, ragged=True))
    x, bias, residual = torch.randn(100, width), torch.randn(out), torch.randn(100, out)
    whole = apply(packed, x, out, bias, activation, residual)
    for count in (1, 2):
        torch.set_num_threads(count)
        for first, last in ((0, 2), (1, 9), (37, 54), (5, 30), (60, 100), (0, 65)):
            part = slice(first, last)
            assert torch.equal(apply(packed, x[part], out, bias, activation, residual[part]), whole[part])


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([None, 1, 40, 127, 255, 256, 1023]),
    st.sampled_from([1, 5, 96, 384, 1000]),
    st.integers(1, 3),
    st.sampled_from([2, 8, 25, 100]),
)
def test_the_same_bits_however_it_is_packed(
    width: int | None, block_rows: int, tile: int, batch: int
) -> None:
    weight = random_condensed(300, 600, 60, ragged=True)
    x = torch.randn(batch, 600)
    other = pack(weight, width=width, block_rows=block_rows, tile=tile)
    assert torch.equal(apply(other, x, 300), apply(pack(weight), x, 300))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_variant_is_right_and_has_the_same_bits(variant: Variant, ragged: bool) -> None:
    weight = random_condensed(1000, 1300, 130, ragged=ragged)
    packed, default = variant.pack(weight), VARIANTS[0].pack(weight)
    for batch in (2, 9, 33, 64):
        x = torch.randn(batch, 1300)
        poison()
        assert torch.equal(check(weight, x, packed=packed), apply(default, x, 1000))
    check(weight, torch.randn(1, 1300), packed=packed)


def test_variants_differ_in_name_and_in_form() -> None:
    weight = random_condensed(2000, 3000, 300)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    headers = [Header.read(variant.pack(weight).structure) for variant in VARIANTS]
    assert len({(h.width, h.blocks, h.tile) for h in headers}) == len(VARIANTS)


def test_a_layer_is_an_in_place_copy_away_from_another_mask() -> None:
    first, second = random_condensed(300, 600, 60, seed=1), random_condensed(300, 600, 60, seed=2)
    held, given_ = pack(first), pack(second)
    held.values.copy_(given_.values)
    held.structure.copy_(given_.structure)
    for batch in (1, 20):
        check(second, torch.randn(batch, 600), packed=held)


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
    x = torch.tensor([0.0, -0.0, 6.0, 6.5, 1e38, -1e38, 1e-40, math.inf, -math.inf, math.nan] * 2)
    y = activated(x, activation)
    expected = exact(x, activation).float()  # torch's own fp32 kernels differ: with AVX-512 gelu(inf) is NaN
    # x * sigmoid(x) at -inf is NaN by the formula, 0 by the limit: torch's own kernels give either
    finite = ~(x.isneginf() & (activation in ("gelu", "gelu_tanh", "silu", "hardswish")))
    torch.testing.assert_close(y[finite], expected[finite], equal_nan=True, rtol=1e-6, atol=1e-37)


def activated(x: Tensor, activation: str) -> Tensor:
    """activation(x) as the kernel's epilogue computes it: a layer of one input and weight 1."""
    one = pack(CondensedWeight.from_dense(torch.ones(1, 1)))
    return apply(one, x[:, None], 1, None, activation)[:, 0]


def exact(x: Tensor, activation: str) -> Tensor:
    return ops.ACTIVATIONS[activation].forward(x.double())
