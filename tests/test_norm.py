"""Norms computed by the layers that read them: against fp64, and as PyTorch sees the operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.norm import normalise, pack_norm
from fanin_compile.ops_chain import gather_matmul_chain
from fanin_compile.packed import Packed
from fanin_compile.packing import pack

from .helpers import assert_close_at_scale
from .strategies import SIZES, masked_weights
from .test_ops_chain import sparse

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


def norm_of(size: int, *, centred: bool, dtype: torch.dtype = torch.float32, eps: float = 1e-5) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    weight, bias = torch.randn(2, size, generator=generator)
    return pack_norm(size, weight, bias, eps, centred=centred, dtype=dtype)


def normalised64(x: Tensor, norm: Tensor) -> Tensor:
    """By the formula, not by torch's norms."""
    x, (weight, bias) = x.double(), norm[:, :-1].double()
    mean = x.mean(-1, keepdim=True) if norm[1, -1] else 0
    scale = ((x - mean).square().mean(-1, keepdim=True) + norm[0, -1].double()).rsqrt()
    y: Tensor = (x - mean) * scale * weight + bias
    return y


def call(packed: Packed, x: Tensor, out: int, norm: Tensor, **kwargs: Any) -> Tensor:
    return ops.gather_matmul(
        x, packed.values, packed.structure, kwargs.pop("bias", None), out, norm=norm, **kwargs
    )


@settings(deadline=None, max_examples=100)
@given(data=st.data(), weight=masked_weights(kernels=((),)), centred=st.booleans())
def test_a_layer_normalises_its_input(data: st.DataObject, weight: Any, centred: bool) -> None:
    w = CondensedWeight.from_dense(weight.weight.float(), weight.mask)
    out, size = w.shape
    dtype, batch = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from((0, 1, 2, 8, 9, 33, 100)))
    width = data.draw(st.sampled_from((None, 1, 7, 255)))
    norm, bias = norm_of(size, centred=centred), torch.randn(out)
    x = (3 * torch.randn(batch, size) + 1).to(dtype)
    residual = torch.randn(batch, out).to(dtype) if data.draw(st.booleans()) else None
    y = call(pack(w, width=width), x, out, norm, bias=bias, residual=residual)
    assert y.dtype == dtype
    expected = F.linear(normalised64(x, norm), w.to_dense().double(), bias.double())
    expected = expected if residual is None else expected + residual.double()
    assert_close_at_scale(y.double(), expected, share=ROUNDING[dtype])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 8, 9, 70])
def test_the_first_layer_of_a_chain_normalises_its_input(batch: int, gated: bool, centred: bool) -> None:
    for size, hidden in ((7, 9), (63, 100), (100, 300)):
        first, second = sparse((1 + gated) * hidden, size, 0), sparse(11, hidden, 1)
        packed, packed2 = pack(first, block_rows=8), pack(second)
        norm, x = norm_of(size, centred=centred), torch.randn(batch, size)
        y = gather_matmul_chain(
            *(
                x,
                packed.values,
                packed.structure,
                None,
                "silu",
                gated,
                packed2.values,
                packed2.structure,
                None,
            ),
            *(hidden, 11),
            norm=norm,
        )
        z = F.linear(normalised64(x, norm), first.to_dense().double())
        h = F.silu(z[:, :hidden]) * z[:, hidden:] if gated else F.silu(z)
        assert_close_at_scale(y.double(), F.linear(h, second.to_dense().double()))


def test_bits_depend_on_neither_the_batch_nor_the_threads() -> None:
    w = sparse(300, 257, 0)
    packed, norm, x = pack(w), norm_of(257, centred=True), torch.randn(64, 257)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        all_rows = call(packed, x, 300, norm)
        assert torch.equal(call(packed, x[5:9], 300, norm), all_rows[5:9])
        torch.set_num_threads(2)
        assert torch.equal(call(packed, x, 300, norm), all_rows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("view", ["strided rows", "transposed", "three dimensions"])
def test_inputs_with_strides(batch: int, view: str) -> None:
    w = sparse(63, 100, 0)
    norm, wide = norm_of(100, centred=True), torch.randn(batch, 130)
    x = {
        "strided rows": wide[:, 10:110],
        "transposed": torch.randn(100, batch).t(),
        "three dimensions": torch.randn(batch, 2, 100).transpose(0, 1),
    }[view]
    expected = F.linear(normalised64(x, norm), w.to_dense().double())
    assert_close_at_scale(call(pack(w), x, 63, norm).double(), expected)


def test_constant_rows_are_no_division_by_zero() -> None:
    w, norm = sparse(7, 20, 0), norm_of(20, centred=True)
    y = call(pack(w), torch.full((2, 20), 3.0), 7, norm)
    assert_close_at_scale(y.double(), F.linear(norm[1, :-1].double(), w.to_dense().double()).expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_that_was_cast_with_its_model(dtype: torch.dtype) -> None:
    w = sparse(7, 20, 0)
    norm, x = norm_of(20, centred=True, eps=0.125).to(dtype), torch.randn(3, 20).to(dtype)
    expected = F.linear(normalised64(x, norm), w.to_dense().double())
    with torch.profiler.profile() as profile:
        y = call(pack(w), x, 7, norm)
    assert_close_at_scale(y.double(), expected, share=ROUNDING[dtype])
    assert not any("reference" in event.key for event in profile.key_averages())


def test_float64_runs_by_the_reference() -> None:
    w = sparse(7, 20, 0).with_dtype(torch.float64)
    norm, x = norm_of(20, centred=False, dtype=torch.float64), torch.randn(3, 20, dtype=torch.float64)
    assert norm.dtype == torch.float64
    torch.testing.assert_close(call(pack(w), x, 7, norm), normalised64(x, norm) @ w.to_dense().t())


@pytest.mark.parametrize("centred", [True, False])
def test_gradients_are_those_of_norm_and_layer(centred: bool) -> None:
    w = sparse(7, 20, 0)
    packed, norm = pack(w), norm_of(20, centred=centred)
    x = torch.randn(5, 20).requires_grad_()
    (by_x,) = torch.autograd.grad(call(packed, x, 7, norm, activation="relu").square().sum(), x)
    exact = x.detach().double().requires_grad_()
    y = F.linear(normalised64(exact, norm), w.to_dense().double()).relu()
    assert_close_at_scale(by_x.double(), torch.autograd.grad(y.square().sum(), exact)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pytorch_finds_nothing_wrong_with_the_operators(dtype: torch.dtype) -> None:
    w = pack(sparse(7, 20, 0))
    norm, x = norm_of(20, centred=True), torch.randn(3, 20).to(dtype)
    args = (x, w.values, w.structure, None, 7, "relu", None, norm)
    torch.library.opcheck(torch.ops.fanin.gather_matmul.default, args)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_the_reference_is_torchs_norm(size: int, centred: bool) -> None:
    x, norm = torch.randn(4, size), norm_of(size, centred=centred)
    assert_close_at_scale(normalise(x, norm).double(), normalised64(x, norm))


def test_without_weight_and_bias() -> None:
    x = torch.randn(4, 9)
    norm = pack_norm(9, None, None, 0.1, centred=True, dtype=torch.bfloat16)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(normalise(x, norm), F.layer_norm(x, (9,), eps=0.1))


@pytest.mark.parametrize("shape", [(20,), (2, 20), (3, 21), (1, 2, 21)])
def test_a_norm_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"norm must be \[2, in_features \+ 1 = 21\]"):
        call(pack(sparse(7, 20, 0)), torch.randn(2, 20), 7, torch.zeros(shape))
