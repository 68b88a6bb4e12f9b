from __future__ import annotations

import torch
from torch import Tensor, nn

from fanin_compile.graph import CONDENSED
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from tests.compile_support import fan_in_mask, randn, sparse_linear
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


class _Pooled(nn.Module):
    """A convolution, 4 of its 32 neurons ablated, pooled to `size` and flattened for a linear layer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 32, 3)
        with torch.no_grad():
            self.conv.weight.flatten(1).mul_(fan_in_mask(32, 72, 9, ablated=4))
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.head = sparse_linear(32 * size**2, 16, 20 * size**2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.pool(torch.relu(self.conv(x))).flatten(1))
        return y


def test_neurons_go_through_global_pooling_and_flatten() -> None:
    x = randn(2, 8, 9, 9)
    gm = graph_of(_Pooled(1), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("conv", "32 -> 28 neurons")]
    assert _shapes(gm) == [(16, 28)]
    (flatten,) = calls(gm, aten.flatten.using_ints)
    assert tuple(flatten.meta["val"].shape) == (2, 28)


def test_a_flatten_of_more_than_one_position_pins_the_channels() -> None:
    x = randn(2, 8, 9, 9)
    gm = graph_of(_Pooled(2), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert result.rewritten == ()
    assert ["flatten" in s.reason for s in result.skipped] == [True]


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
