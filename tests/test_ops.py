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
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.packed import Packed, decode
from fanin_compile.packing import pack

from .helpers import assert_close_at_scale, assert_close_fp64
from .strategies import masked_weights

OUT, IN = 7, 20


def condensed(*, ragged: bool, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = (OUT, IN)) -> Any:
    """Five inputs a neuron, or about 0.3 of them; neuron 2 is ablated."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    scores = torch.rand(shape, generator=generator)
    mask = scores < 0.3
    if not ragged:
        mask = torch.zeros(shape, dtype=torch.bool).scatter_(1, scores.topk(5).indices, True)
    mask[2] = False
    return CondensedWeight.from_dense(weight, mask)


def arguments(weight: CondensedWeight, batch: tuple[int, ...], activation: str = "none") -> tuple[Any, ...]:
    dtype = weight.values.dtype
    out, in_features = weight.shape
    packed = pack(weight, width=8, block_rows=3)
    x, residual = torch.randn(*batch, in_features, dtype=dtype), torch.randn(*batch, out, dtype=dtype)
    return x, packed.values, packed.structure, torch.randn(out, dtype=dtype), out, activation, residual


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_opcheck(ragged: bool, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    args = list(arguments(condensed(ragged=ragged, dtype=dtype), batch, "gelu"))
    torch.library.opcheck(torch.ops.fanin.gather_matmul.default, tuple(args))
    for i in (0, 1, 3, 6):
        args[i].requires_grad_()
    torch.library.opcheck(torch.ops.fanin.gather_matmul.default, tuple(args))


def test_opcheck_of_what_its_gradients_are_made_of() -> None:
    packed = pack(condensed(ragged=True))
    values, dense = packed.values.requires_grad_(), torch.randn(OUT, IN, dtype=torch.float64).requires_grad_()
    torch.library.opcheck(torch.ops.fanin.packed_to_dense.default, (values, packed.structure, [OUT, IN]))
    torch.library.opcheck(torch.ops.fanin.dense_to_packed.default, (dense, packed.structure, len(values)))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.filterwarnings("error:.*an autograd kernel was not registered")
def test_both_derivatives_agree_with_finite_differences(ragged: bool, activation: str) -> None:
    x, values, structure, bias, out, _, residual = arguments(condensed(ragged=ragged), (2, 2))

    def function(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(x, values, structure, bias, out, activation, residual)
        return y

    inputs = [t.requires_grad_() for t in (x, values, bias, residual)]
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def gradients(y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), inputs)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu"])
def test_gradients_are_those_of_the_masked_dense_layer(activation: str, compiled: bool) -> None:
    weight = condensed(ragged=False, dtype=torch.float32)
    x, values, structure, bias, out, _, residual = arguments(weight, (5,))
    inputs = [t.requires_grad_() for t in (x, values, bias, residual)]

    def layer(x: Tensor, values: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ops.gather_matmul(x, values, structure, bias, out, activation, residual)

    torch._dynamo.reset()
    function = torch.compile(layer, fullgraph=True) if compiled else layer
    by_x, by_values, by_bias, by_residual = gradients(function(*inputs), *inputs)

    x, bias, residual, dense = (
        t.detach().double().requires_grad_() for t in (x, bias, residual, weight.to_dense())
    )
    z = F.linear(x, dense, bias) + residual
    expected = gradients(ops.ACTIVATIONS[activation].forward(z), x, dense, bias, residual)
    assert_close_at_scale((by_x, by_bias, by_residual), (expected[0], *expected[2:]))
    _, index, entry = decode(structure)
    assert_close_at_scale(by_values[entry], expected[1].flatten()[index])
    filler = torch.ones(len(values), dtype=torch.bool)
    filler[entry] = False
    assert not by_values[filler].any(), "what fills up groups would be trained"


def test_gradients_are_computed_in_the_wider_dtype() -> None:
    """x in fp32 and values in bf16: neither gradient is rounded on its way."""
    weight = condensed(ragged=False, dtype=torch.bfloat16)
    packed = pack(weight)
    x, g = torch.randn(9, IN, requires_grad=True), torch.randn(9, OUT)
    y = ops.gather_matmul(x, packed.values, packed.structure, None, OUT)
    (by_x,) = torch.autograd.grad(y, x, g)
    assert_close_at_scale(by_x, g.double() @ weight.to_dense(torch.float64))


def test_no_grad_graph_when_none_is_wanted() -> None:
    args = arguments(condensed(ragged=False, dtype=torch.float32), (3,), "relu")
    assert not torch.ops.fanin.gather_matmul(*args).requires_grad
    args[0].requires_grad_()
    with torch.no_grad():
        assert not torch.ops.fanin.gather_matmul(*args).requires_grad
    assert torch.ops.fanin.gather_matmul(*args).requires_grad


def test_flops_are_two_per_packed_value_and_batch_row() -> None:
    args = arguments(condensed(ragged=False, dtype=torch.float32), (2, 3))
    with FlopCounterMode(display=False) as counter:
        torch.ops.fanin.gather_matmul(*args)
    assert counter.get_total_flops() == 2 * 6 * args[1].numel()


@settings(deadline=None, max_examples=60)
@given(weight=masked_weights(kernels=((),), dtypes=(torch.float64,)), batch=st.sampled_from([0, 1, 3, 200]))
def test_the_reference_is_the_masked_dense_product(weight: Any, batch: int) -> None:
    packed = pack(CondensedWeight.from_dense(weight.weight, weight.mask))
    out, in_features = weight.mask.shape
    x = torch.randn(batch, in_features, dtype=torch.float64)
    for op in (ops.reference_gather_matmul, ops.gather_matmul):  # the kernels leave float64 to the reference
        y = op(x, packed.values, packed.structure, None, out)
        torch.testing.assert_close(y, x @ weight.effective.t())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_graph_calls_the_op_and_agrees(dynamic: bool) -> None:
    _, values, structure, bias, out, _, _ = arguments(condensed(ragged=True, dtype=torch.float32), (1,))

    def layer(x: Tensor) -> Tensor:
        return ops.gather_matmul(x.t() * 2, values, structure, bias, out, "relu") + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, dynamic=dynamic, fullgraph=True)
    for batch in (4, 5):
        x = torch.randn(IN, batch)
        with torch.no_grad():
            assert_close_at_scale(compiled(x), layer(x))
    x = torch.randn(IN, 5, requires_grad=True)
    assert_close_at_scale(gradients(compiled(x), x), gradients(layer(x), x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "softmax"}, "softmax"),
        ({"x": torch.randn(2, IN + 1)}, "21"),
        ({"x": torch.randn(2, IN - 1)}, "19"),
        ({"out_features": OUT + 1}, "8"),
        ({"out_features": OUT - 1}, "6"),
        ({"bias": torch.randn(OUT + 1)}, "8"),
        ({"residual": torch.randn(1, OUT)}, "residual"),
    ],
    ids=str,
)
def test_the_native_kernel_refuses_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    names = ("x", "values", "structure", "bias", "out_features", "activation", "residual")
    args = dict(zip(names, arguments(condensed(ragged=False, dtype=torch.float32), (2,)), strict=True))
    with pytest.raises(ValueError, match=message):
        ops.gather_matmul(**(args | changes))


@pytest.mark.parametrize(("out", "in_features"), [(OUT + 1, IN), (OUT, IN + 1), (IN, OUT)])
def test_the_reference_refuses_another_shape(out: int, in_features: int) -> None:
    packed = pack(condensed(ragged=False))
    message = rf"weight has shape \({out}, {in_features}\), expected that of the packed one: 7 x 20"
    with pytest.raises(ValueError, match=message):
        ops.gather_matmul(torch.randn(2, in_features).double(), packed.values, packed.structure, None, out)
    with pytest.raises(ValueError, match=message):
        torch.ops.fanin.dense_to_packed(torch.randn(out, in_features), packed.structure, 64)


def test_importing_builds_nothing_and_meta_tensors_work(tmp_path: Any) -> None:
    script = (
        "import torch; from fanin_compile import ops; s = torch.zeros(512, dtype=torch.uint8, device='meta');"
        "x, v = torch.empty(3, 2, 9, device='meta', dtype=torch.bfloat16), torch.empty(64, device='meta');"
        "y = ops.gather_matmul(x, v, s, None, 4, 'relu');"
        "assert (y.shape, y.dtype, y.device.type) == ((3, 2, 4), torch.bfloat16, 'meta'), y"
    )
    environment = {"FANIN_CACHE_DIR": str(tmp_path / "cache"), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


def test_half_precision_reference_keeps_sums_in_fp32() -> None:
    weight = condensed(ragged=False, dtype=torch.bfloat16, shape=(9, 300))
    packed: Packed = pack(weight)
    x = torch.randn(64, 300, dtype=torch.bfloat16)
    y = ops.reference_gather_matmul(x, packed.values, packed.structure, None, 9)
    dense = weight.to_dense().double()
    assert_close_fp64(y, x.double() @ dense.t(), x.double().abs() @ dense.abs().t(), k=5)
