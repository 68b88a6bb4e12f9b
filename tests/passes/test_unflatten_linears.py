from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.graph import LAYER
from fanin_compile.passes.unflatten_linears import unflatten_linears
from tests.compile_support import randn, sparse_weight
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten


class _Flattens(nn.Module):
    def __init__(self, how: str, *, sparse: bool = True) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(sparse_weight(32, 64, 6) if sparse else randn(32, 64))
        self.bias = nn.Parameter(randn(32))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 64)
        h = F.linear(flat, self.weight, self.bias)
        if self.how == "write":
            flat.mul_(2.0)
            return h.view(2, 5, 32)
        if self.how == "read":
            return h.view(2, 5, 32) + h.sum()
        return h.view({"back": (2, 5, 32), "other": (5, 2, 32), "wide": (2, 160)}[self.how])


def test_works_on_the_unflattened_input() -> None:
    x = randn(2, 5, 64)
    gm = graph_of(_Flattens("back"), x)
    result = run(gm, unflatten_linears, inputs=(x,))
    (node,) = calls(gm, aten.linear.default)
    assert node.args[0].op == "placeholder"  # type: ignore[union-attr]
    assert tuple(node.meta["val"].shape) == (2, 5, 32)
    assert node.meta[LAYER].batch == 10
    assert [(r.became, r.detail) for r in result.rewritten] == [("linear", "works on its unflattened input")]
    assert not calls(gm, aten.view.default)


def test_leaves_other_shapes_other_readers_and_dense_layers() -> None:
    x = randn(2, 5, 64)
    for model in (_Flattens("other"), _Flattens("wide"), _Flattens("read"), _Flattens("back", sparse=False)):
        gm = graph_of(model, x)
        assert run(gm, unflatten_linears, inputs=(x,)).rewritten == ()
        (node,) = calls(gm, aten.linear.default)
        assert node.args[0].op == "call_function"  # type: ignore[union-attr]


def test_leaves_an_input_that_is_written_to_before_the_view_back() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flattens = _Flattens("write")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.flattens(x * 1.0)
            return y

    x = randn(2, 5, 64)
    gm = graph_of(Model(), x)
    assert run(gm, unflatten_linears, inputs=(x,)).rewritten == ()
