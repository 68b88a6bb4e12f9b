"""Condensed layers as modules: what they store, load and compute."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from fanin_compile import FormatError
from fanin_compile.condensed import CondensedWeight
from fanin_compile.layers import CondensedConv, CondensedLinear
from fanin_compile.packed import Packed, decode, unpack
from fanin_compile.packed_conv import ConvHeader
from tests.compile_support import (
    assert_equals_model,
    compiled,
    fan_in_mask,
    in_fp64,
    randn,
    recorded,
    sparse_weight,
)
from tests.helpers import assert_close_at_scale


def _linear(
    k: int = 6, *, shape: tuple[int, int] = (32, 64), ablated: int = 0, seed: int = 0, bias: bool = True
) -> CondensedLinear:
    weight = sparse_weight(*shape, k, ablated=ablated, seed=seed)
    return CondensedLinear(CondensedWeight.from_dense(weight), randn(shape[0]) if bias else None)


def _conv() -> CondensedConv:
    mask = fan_in_mask(8, 4 * 9, 5).view(8, 4, 3, 3)
    weight = CondensedWeight.from_dense(randn(8, 4, 3, 3), mask)
    return CondensedConv(weight, None, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)


def test_state_dict_holds_values_structure_and_bias() -> None:
    assert set(_linear().state_dict()) == {"values", "structure", "bias"}
    assert set(_linear(ablated=2, bias=False).state_dict()) == {"values", "structure"}


def test_prints_what_it_holds() -> None:
    text = repr(_linear(ablated=2))
    assert "CondensedLinear(CondensedWeight(32x64, fan-in 6, 91.2 % sparse, 2 ablated" in text
    assert text.endswith("bias=True)")


def test_the_weight_is_there_for_code_that_reads_it() -> None:
    layer = _linear(ablated=2)
    assert layer.bias is not None
    exact = nn.functional.linear(*in_fp64((randn(3, 64), layer.weight, layer.bias)))
    assert_close_at_scale(layer(randn(3, 64)), exact)
    assert (layer.in_features, layer.out_features) == (64, 32)


STRUCTURES = {
    "other values": _linear(seed=1),
    "other fan-in": _linear(9, seed=1),
    "ablated neurons": _linear(6, ablated=5, seed=1),
    "ragged": CondensedLinear(
        CondensedWeight.from_dense(sparse_weight(32, 64, 9, seed=2) * (randn(32, 64) > 0)), randn(32)
    ),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("start", [*STRUCTURES])
@pytest.mark.parametrize("structure", [*STRUCTURES])
def test_loads_a_checkpoint_of_any_structure(start: str, structure: str, assign: bool) -> None:
    layer, other, x = copy.deepcopy(STRUCTURES[start]), STRUCTURES[structure], randn(5, 64)
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(layer(randn(1, 64)), other(randn(1, 64)))
    assert torch.equal(layer.condensed.mask(), other.condensed.mask())


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_layer_follows_a_checkpoint_of_another_structure() -> None:
    layer, x = _linear(), randn(5, 64)
    f = compiled(layer)
    with recorded():
        f(x)
        for other in STRUCTURES.values():
            layer.load_state_dict(other.state_dict())
            assert_equals_model(f(x), other, x)


def _damaged(layer: CondensedLinear, part: str) -> Tensor:
    t: Tensor = layer.state_dict()[part].clone()
    t[0] += 1  # of the structure: its version
    return t


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": _damaged(_linear(), "structure")}, "structure is of version"),
        ({"structure": _linear().structure[:-64]}, "it was cut off"),
        ({"structure": _linear().structure.int()}, "structure is torch.int32"),
        ({"values": torch.randn(8)}, r"values has shape \(8,\), expected one dimension of at least"),
        ({"values": torch.randn(32, 6)}, r"values has shape \(32, 6\), expected one dimension"),
        (dict(_linear(shape=(16, 64)).state_dict()), r"a weight of shape \(16, 64\), expected \(32, 64\)"),
        (dict(_linear(shape=(32, 65)).state_dict()), r"a weight of shape \(32, 65\), expected \(32, 64\)"),
    ],
    ids=["version", "cut off", "dtype", "few values", "values of two dimensions", "out", "in"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    changes: dict[str, Tensor], message: str, assign: bool
) -> None:
    model, x = nn.Sequential(_linear()), randn(5, 64)
    before = model(x)
    state = dict(model.state_dict()) | {f"0.{name}": t for name, t in changes.items()}
    with pytest.raises(FormatError, match=rf"state_dict entries 0\.\*: .*{message}"):
        model.load_state_dict(state, assign=assign)
    assert torch.equal(model(x), before), "half loaded"


def test_a_damaged_convolution_is_refused_by_name() -> None:
    model = nn.Sequential(_conv())
    state = dict(model.state_dict())
    structure = state["0.structure"]
    header = ConvHeader.read(structure)
    for change, message in (
        (structure[:-64], "it was cut off"),
        (
            structure.index_fill(0, torch.arange(header.codes_at, header.codes_at + 2), 255),
            "codes of the structure",
        ),
        (structure.index_fill(0, torch.tensor([0]), 9), "is of version 0x"),
    ):
        with pytest.raises(FormatError, match=rf"state_dict entries 0\.\*: .*{message}"):
            model.load_state_dict(state | {"0.structure": change})


def test_missing_entries_are_reported_as_torch_does() -> None:
    layer = _linear()
    state = {name: t for name, t in layer.state_dict().items() if name != "structure"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "structure"'):
        layer.load_state_dict(state)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["structure"], [])


@pytest.mark.parametrize("structure", [*STRUCTURES])
def test_copies_and_pickles_are_layers_of_their_own(structure: str) -> None:
    layer, x = STRUCTURES[structure], randn(5, 64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False))
    for other in copies:
        assert torch.equal(other(x), layer(x))
        assert repr(other) == repr(layer)
        with torch.no_grad():
            other.values.zero_()
            other.structure.zero_()
    assert float(layer(x).abs().sum()) > 0
    assert torch.equal(layer.condensed.mask(), STRUCTURES[structure].condensed.mask())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_another_dtype_converts_values_and_leaves_the_structure(dtype: torch.dtype) -> None:
    layer, x = _linear(ablated=3), randn(5, 64).to(dtype)
    moved = copy.deepcopy(layer).to(dtype)
    assert (moved.values.dtype, moved.structure.dtype) == (dtype, torch.uint8)
    assert torch.equal(moved.structure, layer.structure)
    assert torch.equal(moved.weight, layer.weight.to(dtype))
    y = moved(x)
    assert y.dtype == dtype
    assert moved.bias is not None
    expected = nn.functional.linear(x.double(), moved.weight.double(), moved.bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)
    back = moved.double()
    assert torch.equal(back.condensed.mask(), layer.condensed.mask())


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_computes_and_returns_its_dtype(grad: bool) -> None:
    layer, x = _linear(ablated=3), randn(5, 64)
    layer.requires_grad_(grad)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
    if grad:
        y.float().square().sum().backward()
        assert layer.values.grad is not None
        assert layer.values.grad.dtype == torch.float32
    double = layer.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert double(x.double()).dtype == torch.float64


@pytest.mark.parametrize("batch", [1, 5])
def test_gradients_equal_those_of_the_masked_dense_layer(batch: int) -> None:
    condensed = STRUCTURES["ragged"].condensed
    layer = CondensedLinear(condensed, randn(32).requires_grad_(), requires_grad=True)
    dense = nn.Linear(64, 32, dtype=torch.float64)
    assert layer.bias is not None
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        dense.bias.copy_(layer.bias)
    x, z = randn(batch, 64).requires_grad_(), randn(batch, 64).double().requires_grad_()
    layer(x).square().sum().backward()
    dense(z).square().sum().backward()
    assert_close_at_scale([x.grad, layer.bias.grad], [z.grad, dense.bias.grad])
    assert layer.values.grad is not None
    assert dense.weight.grad is not None
    by_weight = unpack(Packed(layer.values.grad, layer.structure)).to_dense()
    assert_close_at_scale(by_weight, dense.weight.grad * condensed.mask())


def test_a_frozen_layer_wants_no_gradient() -> None:
    layer = _linear()
    assert not layer.values.requires_grad
    assert not layer(randn(5, 64)).requires_grad
    x = randn(5, 64).requires_grad_()
    layer(x).sum().backward()
    assert_close_at_scale(x.grad, layer.weight.double().sum(0).expand(5, 64))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_training_keeps_the_structure(weight_decay: float) -> None:
    """What fills up groups gets no gradient, so that values stay 0 there under any optimizer."""
    weight = CondensedWeight.from_dense(sparse_weight(32, 64, 6, ablated=3))
    layer = CondensedLinear(weight, randn(32), requires_grad=True)
    before = layer.condensed.mask()
    _, _, entry = decode(layer.structure)
    filler = torch.ones(len(layer.values), dtype=torch.bool)
    filler[entry] = False
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=weight_decay)
    losses = []
    for _ in range(3):
        loss = layer(randn(5, 64)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(layer.condensed.mask(), before)
    assert not layer.values.detach()[filler].any()


def test_a_convolution_prints_its_geometry() -> None:
    layer = _conv()
    assert repr(layer).endswith("bias=False, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)")
    x, weight = in_fp64((randn(2, 8, 9, 9), layer.weight))
    exact = nn.functional.conv2d(x, weight, None, 2, 1, 1, 2)
    assert_close_at_scale(layer(randn(2, 8, 9, 9)), exact)
