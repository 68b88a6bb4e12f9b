from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fanin_compile.graph import CONDENSED, LAYER, attr_tensor
from fanin_compile.packed import Header, Packed, unpack
from fanin_compile.packing import pack
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.records import Skip
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten
gather_matmul = torch.ops.fanin.gather_matmul.default


def _packed(gm: fx.GraphModule, node: fx.Node) -> tuple[Tensor, Tensor]:
    """The values and the structure that a gather-matmul reads."""
    _, values, structure, *_ = node.all_input_nodes
    return attr_tensor(gm, str(values.target)), attr_tensor(gm, str(structure.target))


@pytest.mark.parametrize("ablated", [0, 4, 32])
def test_swaps_the_sparse_linear_and_leaves_the_dense_one(ablated: int) -> None:
    layer, x = sparse_linear(64, 32, 6, ablated=ablated), randn(5, 64)
    model = nn.Sequential(layer, nn.Linear(32, 8))
    gm = graph_of(model, x)
    result = run(gm, condense_linear, inputs=(x,))
    (node,) = calls(gm, gather_matmul)
    bias = next(n for n in gm.graph.find_nodes(op="get_attr") if str(n.target) == "0.bias")
    assert len(calls(gm, aten.linear.default)) == 1
    assert node.meta[LAYER].name == "0"
    assert node.meta[CONDENSED].n_ablated == ablated
    (rewrite,) = result.rewritten
    assert (rewrite.layer, rewrite.became) == ("0", "gather-matmul")
    values, structure = _packed(gm, node)
    assert rewrite.bytes == values.nbytes + structure.nbytes
    assert torch.equal(unpack(Packed(values, structure)).to_dense(), layer.weight)
    assert node.args[3:] == (bias, 32)
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
    assert first.args[1:3] == second.args[1:3]
    names = [name for name, _ in gm.named_buffers()]
    assert sum(name.endswith("_structure") for name in names) == 1, names


def test_values_in_another_dtype() -> None:
    model, x = sparse_linear(64, 32, 6), randn(5, 64)
    with torch.no_grad():
        model.weight.copy_(model.weight.bfloat16())  # so that nothing is lost
    gm = graph_of(model, x)
    run(gm, condense_linear, ctx=context(gm, values_dtype=torch.bfloat16), inputs=(x,))
    (values,) = (b for name, b in gm.named_buffers() if name.endswith("_values"))
    assert values.dtype == torch.bfloat16


def test_a_layer_whose_packing_is_refused_stays_dense() -> None:
    x = randn(5, 64)
    gm = graph_of(sparse_linear(64, 32, 6), x)
    ctx = context(gm, pack=lambda weight, layer: Skip(layer.name, "was measured", {"fan-in": weight.fan_in}))
    result = run(gm, condense_linear, ctx=ctx, inputs=(x,))
    assert [str(s) for s in result.skipped] == ["was measured (fan-in 6)"]
    assert not result.rewritten
    assert not calls(gm, gather_matmul)


def test_the_packing_is_the_contexts_and_its_words_are_in_the_report() -> None:
    x = randn(5, 64)
    gm = graph_of(sparse_linear(64, 32, 6), x)
    ctx = context(gm, pack=lambda weight, layer: (pack(weight, width=7), f"seven for {layer.name}"))
    result = run(gm, condense_linear, ctx=ctx, inputs=(x,))
    assert [rewrite.detail for rewrite in result.rewritten] == [f"seven for {result.rewritten[0].layer}"]
    (node,) = calls(gm, gather_matmul)
    _, structure = _packed(gm, node)
    assert Header.read(structure).width == 7
