from __future__ import annotations

import pytest
import torch
from torch import nn

from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.passes.spell_out_glu import spell_out_glu
from tests.compile_support import assert_equals_model, randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten


@pytest.mark.parametrize("dim", [-1, 2, 1])
def test_a_glu_of_a_masked_layer_becomes_a_product(dim: int) -> None:
    model, x = nn.Sequential(sparse_linear(64, 32, 6), nn.GLU(dim)), randn(3, 4, 64)
    gm = graph_of(model, x)
    result = run(gm, spell_out_glu, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("0", "glu written as a product")]
    assert not calls(gm, aten.glu.default)
    assert_equals_model(gm(x), model, x)


def test_leaves_a_glu_of_anything_else() -> None:
    model, x = nn.Sequential(sparse_linear(64, 32, 6), nn.LayerNorm(32), nn.GLU()), randn(3, 64)
    gm = graph_of(model, x)
    assert not run(gm, spell_out_glu, inputs=(x,)).rewritten
    assert len(calls(gm, aten.glu.default)) == 1


def test_neurons_without_inputs_go_with_their_gates() -> None:
    first, second = sparse_linear(64, 32, 6), sparse_linear(16, 8, 12)
    with torch.no_grad():
        for i in (3, 4, 9):
            first.weight[[i, 16 + i]] = 0.0
    model, x = nn.Sequential(first, nn.GLU(), second), randn(3, 64)
    gm = graph_of(model, x)
    result = run(gm, spell_out_glu, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [r.detail for r in result.rewritten] == ["32 -> 26 neurons"]
    assert_equals_model(gm(x), model, x)
