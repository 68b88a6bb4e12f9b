"""The native max pooling kernel against torch's in fp64, to the last bit, over geometries, layouts and threads."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops
from fanin_compile.ops_pool import max_pool

from .helpers import assert_close_fp64
from .strategies import seeds
from .test_kernels_depthwise import poison

POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
EXACT = ("none", "relu", "relu6")


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


class Geometry(NamedTuple):
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool = False


def equal(a: Tensor, b: Tensor) -> bool:
    """NaN where the other is, the same numbers elsewhere."""
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


def check(x: Tensor, g: Geometry, activation: str = "none") -> Tensor:
    """The kernel's output, after comparing every element with what torch pools in fp64."""
    poison()
    y = max_pool(x, *g, activation)
    expected = ops.ACTIVATIONS[activation].forward(POOLS[len(g.kernel)](x.double(), *g))
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    if activation in EXACT:
        assert y.shape == expected.shape
        assert equal(y, expected.float())
    else:
        assert_close_fp64(y, expected, expected.abs() + 1, k=1, factor=4)
    return y


class Case(NamedTuple):
    x: Tensor
    geometry: Geometry


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any kernel, stride, padding and dilation that torch takes; sizes around vector widths; NaN and infinities."""
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    kernel = [draw(st.sampled_from((1, 2, 3, 4, 5, 7))) for _ in range(dims)]
    stride = [draw(st.sampled_from((1, 2, 2, 3, 4))) for _ in range(dims)]
    dilation = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in range(dims)]
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    padding = [draw(st.integers(0, k // 2)) for k in kernel]
    least = [max(1, span - 2 * p) for span, p in zip(spans, padding, strict=True)]
    size = [draw(st.sampled_from((0, 1, 6, 7, 13, 62 if dims < 3 else 4))) + low for low in least]
    channels, batch = draw(st.sampled_from((1, 3, 17))), draw(st.sampled_from((0, 1, 2)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    x = 4 * torch.randn(batch, channels, *size, generator=generator)
    for value in (math.nan, -math.inf, math.inf):
        if draw(st.booleans()):
            x[torch.rand(x.shape, generator=generator) < 0.1] = value
    if draw(st.booleans()):  # a view of every second column
        x = torch.stack([x, x.neg()], -1).flatten(-2)[..., ::2]
    if batch == 1 and draw(st.booleans()):
        x = x[0]
    return Case(x, Geometry(kernel, stride, padding, dilation, draw(st.booleans())))


@settings(deadline=None, max_examples=200)
@given(case=cases(), activation=st.sampled_from(EXACT))
def test_any_geometry(case: Case, activation: str) -> None:
    check(*case, activation)


@pytest.mark.parametrize("kernel", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_height_and_width(kernel: int, stride: int) -> None:
    """Rows narrower than a vector, and tails of every length."""
    g = Geometry([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1])
    for size in range(1, 40):
        x = torch.randn(2, 3, size, 40 - size)
        y = check(x, g, "relu6")
        assert torch.equal(y[1:], max_pool(x[1:], *g, "relu6")), "the batch changes no bit"


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 37])
def test_activations_come_after_the_maximum(activation: str, stride: int, size: int) -> None:
    x = 6 * torch.randn(2, 3, size, size)
    y = check(x, Geometry([3, 3], [stride] * 2, [1, 1], [1, 1]), activation)
    if activation in EXACT:
        activated = ops.ACTIVATIONS[activation].forward(x)
        assert torch.equal(y, F.max_pool2d(activated, 3, stride, 1))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 16, 41])
def test_a_nan_at_any_place_wins(stride: int, size: int) -> None:
    """First or last of a window, of a row, of a vector; of either sign, whatever its bits."""
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert nans.isnan().all()
    for kernel in (2, 3, 4):
        x = torch.randn(size, 2, size, size)
        for image in range(size):
            x[image, 0, image % 3, image] = nans[image % 3]
        x[:, 1, -1, :] = math.inf
        check(x, Geometry([kernel] * 2, [stride] * 2, [1, 1], [1, 1]), "relu")


def test_windows_that_hold_nothing_are_minus_infinity() -> None:
    g = Geometry([2, 3], [1, 1], [1, 1], [5, 1])
    x = torch.randn(1, 2, 4, 9)
    y = check(x, g)
    assert (y == -math.inf).all()
    assert (check(x, g, "relu") == 0).all()


def test_a_plane_does_not_see_its_neighbours() -> None:
    x = torch.randn(2, 6, 9, 9)
    x[:, 1::2] = math.inf
    for stride in (1, 2, 3):
        for size in (3, 9):
            y = max_pool(x[..., :size].contiguous(), (3, 3), stride, 1)
            assert y[:, ::2].isfinite().all()
            assert (y[:, 1::2] == math.inf).all()


@pytest.mark.parametrize(
    ("shape", "kernel"), [((3, 17, 30, 29), (3, 3)), ((2, 9, 4000), (5,)), ((1, 8, 9, 12, 12), (3, 3, 3))]
)
def test_the_same_bits_for_any_thread_count(shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    dims, before = len(kernel), torch.get_num_threads()
    x = torch.randn(shape)
    g = Geometry([*kernel], [2] * dims, [k // 2 for k in kernel], [1] * dims)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(x, g, "silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_does_not_fit_is_refused_by_name() -> None:
    x = torch.randn(1, 6, 9, 9)
    with pytest.raises(ValueError, match="one number for each"):
        max_pool(x, (3, 3), (1, 1, 1))
    with pytest.raises(ValueError, match="3 or 4 dimensions"):
        max_pool(x[0, 0], (3, 3))
    with pytest.raises(ValueError, match="stride 0"):
        max_pool(x, (3, 3), 0)
    with pytest.raises(ValueError, match="padding 2 must be 0 to half of the kernel's 3"):
        max_pool(x, (3, 3), 1, 2)
    with pytest.raises(ValueError, match="padding -1"):
        max_pool(x, (3, 3), 1, -1)
    with pytest.raises(ValueError, match="does not fit an input of size 2"):
        max_pool(x[..., :2], (3, 3))
