"""The native convolution kernels against dense convolution in fp64, over geometries, layouts, dtypes and threads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.ops_conv import gather_conv, plan_nbytes, scratch_nbytes

from .helpers import assert_close_fp64
from .strategies import masks, seeds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


class Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


def aten_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    y: Tensor = torch.ops.aten.convolution(
        x, weight, bias, g.stride, g.padding, g.dilation, False, [0] * len(g.stride), g.groups
    )
    return y


def check(
    weight: CondensedWeight,
    x: Tensor,
    g: Geometry,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The kernel's output, after comparing every element with the dense convolution in fp64."""
    y = gather_conv(x, weight, bias, *g, activation, residual)
    assert y.dtype == x.dtype
    dims = len(g.stride)
    if x.is_contiguous() or dims == 1:
        assert y.is_contiguous()
    elif x.ndim == dims + 2 and x.is_contiguous(memory_format=CHANNELS_LAST[dims]):
        assert y.is_contiguous(memory_format=CHANNELS_LAST[dims])
    batch = x.double() if x.ndim == dims + 2 else x.double().unsqueeze(0)
    dense, bias64 = weight.to_dense().double(), None if bias is None else bias.double()
    z = aten_convolution(batch, dense, bias64, g)
    magnitude = aten_convolution(batch.abs(), dense.abs(), None if bias64 is None else bias64.abs(), g)
    if x.ndim == dims + 1:
        z, magnitude = z[0], magnitude[0]
    if residual is not None:
        z, magnitude = z + residual.double(), magnitude + residual.double().abs()
    k = int(weight.row_fan_in().max()) if weight.n_active else 0
    terms = k + (bias is not None) + (residual is not None)
    expected = ops.ACTIVATIONS[activation].forward(z)  # of which an activation is a few ulp off
    assert_close_fp64(y, expected, magnitude + expected.abs(), k=terms)
    return y


def poison() -> None:
    """Leaves NaN in memory that the allocator hands out next: an element the kernel does not write shows."""
    for size in (64, 1000, 30000):
        torch.full((size,), math.nan)


def random_weight(shape: tuple[int, ...], density: float, *, ragged: bool = False) -> CondensedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    scores = torch.rand(shape[0], math.prod(shape[1:]), generator=generator)
    k = round(density * scores.shape[1])
    mask = scores < density if ragged else torch.zeros_like(scores, dtype=torch.bool)
    if not ragged:
        mask.scatter_(1, scores.topk(k).indices, True)
    return CondensedWeight.from_dense(weight, mask.view(shape))


class Case(NamedTuple):
    weight: CondensedWeight
    x: Tensor
    geometry: Geometry


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any kernel, stride, padding, dilation and groups whose output is not empty; sizes around vector widths."""
    dims = draw(st.sampled_from((1, 2, 2, 3)))
    small = st.integers(1, 3)
    kernel = [draw(st.sampled_from((1, 1, 2, 3, 5))) for _ in range(dims)]
    stride = [draw(small) for _ in range(dims)]
    dilation = [draw(small) for _ in range(dims)]
    padding = [draw(st.integers(0, 4)) for _ in range(dims)]
    if draw(st.booleans()):  # the common case: everything alike
        kernel, stride, padding, dilation = (
            [values[0]] * dims for values in (kernel, stride, padding, dilation)
        )
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [draw(st.sampled_from((0, 1, 6, 7, 13, 29 if dims < 3 else 5))) + low for low in least]
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    shape = (groups * draw(st.sampled_from((1, 3, 9, 20))), draw(st.sampled_from((1, 3, 8, 17))), *kernel)
    batch = draw(st.sampled_from((0, 1, 2, 3, 9)))
    mask = draw(masks(shape, draw(st.sampled_from(("constant", "ragged")))))
    generator = torch.Generator().manual_seed(draw(seeds()))
    weight = CondensedWeight.from_dense(torch.randn(shape, generator=generator), mask)
    x = torch.randn(batch, groups * shape[1], *size, generator=generator)
    if dims > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=CHANNELS_LAST[dims])
    elif draw(st.booleans()):
        x = torch.randn(batch, *size, groups * shape[1]).movedim(-1, 1)[..., : size[-1]]
    if batch == 1 and draw(st.booleans()):
        x = x[0]
    return Case(weight, x, Geometry(tuple(stride), tuple(padding), tuple(dilation), groups))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), case=cases())
def test_any_geometry(data: st.DataObject, case: Case) -> None:
    w, x, g = case
    dtype, values_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    w = CondensedWeight(w.values.to(values_dtype), w.indices, w.row_ptr, w.rows, w.shape)
    x = x.to(dtype)
    bias = torch.randn(w.shape[0]).to(values_dtype) if data.draw(st.booleans()) else None
    residual = None
    if data.draw(st.booleans()):
        residual = torch.randn_like(gather_conv(x, w, bias, *g))
    poison()
    check(w, x, g, bias=bias, residual=residual, activation=data.draw(st.sampled_from(list(ops.ACTIVATIONS))))


# images that share a vector and an odd last one, more than one unit of tiles, chunk of channels, block of rows
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    ("shape", "size", "density"),
    [
        ((64, 64, 3, 3), 56, 0.1),
        ((70, 65, 3, 3), 14, 0.1),
        ((600, 130, 3, 3), 7, 0.1),
        ((1030, 40, 1, 1), 9, 0.2),
        ((30, 300, 1, 1), 7, 0.1),
        ((33, 70, 1, 1), 31, 0.3),
        ((20, 70, 1, 1), 2, 0.3),
        ((16, 700, 3, 3), 20, 0.02),
    ],
)
def test_layers_that_cross_tiles_chunks_and_blocks(
    shape: tuple[int, ...], size: int, density: float, batch: int
) -> None:
    weight = random_weight(shape, density)
    x = torch.randn(batch, shape[1], size, size)
    g = Geometry((1, 1), (shape[2] // 2,) * 2, (1, 1))
    bias = torch.randn(shape[0])
    poison()
    y = check(weight, x, g, bias=bias, activation="relu")
    last = gather_conv(x.contiguous(memory_format=torch.channels_last), weight, bias, *g, "relu")
    assert torch.equal(y, last), "the memory format changes no bit"
    if batch > 1:
        assert torch.equal(y[-1:], gather_conv(x[-1:], weight, bias, *g, "relu")), "nor does the batch"


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [1, 8])
def test_ragged_rows_side_by_side(batch: int, channels_last: bool) -> None:
    """Pointwise rows of any length share visits: the shorter ones are filled up with zeros."""
    generator = torch.Generator().manual_seed(5)
    density = torch.rand(41, 1, generator=generator).square()
    mask = torch.rand(41, 530, generator=generator) < density
    mask[7:9] = False
    weight = CondensedWeight.from_dense(
        torch.randn(41, 530, generator=generator)[..., None, None], mask[..., None, None]
    )
    g = Geometry((1, 1), (0, 0), (1, 1))
    for size in (3, 7, 12):
        x = torch.randn(batch, 530, size, size)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        poison()
        check(
            weight, x, g, bias=torch.randn(41), residual=torch.randn(batch, 41, size, size), activation="relu"
        )
        check(weight, x.bfloat16(), g, activation="silu")


@pytest.mark.parametrize("density", [0.05, 0.6])
@pytest.mark.parametrize("size", [7, 16])
def test_clamps_at_both_ends_and_keeps_nan(density: float, size: int) -> None:
    weight, g = random_weight((40, 64, 1, 1), density), Geometry((1, 1), (0, 0), (1, 1))
    x, residual = 10 * torch.randn(1, 64, size, size), torch.randn(1, 40, size, size)
    y = check(weight, x, g, bias=torch.randn(40), residual=residual, activation="relu6")
    assert (y == 0).any()
    assert (y == 6).any()
    residual[:, 3] = math.nan
    for activation in ("none", "relu", "relu6"):
        z = gather_conv(x, weight, None, *g, activation=activation, residual=residual)
        assert torch.equal(z.isnan(), residual.isnan())


def test_values_that_change_are_seen() -> None:
    weight, x = random_weight((12, 40, 1, 1), 0.5), torch.randn(2, 40, 9, 9)
    g = Geometry((1, 1), (0, 0), (1, 1))
    check(weight, x, g)
    weight.values.neg_()
    check(weight, x, g)
    other = CondensedWeight(weight.values.clone(), weight.indices, weight.row_ptr, weight.rows, weight.shape)
    other.values.mul_(3.0)
    check(other, x, g)
    check(weight, x, g)


def test_columns_beyond_16_bits() -> None:
    weight = random_weight((3, 1, 70001), 0.001)
    assert weight.indices.dtype == torch.int32
    check(weight, torch.randn(2, 1, 70005), Geometry((1,), (0,), (1,)))
    check(random_weight((4, 70001, 1), 0.001), torch.randn(2, 70001, 9), Geometry((1,), (0,), (1,)))


@pytest.mark.parametrize("groups", [1, 8, 96])
def test_grouped_and_depthwise(groups: int) -> None:
    weight = random_weight((96, 96 // groups, 3, 3), 0.5, ragged=True)
    for size in (7, 30):
        x = torch.randn(2, 96, size, size)
        for stride in (1, 2):
            check(weight, x, Geometry((stride,) * 2, (1, 1), (1, 1), groups))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inactive_inputs_are_not_read_into_the_result(dtype: torch.dtype) -> None:
    weight = random_weight((20, 30, 3, 3), 0.02)
    used = weight.mask().any(0).any(-1).any(-1)
    g = Geometry((1, 1), (1, 1), (1, 1))
    for batch in (1, 3):
        x = torch.randn(batch, 30, 9, 9).to(dtype)
        poisoned = torch.where(used.view(-1, 1, 1), x, math.nan)
        assert torch.equal(gather_conv(x, weight, None, *g), gather_conv(poisoned, weight, None, *g))


@pytest.mark.parametrize(
    ("shape", "size", "batch"),
    [((64, 64, 3, 3), 30, 1), ((300, 90, 3, 3), 7, 1), ((300, 90, 1, 1), 14, 3), ((90, 64, 3, 3), 14, 5)],
)
def test_the_same_bits_for_any_thread_count(shape: tuple[int, ...], size: int, batch: int) -> None:
    weight = random_weight(shape, 0.1, ragged=True)
    g = Geometry((1, 1), (shape[2] // 2,) * 2, (1, 1))
    x, before = torch.randn(batch, shape[1], size, size), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(weight, x, g, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_new_structure_in_the_same_tensors() -> None:
    g, x = Geometry((1, 1), (1, 1), (1, 1)), torch.randn(1, 12, 9, 9)
    generator = torch.Generator().manual_seed(3)
    for inference in (False, True):
        with torch.inference_mode(inference):
            weight = random_weight((10, 12, 3, 3), 0.1)
            before = check(weight, x, g)
            weight.indices.copy_(torch.rand(10, 108, generator=generator).topk(11).indices.sort().values)
            assert not torch.equal(check(weight, x, g), before)
            weight.values.mul_(2)
            check(weight, x, g)


def test_plans_are_bounded_and_go_with_their_weight() -> None:
    before = plan_nbytes()
    weight = random_weight((64, 32, 3, 3), 0.1)
    for size in range(5, 17):
        gather_conv(torch.randn(1, 32, size, size), weight, padding=1)
    assert 0 < plan_nbytes() - before <= 4 * (6 * weight.nnz + 40 * 64 + 4000)
    # a unit of x in L2, 512 rows of 14 vectors of 16 floats, and padded rows
    assert 4 * 32 * 16 * 16 <= scratch_nbytes() <= (1 << 20)
    del weight
    assert plan_nbytes() <= before


def test_any_spatial_size_with_one_weight() -> None:
    weight = random_weight((17, 12, 3, 3), 0.2)
    for size in (*range(3, 20), 64, 65):
        check(weight, torch.randn(1, 12, size, 23 - size % 7), Geometry((1, 1), (1, 1), (1, 1)))


def test_what_does_not_fit_is_refused_by_name() -> None:
    w = random_weight((10, 12, 3, 3), 0.1)
    x = torch.randn(1, 12, 9, 9)
    ones = [1, 1]

    def call(x: Any = x, indices: Any = w.indices, bias: Any = None, padding: Any = ones) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_conv(
            x, w.values, indices, None, None, bias, [10, 12, 3, 3], ones, padding, ones, 1
        )
        return y

    with pytest.raises(ValueError, match="11 channels"):
        call(x=x[:, 1:])
    with pytest.raises(ValueError, match="bias must have 10"):
        call(bias=torch.zeros(9))
    with pytest.raises(ValueError, match="input of size 2"):
        call(x=x[..., :2], padding=[0, 0])
    with pytest.raises(ValueError, match="not strictly ascending"):
        call(indices=w.indices.flip(1).contiguous())
    with pytest.raises(ValueError, match="outside the dense fan-in"):
        call(indices=(w.indices.to(torch.int32) + 100).contiguous())
