"""The native convolution kernels against dense convolution in fp64, over geometries, layouts, dtypes and threads."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.ops_conv import gather_conv
from fanin_compile.packing_conv import pack_conv

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


def convolve(
    x: Tensor,
    weight: CondensedWeight,
    bias: Tensor | None,
    g: Geometry,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The operator, of a weight packed for it."""
    stride, padding, dilation, groups = g
    p = pack_conv(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return gather_conv(x, p.values, p.structure, bias, weight.shape, *g, activation, residual)


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
    y = convolve(x, weight, bias, g, activation, residual)
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
        residual = torch.randn_like(convolve(x, w, bias, g))
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
    last = convolve(x.contiguous(memory_format=torch.channels_last), weight, bias, g, "relu")
    assert torch.equal(y, last), "the memory format changes no bit"
    if batch > 1:
        assert torch.equal(y[-1:], convolve(x[-1:], weight, bias, g, "relu")), "nor does the batch"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [255, 256, 259, 515])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_of_many_channels(channels: int, stride: int, dtype: torch.dtype) -> None:
    weight = random_weight((70, channels, 3, 3), 0.03)
    mask = weight.mask()
    mask[5:8], mask[66:] = False, False  # rows that are stored together are no neighbours
    weight = CondensedWeight.from_dense(weight.to_dense(), mask)
    x = torch.randn(3, channels, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    g = Geometry((stride, stride), (1, 1), (1, 1), 1)
    bias = torch.randn(70)
    poison()
    y = check(weight, x.contiguous(memory_format=torch.channels_last), g, bias=bias, activation="relu")
    assert torch.equal(y, convolve(x, weight, bias, g, "relu")), "the memory format changes no bit"


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
        z = convolve(x, weight, None, g, activation=activation, residual=residual)
        assert torch.equal(z.isnan(), residual.isnan())


def test_columns_beyond_16_bits() -> None:
    weight = random_weight((3, 3, 30001), 0.001)
    assert weight.indices.dtype == torch.int32
    check(weight, torch.randn(2, 3, 30005), Geometry((1,), (0,), (1,)))
    check(random_weight((4, 70001, 1), 0.001), torch.randn(2, 70001, 9), Geometry((1,), (0,), (1,)))


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("stride", [2, 3])
def test_strided_pointwise(stride: int, density: float) -> None:
    """Every second pixel is picked out of two vectors, up to the very last element of x."""
    weight = random_weight((21, 70, 1, 1), density)
    for batch, size in ((1, (16, 32)), (2, (15, 15)), (1, (1, 15)), (8, (7, 9)), (3, (14, 28))):
        for dtype in DTYPES:
            x = torch.randn(batch, 70, *size).to(dtype)
            last = x.contiguous(memory_format=torch.channels_last)
            poison()
            g = Geometry((stride, stride), (0, 0), (1, 1))
            assert torch.equal(check(weight, x, g), check(weight, last, g))


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
        assert torch.equal(convolve(x, weight, None, g), convolve(poisoned, weight, None, g))


@pytest.mark.parametrize(
    ("shape", "size", "batch"),
    [
        *(
            ((64, 64, 3, 3), 30, 1),
            ((300, 90, 3, 3), 7, 1),
            ((300, 90, 1, 1), 14, 3),
            ((90, 64, 3, 3), 14, 5),
        ),
        # seven rows of four tiles in two units or more, which end within rows for more than one thread
        *(
            ((64, 64, 3, 3), 56, 1),
            ((40, 1024, 1, 1), 14, 1),
            ((64, 256, 1, 1), 56, 3),
            ((70, 30, 1, 1), 7, 1),
        ),
        # bands of rows, one for each of two or seven threads, in one unit or several; tiles of several blocks of rows
        *(((64, 64, 3, 3), 14, 1), ((40, 160, 3, 3), 28, 3), ((600, 64, 1, 1), 14, 1)),
    ],
)
def test_the_same_bits_for_any_thread_count(shape: tuple[int, ...], size: int, batch: int) -> None:
    weight = random_weight(shape, 0.1, ragged=True)
    g = Geometry((1, 1), (shape[2] // 2,) * 2, (1, 1))
    x, before = torch.randn(batch, shape[1], size, size), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(check(weight, x, g, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_fillers_of_rows_side_by_side_read_zeros() -> None:
    """Chunks of 151 and 150 channels: behind the shorter one stands nothing of the next."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(21, 301, 1, 1, generator=generator) < torch.linspace(0.01, 0.4, 21).view(-1, 1, 1, 1)
    weight = CondensedWeight.from_dense(torch.randn(21, 301, 1, 1, generator=generator), mask)
    g, used = Geometry((1, 1), (0, 0), (1, 1)), mask.any(0)
    for batch, size in ((1, 5), (2, 9), (1, 30)):
        x = torch.randn(batch, 301, size, size)
        poisoned = torch.where(used, x, math.inf)
        assert torch.equal(check(weight, x, g), convolve(poisoned, weight, None, g))
        x[:, 0] = math.nan  # the first channel of each tile's first chunk
        assert torch.equal(
            convolve(x, weight, None, g)[:, ~mask[:, 0, 0, 0]].isnan().any(), torch.tensor(False)
        )


def test_images_beyond_the_reach_of_16_bits() -> None:
    """Chunks of x of more than 65535 vectors: their codes are turned into addresses one by one."""
    for shape, size in (((3, 24, 3, 3), (4, 12000)), ((3, 24, 5), (60000,))):
        weight = random_weight(shape, 0.2)
        ones = (1,) * len(size)
        check(weight, torch.randn(1, 24, *size), Geometry(ones, ones, ones))


@pytest.mark.parametrize("density", [0.05, 0.5])
def test_weights_packed_for_other_geometries(density: float) -> None:
    """They give the same result, through the reference where rows are packed side by side for pointwise layers."""
    pointwise, padded = Geometry((1, 1), (0, 0), (1, 1)), Geometry((2, 2), (1, 1), (1, 1))
    weight, x = random_weight((9, 30, 1, 1), density), torch.randn(2, 30, 7, 7)
    for packed_for, called_with in ((pointwise, padded), (padded, pointwise)):
        stride, padding, dilation, groups = packed_for
        p = pack_conv(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
        y = gather_conv(x, p.values, p.structure, None, weight.shape, *called_with)
        exact = aten_convolution(x.double(), weight.to_dense().double(), None, called_with)
        magnitude = aten_convolution(x.double().abs(), weight.to_dense().double().abs(), None, called_with)
        assert_close_fp64(y, exact, magnitude, k=weight.max_fan_in)


SCRATCH = """
import sys, torch
from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.ops_conv import gather_conv
from fanin_compile.packing_conv import pack_conv

batch, channels, out, size, kernel, stride, dilation = map(int, sys.argv[1:])
shape, pad = (out, channels, kernel, kernel), [dilation * (kernel // 2)] * 2
weight = torch.randn(shape) * (torch.rand(shape) < 0.1)
strides, dilations = [stride] * 2, [dilation] * 2
packed = pack_conv(CondensedWeight.from_dense(weight), stride=strides, padding=pad, dilation=dilations, groups=1)
x = torch.randn(batch, channels, size, size)
gather_conv(x, packed.values, packed.structure, None, shape, strides, pad, dilations, 1)
print(ops.scratch_nbytes())
"""


@pytest.mark.parametrize(
    ("case", "most"),
    [
        # a unit of x, at most 640 KiB or the weight's size however large L2 is, sums of a block, codes of a stage
        ((1, 64, 64, 56, 3, 1, 1), 1 << 20),
        ((1, 256, 64, 56, 1, 1, 1), 1 << 20),
        ((8, 128, 128, 56, 3, 2, 1), 1 << 20),
        ((1, 512, 512, 7, 3, 1, 1), 2 << 20),
        ((8, 2048, 512, 7, 1, 1, 1), 1 << 20),
        # large images: cut into narrower blocks, so that a row of tiles is no more than what stays in the cache
        ((1, 256, 8, 256, 3, 1, 1), 4 << 20),
        ((1, 256, 8, 256, 3, 2, 1), 4 << 20),
        # one row of tiles of all channels is more than a unit should be: no more than x with its halos
        ((1, 64, 64, 128, 3, 1, 16), (4 << 20) + 2 * 64 * (128 + 16 * 32) ** 2 * 4),
    ],
)
def test_scratch_is_bounded(case: tuple[int, ...], most: int) -> None:
    # a process of its own: the number is the most that was ever held
    command = [sys.executable, "-c", SCRATCH, *map(str, case)]
    held = int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert 0 < held <= most, f"{held / 1e6:.1f} MB"


def test_any_spatial_size_with_one_weight() -> None:
    weight = random_weight((17, 12, 3, 3), 0.2)
    for size in (*range(3, 20), 64, 65):
        check(weight, torch.randn(1, 12, size, 23 - size % 7), Geometry((1, 1), (1, 1), (1, 1)))


def test_what_does_not_fit_is_refused_by_name() -> None:
    w = random_weight((10, 12, 3, 3), 0.1)
    x = torch.randn(1, 12, 9, 9)
    ones = [1, 1]
    packed = pack_conv(w, stride=ones, padding=ones, dilation=ones, groups=1)

    def call(
        x: Any = x,
        structure: Any = packed.structure,
        bias: Any = None,
        padding: Any = ones,
        shape: Any = w.shape,
    ) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_conv(
            x, packed.values, structure, bias, shape, ones, padding, ones, 1
        )
        return y

    with pytest.raises(ValueError, match="11 channels"):
        call(x=x[:, 1:])
    with pytest.raises(ValueError, match="bias must have 10"):
        call(bias=torch.zeros(9))
    with pytest.raises(ValueError, match="input of size 2"):
        call(x=x[..., :2], padding=[0, 0])
    with pytest.raises(
        ValueError, match="not those of the packed weight: 10 x 12 channels, 9 taps, 1 groups"
    ):
        call(shape=[10, 12, 3, 2])
