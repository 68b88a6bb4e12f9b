from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.graph import CONDENSED, LAYER
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.records import Skip
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten
gather_matmul = torch.ops.fanin.gather_matmul.default


@pytest.mark.parametrize("ablated", [0, 4, 32])
def test_swaps_the_sparse_linear_and_leaves_the_dense_one(ablated: int) -> None:
    model, x = nn.Sequential(sparse_linear(64, 32, 6, ablated=ablated), nn.Linear(32, 8)), randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, condense_linear, inputs=(x,))
    (node,) = calls(gm, gather_matmul)
    assert len(calls(gm, aten.linear.default)) == 1
    assert node.meta[LAYER].name == "0"
    assert node.meta[CONDENSED].n_ablated == ablated
    (rewrite,) = result.rewritten
    assert (rewrite.layer, rewrite.became) == ("0", "gather-matmul")
    parts = {name: buffer for name, buffer in gm.named_buffers() if not name.startswith("0.")}
    assert rewrite.bytes == sum(part.nbytes for part in parts.values())
    assert not any(str(n.target) == "0.weight" for n in gm.graph.find_nodes(op="get_attr"))


def test_the_gate_refuses_with_its_reason() -> None:
    x = randn(5, 64)
    gm = graph_of(sparse_linear(64, 32, 6), x)
    ctx = context(gm, gate=lambda layer: Skip(layer.name, "too small", {"batch": layer.batch}))
    result = run(gm, condense_linear, ctx=ctx, inputs=(x,))
    assert [str(s) for s in result.skipped] == ["too small (batch 5)"]
    assert not result.rewritten
    assert not calls(gm, gather_matmul)


def test_kernels_limits_are_named() -> None:
    x = randn(5, 64).double()
    gm = graph_of(sparse_linear(64, 32, 6).double(), x)
    result = run(gm, condense_linear, inputs=(x,))
    assert [str(s) for s in result.skipped] == ["no kernel for this dtype (dtype torch.float64)"]


def test_a_shared_weight_is_stored_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = sparse_linear(64, 64, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(self.a(x))
            return y

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    run(gm, condense_linear, inputs=(x,))
    first, second = calls(gm, gather_matmul)
    assert first.args[1:5] == second.args[1:5]


def test_values_in_another_dtype() -> None:
    model, x = sparse_linear(64, 32, 6), randn(5, 64)
    with torch.no_grad():
        model.weight.copy_(model.weight.bfloat16())  # so that nothing is lost
    gm = graph_of(model, x)
    run(gm, condense_linear, ctx=context(gm, values_dtype=torch.bfloat16), inputs=(x,))
    (values,) = (b for name, b in gm.named_buffers() if name.endswith("_values"))
    assert values.dtype == torch.bfloat16
