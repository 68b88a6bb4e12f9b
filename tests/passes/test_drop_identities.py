from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.find_masked_layers import find_masked_layers
from tests.compile_support import randn
from tests.passes.support import context, graph_of, run


class _Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout(0.5, inplace=True)])

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        for layer in self.layers:
            h = layer(h)
        h = F.alpha_dropout(h, 0.5, training=False).to(torch.float32)
        h.mul_(2.0)  # what the identities return is their input, so this changes it
        return h + 1


def test_all_go_and_in_place_operations_still_meet_their_tensor() -> None:
    x = randn(2, 3, 4, 4)
    gm = graph_of(_Many(), x)
    run(gm, drop_identities, inputs=(x,))
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}
    assert targets == {"aten.add.Tensor", "aten.mul_.Tensor"}


def test_what_does_something_stays() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                *(F.dropout(x, 0.5, training=True), x.to(torch.float64), x.to(torch.float32, copy=True)),
                *(x.clone(), x.contiguous()),
            )

    x = randn(2, 4)
    gm = graph_of(Model(), x)
    before = [n.target for n in gm.graph.nodes]
    find_masked_layers(gm, context(gm))
    drop_identities(gm, context(gm))
    assert [n.target for n in gm.graph.nodes] == before
