"""The max pooling operator as PyTorch sees it: schema, fake kernel, gradients, dtypes, tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops
from fanin_compile.ops_pool import max_pool, reference_max_pool

from .helpers import assert_close_at_scale

op = torch.ops.fanin.max_pool.default


def arguments(
    *kernel: int,
    batch: tuple[int, ...] = (2,),
    activation: str = "relu",
    dtype: torch.dtype = torch.float64,
    ceil_mode: bool = False,
) -> list[Any]:
    """Of 3 channels, at stride 2, padded by one."""
    dims = len(kernel)
    x = torch.randn(*batch, 3, *[6] * dims, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [x, [*kernel], [2] * dims, [1] * dims, [1] * dims, ceil_mode, activation]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(
    ("kernel", "batch"), [((3,), (2,)), ((3,), ()), ((3, 2), (2,)), ((3, 2), ()), ((2, 2, 3), (1,))]
)
def test_opcheck(
    dtype: torch.dtype, ceil_mode: bool, kernel: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    args = arguments(*kernel, batch=batch, dtype=dtype, ceil_mode=ceil_mode)
    torch.library.opcheck(op, tuple(args))
    args[0].requires_grad_()
    torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_channels_last(dtype: torch.dtype) -> None:
    args = arguments(3, 3, dtype=dtype)
    args[0] = args[0].contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op, tuple(args))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "batch"), [((3,), (2,)), ((3, 2), ()), ((2, 2, 3), (1,))])
def test_gradients_agree_with_finite_differences(
    kernel: tuple[int, ...], batch: tuple[int, ...], activation: str
) -> None:
    x, *rest = arguments(*kernel, batch=batch, activation=activation)
    assert torch.autograd.gradcheck(lambda x: op(x, *rest), x.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: op(x, *rest), x)


@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_of_the_native_kernel_are_those_of_torch(channels_last: bool) -> None:
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 5, 9, 8).contiguous(memory_format=format).requires_grad_()
    y, expected = op(x, [3, 2], [2, 1], [1, 0], [1, 2], True, "relu"), x.relu()
    expected = F.max_pool2d(expected, (3, 2), (2, 1), (1, 0), (1, 2), ceil_mode=True)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(o.square().sum(), x)[0] for o in (y, expected)]
    assert_close_at_scale(*grads)


def test_no_grad_graph_when_none_is_wanted() -> None:
    args = arguments(3, 3, dtype=torch.float32)
    assert not op(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not op(*args).requires_grad
    assert op(*args).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_reference_and_fake_keep_dtype_and_memory_format(dtype: torch.dtype, channels_last: bool) -> None:
    x, *rest = arguments(3, 3, activation="none")
    x = (10 * x).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y, native, fake = reference_max_pool(x, *rest), op(x, *rest), op(x.to("meta"), *rest)
    assert y.is_contiguous(memory_format=torch.channels_last) == channels_last
    for other in (native, fake):
        assert (other.dtype, other.shape, other.stride()) == (dtype, y.shape, y.stride())
    assert torch.equal(native, y)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))


def test_half_precision_is_activated_in_fp32() -> None:
    x, *rest, _ = arguments(3, 3, dtype=torch.bfloat16)
    y = op(x, *rest, "gelu")
    expected = F.gelu(F.max_pool2d(x.double(), 3, 2, 1))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected.bfloat16())


@pytest.mark.parametrize(("dynamic", "channels_last"), [(False, False), (True, True)])
def test_a_compiled_graph_calls_the_op_and_agrees(dynamic: bool, channels_last: bool) -> None:
    torch._dynamo.reset()
    format = torch.channels_last if channels_last else torch.contiguous_format

    def layer(x: Tensor) -> Tensor:
        return max_pool(x * 2, (3, 3), 2, 1, ceil_mode=True, activation="relu6") + 1

    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for batch, size in ((2, 8), (3, 11)):
        x = torch.randn(batch, 4, size, size).contiguous(memory_format=format)
        with torch.no_grad():
            y = compiled(x)
            assert torch.equal(y, layer(x))
        assert y.is_contiguous(memory_format=format)
    x.requires_grad_()
    assert_close_at_scale(*(torch.autograd.grad(f(x).sum(), x) for f in (compiled, layer)))


def test_the_stride_is_the_kernel_and_one_number_stands_for_all() -> None:
    x = torch.randn(1, 2, 9, 11)
    assert torch.equal(max_pool(x, (3, 2)), F.max_pool2d(x, (3, 2)))
    assert torch.equal(max_pool(x, (3, 2), 1, 1, 2), F.max_pool2d(x, (3, 2), 1, 1, 2))


def test_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="softmax"):
        op(*arguments(3, 3, dtype=torch.float32, activation="softmax"))
