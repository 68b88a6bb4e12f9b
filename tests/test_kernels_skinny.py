"""The native dense kernel of few rows against torch's linear in fp64: shapes, layouts, threads, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops
from fanin_compile.ops_skinny import reference_skinny_linear, skinny_linear
from fanin_compile.timing import threads

from .helpers import assert_close_fp64
from .strategies import seeds
from .test_kernels_depthwise import poison


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel's output, after comparing it with the product in fp64."""
    poison()
    y = skinny_linear(x, weight, bias)
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), weight.double(), wide)
    size = F.linear(x.double().abs(), weight.double().abs(), None if wide is None else wide.abs())
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_close_fp64(y, expected, size, k=weight.shape[1] + 1)
    return y


SIZES = (1, 7, 63, 64, 100)


@settings(deadline=None, max_examples=150)
@given(
    lead=st.lists(st.sampled_from((0, 1, 2, 3, 5)), max_size=3),
    features=st.sampled_from((0, *SIZES)),
    out=st.sampled_from((0, *SIZES)),
    layout=st.sampled_from(("contiguous", "strided", "transposed weight", "strided weight")),
    with_bias=st.booleans(),
    seed=seeds(),
)
def test_equals_torch_in_fp64(
    lead: list[int], features: int, out: int, layout: str, with_bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, features, generator=generator)
    weight = torch.randn(out, features, generator=generator)
    bias = torch.randn(out, generator=generator) if with_bias else None
    if layout == "strided":
        x = torch.stack([x, x.neg()], -1)[..., 0]
        bias = None if bias is None else torch.stack([bias, bias.neg()], -1)[..., 0]
    elif layout == "transposed weight":
        weight = weight.t().contiguous().t()
    elif layout == "strided weight":
        weight = torch.stack([weight, weight.neg()], -1)[..., 0]
    _check(x, weight, bias)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 13, 16])
def test_bits_depend_neither_on_rows_nor_on_threads(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 700), torch.randn(301, 700), torch.randn(301)
    with threads(1):
        y = _check(x, weight, bias)
        for row in range(rows):
            assert torch.equal(skinny_linear(x[row], weight, bias), y[row])
    with threads(2):
        assert torch.equal(skinny_linear(x, weight, bias), y)


def test_many_rows_are_torchs() -> None:
    x, weight = torch.randn(17, 64), torch.randn(65, 64)
    assert torch.equal(_check(x, weight, None), F.linear(x, weight))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_reaches_the_outputs_it_is_read_by(value: float) -> None:
    x, weight = torch.randn(2, 70), torch.randn(65, 70)
    weight[3, 69] = value
    y = skinny_linear(x, weight)
    assert not y[:, 3].isfinite().any()
    assert y[:, torch.arange(65) != 3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*size).to(dtype) for size in ((3, 64), (65, 64), (65,)))
    assert torch.equal(skinny_linear(x, weight, bias), F.linear(x, weight, bias))
    assert torch.equal(reference_skinny_linear(x, weight, bias), F.linear(x, weight, bias))


def test_gradients_are_torchs() -> None:
    def tensors() -> list[Tensor]:
        torch.manual_seed(1)
        return [torch.randn(*size, requires_grad=True) for size in ((3, 7), (5, 7), (5,))]

    ours, expected = tensors(), tensors()
    skinny_linear(*ours).square().sum().backward()
    F.linear(*expected).square().sum().backward()
    for a, b in zip(ours, expected, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_torch_finds_the_operator_sound() -> None:
    args = (torch.randn(2, 3, 8), torch.randn(9, 8), torch.randn(9))
    for given_args in (args, args[:2]):
        torch.library.opcheck(torch.ops.fanin.skinny_linear.default, given_args)


def test_shapes_and_operations_are_known_without_running_it() -> None:
    with FakeTensorMode() as mode:
        x, weight = (mode.from_tensor(torch.empty(*size)) for size in ((2, 3, 8), (9, 8)))
        assert skinny_linear(x, weight).shape == (2, 3, 9)
    with FlopCounterMode(display=False) as counter:
        skinny_linear(torch.randn(2, 3, 8), torch.randn(9, 8))
    assert counter.get_total_flops() == 2 * 6 * 8 * 9


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ((2, 8), (9, 7), None, r"x must be \[..., in_features\] .* got \[2, 8\] and \[9, 7\]"),
        ((2, 8), (8,), None, r"x must be \[..., in_features\]"),
        ((), (9, 7), None, r"x must be \[..., in_features\]"),
        ((2, 8), (9, 8), (8,), r"bias must have 9 elements, got \[8\]"),
        ((2, 8), (9, 8), (9, 1), r"bias must have 9 elements, got \[9, 1\]"),
    ],
)
def test_shapes_that_do_not_fit(
    x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        skinny_linear(torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias))
