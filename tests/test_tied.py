"""Tied weights through condense(): stored once, tied in the copy, and never a copy that is larger than the model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fanin_compile
from fanin_compile import condense
from fanin_compile.layers import CondensedLinear
from tests.compile_support import any_type, fan_in_mask, randn, sparse_linear
from tests.helpers import assert_close_at_scale


def _bytes(model: nn.Module) -> int:
    """Of every tensor once, whoever holds it."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())


def _pair() -> nn.Sequential:
    a, b = sparse_linear(64, 64, 6), sparse_linear(64, 64, 6, seed=1)
    b.weight = a.weight
    return nn.Sequential(a, nn.ReLU(), b).eval()


def test_tied_layers_stay_tied() -> None:
    model, x = _pair(), randn(5, 64)
    condensed = any_type(condense(model))
    a, b = condensed[0], condensed[2]
    assert isinstance(a, CondensedLinear)
    assert isinstance(b, CondensedLinear)
    assert a.values is b.values
    assert a.structure is b.structure
    assert a.bias is not b.bias
    assert len(list(condensed.parameters())) == 3
    assert _bytes(condensed) < _bytes(model)
    assert_close_at_scale(condensed(x), copy.deepcopy(model).double()(x.double()))
    again = copy.deepcopy(condensed)
    assert again[0].values is again[2].values


def test_the_state_of_tied_layers_travels() -> None:
    condensed, x = condense(_pair()), randn(5, 64)
    buffer = io.BytesIO()
    torch.save(condensed.state_dict(), buffer)
    buffer.seek(0)
    other = any_type(condense(_pair()))
    with torch.no_grad():
        other[0].values.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), condensed(x))
    assert other[0].values is other[2].values


def test_a_tied_weight_trains_as_one() -> None:
    model, x = _pair(), randn(5, 64)
    condensed = any_type(condense(model))
    model(x).square().sum().backward()
    condensed(x).square().sum().backward()
    expected = any_type(model[0]).weight.grad[any_type(model[0]).weight != 0]
    got = condensed[0].values.grad
    assert_close_at_scale(got[got != 0].sort().values, expected[expected != 0].sort().values.double())


def test_layers_of_one_weight_with_different_masks_are_two() -> None:
    a, b = nn.Linear(64, 64), nn.Linear(64, 64)
    b.weight = a.weight
    model, x = nn.Sequential(a, b).eval(), randn(5, 64)
    masks = {"0": fan_in_mask(64, 64, 6), "1": fan_in_mask(64, 64, 6, seed=1)}
    exact = any_type(copy.deepcopy(model).double())
    exact[1].weight = nn.Parameter(exact[0].weight * masks["1"])
    exact[0].weight = nn.Parameter(exact[0].weight * masks["0"])
    condensed = any_type(condense(model, masks=masks))
    assert condensed[0].values is not condensed[1].values
    assert_close_at_scale(condensed(x), exact(x.double()))


class _Tagger(nn.Module):
    def __init__(self, *, head_first: bool = False) -> None:
        super().__init__()
        if not head_first:
            self.embedding = nn.Embedding(200, 64)
        self.head = sparse_linear(64, 200, 6, bias=False)
        if head_first:
            self.embedding = nn.Embedding(200, 64)
        self.embedding.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embedding(tokens))
        return y


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_tied_to_an_embedding_stays_dense_for_a_reason(head_first: bool) -> None:
    model, tokens = _Tagger(head_first=head_first).eval(), torch.arange(9)
    condensed = any_type(condense(model))
    exported = condense(model, example_inputs=(tokens,))
    assert condensed.head.weight is condensed.embedding.weight
    assert _bytes(condensed) == _bytes(exported) == _bytes(model)
    assert torch.equal(exported(tokens), model(tokens))
    (row,) = fanin_compile.explain(exported).layers
    assert row.reason.startswith(
        "would not shrink, another module keeps its dense weight (tied to embedding, "
    )
    for report in (fanin_compile.explain(model), fanin_compile.explain(condensed)):
        (row,) = report.layers
        assert row.reason.startswith(
            "would not shrink, another module keeps its dense weight (tied to embedding, bytes "
        )
        assert row.reason.endswith("dense 51200)")


def test_a_layer_tied_to_one_that_is_filtered_stays_dense() -> None:
    condensed = any_type(condense(_pair(), filter_fn=lambda module, name: name != "0"))
    assert condensed[0].weight is condensed[2].weight


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_mask_beside_a_tied_weight_decides(pruned: bool, graph: bool) -> None:
    model, tokens, mask = _Tagger().eval(), torch.arange(9), fan_in_mask(200, 64, 3)
    with torch.no_grad():
        model.head.weight.normal_()
        exact = nn.functional.linear(model.embedding(tokens).double(), (model.head.weight * mask).double())
    if pruned:
        prune.custom_from_mask(model.head, "weight", mask)
    inputs = (tokens,) if graph else None
    condensed = any_type(condense(model, masks=None if pruned else {"head": mask}, example_inputs=inputs))
    assert [row.became for row in fanin_compile.explain(condensed).layers] == ["gather-matmul"]
    assert_close_at_scale(condensed(tokens), exact)
