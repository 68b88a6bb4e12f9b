"""The depthwise operator as PyTorch sees it: schema, fake kernel, gradients, flop formula, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops
from fanin_compile.ops_depthwise import depthwise_conv, reference_depthwise_conv

from .helpers import assert_close_at_scale

op = torch.ops.fanin.depthwise_conv.default


def arguments(
    *kernel: int,
    batch: tuple[int, ...] = (2,),
    activation: str = "gelu",
    multiplier: int = 1,
    dtype: torch.dtype = torch.float64,
) -> list[Any]:
    """Of a layer of 3 channels at stride 2, padded by one in front and two behind."""
    generator = torch.Generator().manual_seed(1)
    dims, out = len(kernel), 3 * multiplier
    x = torch.randn(*batch, 3, *[5] * dims, generator=generator).to(dtype)
    weight = torch.randn(out, 1, *kernel, generator=generator).to(dtype)
    sizes = [(5 + 3 - k) // 2 + 1 for k in kernel]
    bias = torch.randn(out, generator=generator).to(dtype)
    residual = torch.randn(*batch, out, *sizes, generator=generator).to(dtype)
    return [x, weight, bias, [2] * dims, [1, 2] * dims, [1] * dims, activation, residual]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kernel", "batch", "multiplier"),
    [((3,), (2,), 1), ((3, 3), (2,), 2), ((3, 2), (), 1), ((1, 2, 3), (1,), 1)],
)
def test_opcheck(
    dtype: torch.dtype, kernel: tuple[int, ...], batch: tuple[int, ...], multiplier: int
) -> None:
    args = arguments(*kernel, batch=batch, multiplier=multiplier, dtype=dtype)
    torch.library.opcheck(op, tuple(args))
    for i in (0, 1, 2, 7):
        args[i].requires_grad_()
    torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_opcheck_channels_last(multiplier: int) -> None:
    args = arguments(3, 3, dtype=torch.float32, multiplier=multiplier)
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(
    ("kernel", "batch", "multiplier"),
    [((3,), (2,), 1), ((3, 2), (2,), 2), ((3, 2), (), 1), ((1, 2, 2), (1,), 1)],
)
def test_gradients_agree_with_finite_differences(
    kernel: tuple[int, ...], batch: tuple[int, ...], multiplier: int, activation: str
) -> None:
    args = arguments(*kernel, batch=batch, activation=activation, multiplier=multiplier)

    def function(*inputs: Tensor) -> Tensor:
        for i, value in zip((0, 1, 2, 7), inputs, strict=True):
            args[i] = value
        y: Tensor = op(*args)
        return y

    assert torch.autograd.gradcheck(function, [args[i].requires_grad_() for i in (0, 1, 2, 7)])


def test_gradients_of_the_native_kernel_are_those_of_the_padded_convolution() -> None:
    x, weight = torch.randn(2, 5, 9, 8, requires_grad=True), torch.randn(5, 1, 3, 3, requires_grad=True)
    y = op(x, weight, None, [2, 1], [0, 1, 2, 0], [1, 1], "silu")
    x2, w2 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = F.silu(F.conv2d(F.pad(x2, (2, 0, 0, 1)), w2, None, (2, 1), groups=5))
    assert_close_at_scale(y.detach(), expected.detach())
    grads, expecteds = (
        torch.autograd.grad(o.square().sum(), i) for o, i in ((y, (x, weight)), (expected, (x2, w2)))
    )
    assert_close_at_scale(grads, expecteds)


def test_no_grad_graph_when_none_is_wanted() -> None:
    args = arguments(3, 3, dtype=torch.float32)
    assert not op(*args).requires_grad
    args[1].requires_grad_()
    with torch.no_grad():
        assert not op(*args).requires_grad
    assert op(*args).requires_grad


def test_flops_are_two_per_tap_and_output() -> None:
    with FlopCounterMode(display=False) as counter:
        y = op(*arguments(3, 2, dtype=torch.float32))
    assert counter.get_total_flops() == 2 * 6 * y.numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_reference_and_fake_keep_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    args = arguments(3, 3, dtype=dtype)
    if channels_last:
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    y, native = reference_depthwise_conv(*args), op(*args)
    fake = op(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    for other in (native, fake):
        assert (other.dtype, other.shape, other.stride()) == (dtype, y.shape, y.stride())
    assert_close_at_scale(native, y, share=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_compiled_graph_calls_the_op_and_agrees(dynamic: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    weight, bias = torch.randn(4, 1, 3, 3), torch.randn(4)
    torch._dynamo.mark_static(weight)
    format = torch.channels_last if channels_last else torch.contiguous_format

    def layer(x: Tensor) -> Tensor:
        return depthwise_conv(x * 2, weight, bias, 2, (0, 1, 0, 1), activation="relu6") + 1

    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for batch, size in ((2, 8), (3, 11)):
        x = torch.randn(batch, 4, size, size).contiguous(memory_format=format)
        with torch.no_grad():
            y = compiled(x)
            assert_close_at_scale(y, layer(x))
        assert y.is_contiguous(memory_format=format)
        if not dynamic:  # inductor's lowering of aten.convolution_backward fails on the padded symbolic sizes
            x.requires_grad_()
            assert_close_at_scale(*(torch.autograd.grad(f(x).sum(), x) for f in (compiled, layer)))


def test_one_padding_stands_for_all_sides() -> None:
    x, weight = torch.randn(1, 2, 6, 7), torch.randn(2, 1, 3, 3)
    for given, expected in ((1, (1, 1)), ((0, 2), (0, 2)), ((1, 1, 0, 0), (1, 0))):
        y = F.conv2d(x, weight, padding=expected, groups=2)
        assert_close_at_scale(depthwise_conv(x, weight, padding=given), y)


def test_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="softmax"):
        op(*arguments(3, 3, dtype=torch.float32, activation="softmax"))
