"""The convolution operator as PyTorch sees it: schema, fake kernel, gradients, flop formula, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops, ops_conv
from fanin_compile.condensed import CondensedWeight
from fanin_compile.packed_conv import decode_conv
from fanin_compile.packing_conv import pack_conv

from .helpers import assert_close_at_scale


def condensed(
    *kernel: int, ragged: bool = False, dtype: torch.dtype = torch.float64, groups: int = 1
) -> CondensedWeight:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 4 // groups, *kernel, generator=generator, dtype=dtype)
    scores = torch.rand(weight.shape, generator=generator)
    mask = scores < 0.4
    if not ragged:
        mask = torch.zeros(6, weight[0].numel(), dtype=torch.bool)
        mask = mask.scatter_(1, scores.flatten(1).topk(3).indices, True).view_as(weight)
    mask[2] = False
    return CondensedWeight.from_dense(weight, mask)


def arguments(
    w: CondensedWeight, batch: tuple[int, ...], activation: str, groups: int = 1
) -> tuple[Any, ...]:
    dims, dtype = len(w.shape) - 2, w.values.dtype
    geometry = ([2] * dims, [1] * dims, [1] * dims)
    x = torch.randn(*batch, 4, *[5] * dims, dtype=dtype)
    out = [(5 + 2 - k) // 2 + 1 for k in w.shape[2:]]
    bias, residual = torch.randn(6, dtype=dtype), torch.randn(*batch, 6, *out, dtype=dtype)
    stride, padding, dilation = geometry
    p = pack_conv(w, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return (x, p.values, p.structure, bias, list(w.shape), *geometry, groups, activation, residual)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kernel", "batch"), [((3,), (2,)), ((3, 2), (2,)), ((3, 2), ()), ((1, 2, 3), (1,))])
def test_opcheck(ragged: bool, dtype: torch.dtype, kernel: tuple[int, ...], batch: tuple[int, ...]) -> None:
    args = list(arguments(condensed(*kernel, ragged=ragged, dtype=dtype), batch, "gelu"))
    torch.library.opcheck(torch.ops.fanin.gather_conv.default, tuple(args))
    for i in (0, 1, 3, 10):
        args[i].requires_grad_()
    torch.library.opcheck(torch.ops.fanin.gather_conv.default, tuple(args))


def test_opcheck_channels_last() -> None:
    args = list(arguments(condensed(3, 3, dtype=torch.float32), (2,), "relu"))
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.fanin.gather_conv.default, tuple(args))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(
    ("kernel", "batch", "groups"), [((3,), (2,), 1), ((3, 2), (2,), 2), ((3, 2), (), 1), ((1, 2, 2), (1,), 1)]
)
def test_gradients_agree_with_finite_differences(
    kernel: tuple[int, ...], batch: tuple[int, ...], groups: int, activation: str
) -> None:
    weight = condensed(*kernel, ragged=groups == 1, groups=groups)
    args = list(arguments(weight, batch, activation, groups))

    def function(*inputs: Tensor) -> Tensor:
        for i, value in zip((0, 1, 3, 10), inputs, strict=True):
            args[i] = value
        y: Tensor = torch.ops.fanin.gather_conv(*args)
        return y

    assert torch.autograd.gradcheck(function, [args[i].requires_grad_() for i in (0, 1, 3, 10)])


def test_gradients_of_the_native_kernel_are_those_of_the_masked_dense_layer() -> None:
    weight = condensed(3, 3, dtype=torch.float32)
    x, bias = torch.randn(3, 4, 9, 9, requires_grad=True), torch.randn(6)
    packed = pack_conv(weight, stride=[1, 1], padding=[1, 1], dilation=[1, 1], groups=1)
    values = packed.values.requires_grad_()
    args = (x, values, packed.structure, bias, list(weight.shape), [1, 1], [1, 1], [1, 1], 1)
    y = torch.ops.fanin.gather_conv(*args, "silu")
    by_x, by_values = torch.autograd.grad(y.square().sum(), [x, values])
    dense, x2 = (t.detach().double().requires_grad_() for t in (weight.to_dense(), x))
    expected = torch.nn.functional.silu(torch.nn.functional.conv2d(x2, dense, bias.double(), padding=1))
    by_x2, by_dense = torch.autograd.grad(expected.square().sum(), [x2, dense])
    assert_close_at_scale(by_x, by_x2)
    _, index, entry = decode_conv(packed.structure)
    assert_close_at_scale(by_values[entry], by_dense.flatten()[index])


def test_no_grad_graph_when_none_is_wanted() -> None:
    args = arguments(condensed(3, 3, dtype=torch.float32), (3,), "relu")
    assert not torch.ops.fanin.gather_conv(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not torch.ops.fanin.gather_conv(*args).requires_grad
    assert torch.ops.fanin.gather_conv(*args).requires_grad


def test_flops_are_two_per_non_zero_and_output_pixel() -> None:
    weight = condensed(3, 3, dtype=torch.float32)
    args = arguments(weight, (2,), "none")
    packed = args[1]
    assert packed.numel() >= weight.nnz
    with FlopCounterMode(display=False) as counter:
        y = torch.ops.fanin.gather_conv(*args)
    assert counter.get_total_flops() == 2 * packed.numel() * y[:, 0].numel()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_reference_and_fake_keep_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    args = list(arguments(condensed(3, 3, dtype=dtype), (2,), "none"))
    if channels_last:
        args[0] = args[0].contiguous(memory_format=torch.channels_last)
    y, native = ops_conv.reference_gather_conv(*args), torch.ops.fanin.gather_conv(*args)
    fake = torch.ops.fanin.gather_conv(*[a.to("meta") if isinstance(a, Tensor) else a for a in args])
    for other in (native, fake):
        assert (other.dtype, other.shape, other.stride()) == (dtype, y.shape, y.stride())
    assert_close_at_scale(native, y, share=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_compiled_graph_calls_the_op_and_agrees(dynamic: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    weight, bias = condensed(3, 3, ragged=True, dtype=torch.float32), torch.randn(6)
    format = torch.channels_last if channels_last else torch.contiguous_format
    geometry = ([2, 2], [1, 1], [1, 1])
    packed = pack_conv(weight, stride=[2, 2], padding=[1, 1], dilation=[1, 1], groups=1)
    parts = (packed.values, packed.structure)

    def layer(x: Tensor) -> Tensor:
        return ops_conv.gather_conv(x * 2, *parts, bias, weight.shape, *geometry, 1, activation="relu") + 1

    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for batch, size in ((2, 8), (3, 11)):
        x = torch.randn(batch, 4, size, size).contiguous(memory_format=format)
        with torch.no_grad():
            y = compiled(x)
            assert_close_at_scale(y, layer(x))
        assert y.is_contiguous(memory_format=format)
        x.requires_grad_()
        assert_close_at_scale(*(torch.autograd.grad(f(x).sum(), x) for f in (compiled, layer)))


def test_unknown_activation_is_refused_by_name() -> None:
    args = list(arguments(condensed(3, 3, dtype=torch.float32), (2,), "softmax"))
    with pytest.raises(ValueError, match="softmax"):
        torch.ops.fanin.gather_conv(*args)
