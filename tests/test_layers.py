"""Condensed layers as modules: what they store, load and compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fanin_compile import FormatError
from fanin_compile.condensed import CondensedWeight
from fanin_compile.layers import CondensedConv, CondensedLinear
from tests.compile_support import compiled, fan_in_mask, randn, recorded, sparse_weight


def _linear(k: int = 6, *, ablated: int = 0, seed: int = 0, bias: bool = True) -> CondensedLinear:
    weight = sparse_weight(32, 64, k, ablated=ablated, seed=seed)
    return CondensedLinear(CondensedWeight.from_dense(weight), randn(32) if bias else None)


def test_state_dict_holds_the_parts_that_exist_and_no_plan() -> None:
    assert set(_linear().state_dict()) == {"values", "indices", "bias"}
    assert set(_linear(ablated=2, bias=False).state_dict()) == {"values", "indices", "rows"}
    ragged = CondensedWeight.from_dense(torch.tensor([[1.0, 0, 2], [0, 3, 0]]))
    assert set(CondensedLinear(ragged, None).state_dict()) == {"values", "indices", "row_ptr"}


def test_prints_what_it_holds() -> None:
    text = repr(_linear(ablated=2))
    assert "CondensedLinear(CondensedWeight(32x64, fan-in 6, 91.2 % sparse, 2 ablated" in text
    assert text.endswith("bias=True)")


def test_the_weight_is_there_for_code_that_reads_it() -> None:
    layer = _linear(ablated=2)
    torch.testing.assert_close(
        layer(randn(3, 64)), nn.functional.linear(randn(3, 64), layer.weight, layer.bias)
    )
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
    import copy

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
            torch.testing.assert_close(f(x), other(x))


def test_a_damaged_checkpoint_is_refused_by_name() -> None:
    model = nn.Sequential(_linear())
    state = dict(model.state_dict())
    state["0.indices"] = state["0.indices"].clone()
    state["0.indices"][0, -1] = 64
    with pytest.raises(FormatError, match=r"state_dict entries 0\.\*: indices run from 0 to 64"):
        model.load_state_dict(state)


def test_missing_entries_are_reported_as_torch_does() -> None:
    layer = _linear()
    state = {name: t for name, t in layer.state_dict().items() if name != "indices"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "indices"'):
        layer.load_state_dict(state)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["indices"], [])


def test_training_keeps_the_structure() -> None:
    layer = CondensedLinear(
        CondensedWeight.from_dense(sparse_weight(32, 64, 6)), randn(32), requires_grad=True
    )
    before = layer.condensed.mask()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    loss = layer(randn(5, 64)).square().sum()
    loss.backward()
    optimizer.step()
    assert float(layer(randn(5, 64)).square().sum()) < float(loss)
    assert torch.equal(layer.condensed.mask(), before)


def test_a_convolution_prints_its_geometry() -> None:
    mask = fan_in_mask(8, 4 * 9, 5).view(8, 4, 3, 3)
    weight = CondensedWeight.from_dense(randn(8, 4, 3, 3), mask)
    layer = CondensedConv(weight, None, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)
    assert repr(layer).endswith("bias=False, stride=(2, 2), padding=(1, 1), dilation=(1, 1), groups=2)")
    expected = nn.functional.conv2d(randn(2, 8, 9, 9), layer.weight, None, 2, 1, 1, 2)
    torch.testing.assert_close(layer(randn(2, 8, 9, 9)), expected)
