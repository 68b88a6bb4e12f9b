"""The operators as PyTorch sees them: schema, fake kernel, gradients, flop formula, tracing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight

from .helpers import assert_close_fp64
from .strategies import masked_weights


def condensed(
    out: int = 7, width: int = 20, *, ragged: bool, dtype: torch.dtype = torch.float64
) -> CondensedWeight:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out, width, generator=generator, dtype=dtype)
    mask = torch.rand(out, width, generator=generator) < 0.3
    if not ragged:
        mask = torch.zeros(out, width, dtype=torch.bool)
        mask.scatter_(1, torch.rand(out, width, generator=generator).topk(5).indices, True)
    mask[2] = False
    return CondensedWeight.from_dense(weight, mask)


def arguments(weight: CondensedWeight, batch: tuple[int, ...], activation: str) -> tuple[Any, ...]:
    dtype = weight.values.dtype
    out, width = weight.shape
    x = torch.randn(*batch, width, dtype=dtype)
    plan = ops.gather_matmul_plan(weight.indices, weight.row_ptr, width)
    bias, residual = torch.randn(out, dtype=dtype), torch.randn(*batch, out, dtype=dtype)
    return (
        x, weight.values, weight.indices, weight.row_ptr, weight.rows, bias, plan, out, activation, residual
    )  # fmt: skip


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_opcheck(ragged: bool, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    args = list(arguments(condensed(ragged=ragged, dtype=dtype), batch, "gelu"))
    torch.library.opcheck(torch.ops.fanin.gather_matmul.default, tuple(args))
    for i in (0, 1, 5, 9):
        args[i].requires_grad_()
    torch.library.opcheck(torch.ops.fanin.gather_matmul.default, tuple(args))
    torch.library.opcheck(torch.ops.fanin.gather_matmul_plan.default, (args[2], args[3], 20))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gradients_agree_with_finite_differences(ragged: bool, activation: str) -> None:
    x, values, indices, row_ptr, rows, bias, plan, out, _, residual = arguments(
        condensed(ragged=ragged), (2, 2), activation
    )

    def function(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(
            x, values, indices, row_ptr, rows, bias, plan, out, activation, residual
        )
        return y

    inputs = [t.requires_grad_() for t in (x, values, bias, residual)]
    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_of_the_native_kernel_are_those_of_the_masked_dense_layer() -> None:
    weight = condensed(ragged=False, dtype=torch.float32)
    x, values, indices, _, rows, bias, plan, out, _, _ = arguments(weight, (5,), "none")
    x.requires_grad_()
    values.requires_grad_()
    y = ops.gather_matmul(x, values, indices, None, rows, bias, plan, out, "silu")
    assert y.requires_grad
    by_x, by_values = torch.autograd.grad(y.square().sum(), [x, values])
    dense = weight.to_dense().requires_grad_()
    x2 = x.detach().requires_grad_()
    expected = torch.nn.functional.silu(torch.nn.functional.linear(x2, dense, bias)).square().sum()
    by_x2, by_dense = torch.autograd.grad(expected, [x2, dense])
    torch.testing.assert_close(by_x, by_x2)
    torch.testing.assert_close(by_values.flatten(), by_dense.flatten()[weight.dense_index()])


def test_no_grad_graph_when_none_is_wanted() -> None:
    weight = condensed(ragged=False, dtype=torch.float32)
    args = arguments(weight, (3,), "relu")
    assert not torch.ops.fanin.gather_matmul(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not torch.ops.fanin.gather_matmul(*args).requires_grad
    assert torch.ops.fanin.gather_matmul(*args).requires_grad


def test_flops_are_two_per_non_zero_and_batch_row() -> None:
    weight = condensed(ragged=False, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        torch.ops.fanin.gather_matmul(*arguments(weight, (2, 3), "none"))
    assert counter.get_total_flops() == 2 * 6 * weight.values.numel()


@settings(deadline=None, max_examples=60)
@given(weight=masked_weights(kernels=((),), dtypes=(torch.float64,)), batch=st.sampled_from([0, 1, 3, 200]))
def test_both_forms_of_the_reference_are_the_masked_dense_product(weight: Any, batch: int) -> None:
    w = CondensedWeight.from_dense(weight.weight, weight.mask)
    x = torch.randn(batch, w.shape[1], dtype=torch.float64)
    y = ops.reference_gather_matmul(x, w.values, w.indices, w.row_ptr, w.rows, out_features=w.shape[0])
    torch.testing.assert_close(y, x @ weight.effective.t())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_calls_the_op_and_agrees(dynamic: bool) -> None:
    weight = condensed(ragged=True, dtype=torch.float32)
    _, values, indices, row_ptr, rows, bias, plan, out, _, _ = arguments(weight, (1,), "none")

    def layer(x: Tensor) -> Tensor:
        return ops.gather_matmul(x.t() * 2, values, indices, row_ptr, rows, bias, plan, out, "relu") + 1

    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for batch in (4, 5):
        x = torch.randn(20, batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
    x = torch.randn(20, 5, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0]
    )


def test_unknown_activation_is_refused_by_name() -> None:
    args = list(arguments(condensed(ragged=False, dtype=torch.float32), (2,), "softmax"))
    with pytest.raises(ValueError, match="softmax"):
        torch.ops.fanin.gather_matmul(*args)


def test_importing_builds_nothing_and_meta_tensors_work(tmp_path: Any) -> None:
    script = (
        "import torch; from fanin_compile import ops; i = torch.zeros(4, 2, dtype=torch.uint8, device='meta');"
        "y = ops.gather_matmul(torch.empty(3, 9, device='meta'), i.float(), i); assert y.shape == (3, 4), y.shape"
    )
    environment = {"FANIN_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


def test_half_precision_reference_keeps_sums_in_fp32() -> None:
    weight = condensed(out=9, width=300, ragged=False, dtype=torch.bfloat16)
    x = torch.randn(64, 300, dtype=torch.bfloat16)
    y = ops.reference_gather_matmul(x, weight.values, weight.indices, None, weight.rows, out_features=9)
    dense = weight.to_dense().double()
    assert_close_fp64(y, x.double() @ dense.t(), x.double().abs() @ dense.abs().t(), k=5)
