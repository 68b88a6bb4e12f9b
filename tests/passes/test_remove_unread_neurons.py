from __future__ import annotations

import torch
from torch import Tensor, nn

from fanin_compile.graph import CONDENSED
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten


class _Residual(nn.Module):
    """Two layers whose outputs are added: both must be free of a neuron before it can go."""

    def __init__(self, *, ablated: tuple[int, int], tail: nn.Module) -> None:
        super().__init__()
        self.a, self.b = (sparse_linear(64, 32, 6, ablated=n, seed=n) for n in ablated)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x)) + self.b(x)
        y: Tensor = self.tail(h)
        return y


def _shapes(gm: torch.fx.GraphModule) -> list[tuple[int, ...]]:
    return [node.meta[CONDENSED].shape for node in calls(gm, aten.linear.default)]


def test_drops_ablated_neurons_from_both_layers() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.SiLU(), sparse_linear(32, 16, 20))
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("0", "32 -> 28 neurons")]
    assert _shapes(gm) == [(28, 64), (16, 28)]
    (silu,) = calls(gm, aten.silu.default)
    assert tuple(silu.meta["val"].shape) == (5, 28)


def test_a_residual_add_binds_its_neurons() -> None:
    x = randn(5, 64)
    gm = graph_of(_Residual(ablated=(6, 3), tail=sparse_linear(32, 16, 20)), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(29, 64), (29, 64), (16, 29)]  # ablated in both: the last 3


def test_what_is_seen_whole_stays_and_says_so() -> None:
    x = randn(5, 64)
    for tail in (nn.Identity(), nn.Sequential(nn.LayerNorm(32), sparse_linear(32, 16, 20)), nn.Softmax(-1)):
        gm = graph_of(_Residual(ablated=(4, 4), tail=tail), x)
        result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
        assert result.rewritten == ()
        assert {(s.layer, s.values["ablated"]) for s in result.skipped} == {("a", 8), ("b", 8)}
        assert all(s.reason.startswith("ablated neurons stay: ") for s in result.skipped)


def test_a_dense_reader_stays_whole() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.ReLU(), nn.Linear(32, 16))
    x = randn(5, 64)
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    (dense,) = (n for n in calls(gm, aten.linear.default) if CONDENSED not in n.meta)
    assert tuple(dense.meta["val"].shape) == (5, 16)


def test_nothing_ablated_nothing_removed() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6), nn.ReLU(), sparse_linear(32, 16, 30))
    x = randn(5, 64)
    gm = graph_of(model, x)
    assert run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,)).rewritten == ()
    assert _shapes(gm) == [(32, 64), (16, 32)]
