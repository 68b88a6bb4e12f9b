"""The native depthwise kernels against dense convolution in fp64, over geometries, layouts and threads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops
from fanin_compile.ops_depthwise import depthwise_conv

from .helpers import assert_close_fp64
from .strategies import seeds

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


class Geometry(NamedTuple):
    stride: list[int]
    padding: list[int]  # before and behind each dimension
    dilation: list[int]


def padded_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    pads = [n for i in reversed(range(0, len(g.padding), 2)) for n in g.padding[i : i + 2]]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(g.stride) - 1]
    return convolve(F.pad(x, pads), weight, bias, g.stride, 0, g.dilation, x.shape[-len(g.stride) - 1])


def poison() -> None:
    """Leaves NaN in memory that the allocator hands out next: an element the kernel does not write shows."""
    for size in (64, 1000, 30000):
        torch.full((size,), math.nan)


def check(
    weight: Tensor,
    x: Tensor,
    g: Geometry,
    *,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """The kernel's output, after comparing every element with the padded dense convolution in fp64."""
    poison()
    y = depthwise_conv(x, weight, bias, *g, activation, residual)
    dims = len(g.stride)
    if x.is_contiguous() or dims == 1:
        assert y.is_contiguous()
    elif x.ndim == dims + 2 and x.is_contiguous(memory_format=CHANNELS_LAST[dims]):
        assert y.is_contiguous(memory_format=CHANNELS_LAST[dims])
    w64, bias64 = weight.double(), None if bias is None else bias.double()
    z = padded_convolution(x.double(), w64, bias64, g)
    magnitude = padded_convolution(x.double().abs(), w64.abs(), None if bias64 is None else bias64.abs(), g)
    if residual is not None:
        z, magnitude = z + residual.double(), magnitude + residual.double().abs()
    terms = math.prod(weight.shape[2:]) + (bias is not None) + (residual is not None)
    expected = ops.ACTIVATIONS[activation].forward(z)  # of which an activation is a few ulp off
    assert_close_fp64(y, expected, magnitude + expected.abs(), k=terms)
    return y


class Case(NamedTuple):
    weight: Tensor
    x: Tensor
    geometry: Geometry


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any kernel, stride, padding and dilation whose output is not empty; sizes around vector widths and strips."""
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    kernel = [draw(st.sampled_from((1, 2, 3, 5, 7))) for _ in range(dims)]
    stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2))
    if draw(st.booleans()):  # what strips know
        kernel = [draw(st.sampled_from((3, 5, 7)))] * dims
        stride, dilation = [draw(st.integers(1, 2))] * dims, [1] * dims
    padding = [draw(st.integers(0, 4)) for _ in range(2 * dims)]
    pads = zip(padding[::2], padding[1::2], strict=True)
    least = [
        max(1, d * (k - 1) + 1 - before - behind)
        for d, k, (before, behind) in zip(dilation, kernel, pads, strict=True)
    ]
    size = [draw(st.sampled_from((0, 1, 6, 7, 13, 62 if dims < 3 else 4))) + low for low in least]
    channels, multiplier = draw(st.sampled_from((1, 3, 8, 17))), draw(st.sampled_from((1, 1, 1, 2)))
    batch = draw(st.sampled_from((0, 1, 2, 5)))
    generator = torch.Generator().manual_seed(draw(seeds()))
    weight = torch.randn(channels * multiplier, 1, *kernel, generator=generator)
    x = torch.randn(batch, channels, *size, generator=generator)
    if dims > 1 and draw(st.booleans()):
        x = x.contiguous(memory_format=CHANNELS_LAST[dims])
    elif draw(st.booleans()):
        x = torch.randn(batch, *size, channels, generator=generator).movedim(-1, 1)[..., : size[-1]]
    if batch == 1 and draw(st.booleans()):
        x = x[0]
    return Case(weight, x, Geometry(stride, padding, dilation))


@settings(deadline=None, max_examples=120)
@given(data=st.data(), case=cases())
def test_any_geometry(data: st.DataObject, case: Case) -> None:
    weight, x, g = case
    bias = torch.randn(weight.shape[0]) if data.draw(st.booleans()) else None
    residual = None
    if data.draw(st.booleans()):
        residual = torch.randn_like(depthwise_conv(x, weight, bias, *g))
    check(
        weight, x, g, bias=bias, residual=residual, activation=data.draw(st.sampled_from([*ops.ACTIVATIONS]))
    )


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_height_and_width(kernel: int, stride: int) -> None:
    """Strips of one to four rows, rows narrower than a vector, and tails of every length."""
    weight, bias = torch.randn(3, 1, kernel, kernel), torch.randn(3)
    g = Geometry([stride] * 2, [kernel // 2, kernel // 2] * 2, [1, 1])
    for size in range(1, 24):
        x = torch.randn(2, 3, size, 24 - size)
        y = check(weight, x, g, bias=bias, activation="relu6")
        last = depthwise_conv(x.contiguous(memory_format=torch.channels_last), weight, bias, *g, "relu6")
        assert torch.equal(y, last), "the memory format changes no bit"
        assert torch.equal(y[1:], depthwise_conv(x[1:], weight, bias, *g, "relu6")), "nor does the batch"


@pytest.mark.parametrize("size", [1, 7, 63, 112])
def test_uneven_padding_of_mobilenets(size: int) -> None:
    """TensorFlow's "same" at stride 2: even sizes are padded behind alone."""
    for padding in ([0, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]):
        g = Geometry([2, 2], padding, [1, 1])
        if size + padding[0] + padding[1] >= 3:
            check(torch.randn(9, 1, 3, 3), torch.randn(2, 9, size, size + 1), g, activation="relu6")


def test_windows_that_lie_in_the_padding_alone() -> None:
    x, g = torch.randn(1, 4, 3, 2), Geometry([1, 1], [9, 8, 7, 6], [1, 1])
    y = check(torch.randn(4, 1, 3, 3), x, g, bias=torch.full((4,), 2.0), activation="relu")
    assert (y[:, :, :7] == 2).all()


@pytest.mark.parametrize("size", [7, 20])
def test_clamps_at_both_ends_and_keeps_nan(size: int) -> None:
    weight, g = torch.randn(5, 1, 3, 3), Geometry([1, 1], [1] * 4, [1, 1])
    x, residual = 10 * torch.randn(1, 5, size, size), torch.randn(1, 5, size, size)
    y = check(weight, x, g, residual=residual, activation="relu6")
    assert (y == 0).any()
    assert (y == 6).any()
    residual[:, 3] = math.nan
    for format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=format)
        for activation in ("none", "relu", "relu6"):
            z = depthwise_conv(given, weight, None, *g, activation=activation, residual=residual)
            assert torch.equal(z.isnan(), residual.isnan())


def test_a_plane_does_not_see_its_neighbours() -> None:
    x = torch.randn(2, 6, 9, 9)
    x[:, 1::2] = math.nan
    for stride in (1, 2):
        for size in (3, 9):
            y = depthwise_conv(x[..., :size].contiguous(), torch.ones(6, 1, 3, 3), None, stride, 1)
            assert not y[:, ::2].isnan().any()
            assert y[:, 1::2].isnan().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "kernel"), [((3, 17, 30, 29), (3, 3)), ((2, 9, 200), (5,)), ((1, 8, 5, 12, 12), (3, 3, 3))]
)
def test_the_same_bits_for_any_thread_count(
    shape: tuple[int, ...], kernel: tuple[int, ...], channels_last: bool
) -> None:
    dims = len(kernel)
    x = torch.randn(shape)
    if channels_last and dims > 1:
        x = x.contiguous(memory_format=CHANNELS_LAST[dims])
    weight, before = torch.randn(shape[1], 1, *kernel), torch.get_num_threads()
    g = Geometry([1] * dims, [k // 2 for k in kernel for _ in range(2)], [1] * dims)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(weight, x, g, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, weight = torch.randn(1, 6, 9, 9), torch.randn(6, 1, 3, 3)

    def call(
        x: Any = x, weight: Any = weight, bias: Any = None, padding: Any = (0, 0, 0, 0), residual: Any = None
    ) -> Tensor:
        y: Tensor = torch.ops.fanin.depthwise_conv(x, weight, bias, [1, 1], padding, [1, 1], "none", residual)
        return y

    with pytest.raises(ValueError, match="multiple of x's 5 channels"):
        call(x=x[:, 1:])
    with pytest.raises(ValueError, match=r"\[out, 1, kernel"):
        call(weight=torch.randn(6, 2, 3, 3))
    with pytest.raises(ValueError, match="bias must have 6"):
        call(bias=torch.zeros(5))
    with pytest.raises(ValueError, match="input of size 2"):
        call(x=x[..., :2])
    with pytest.raises(ValueError, match="input of size 9"):
        call(padding=(0, -1, 0, 0))
    with pytest.raises(ValueError, match="padding"):
        call(padding=(1, 1))
    with pytest.raises(ValueError, match="residual"):
        call(residual=torch.zeros(1, 6, 9, 9))
