from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fanin_compile.graph import CONDENSED
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from tests.compile_support import any_type, randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten


def _columns(gm: torch.fx.GraphModule, index: int) -> Tensor:
    """bool [in]: which inputs the index-th linear reads."""
    mask: Tensor = calls(gm, aten.linear.default)[index].meta[CONDENSED].mask()
    return mask.any(0)


def test_inputs_from_ablated_neurons_go_into_the_bias() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.GELU(), sparse_linear(32, 16, 20))
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("2", "4 constant inputs folded")]
    assert _columns(gm, 1).tolist() == [True] * 28 + [False] * 4
    assert tuple(calls(gm, aten.linear.default)[1].meta["val"].shape) == (5, 16)


def test_neurons_left_without_inputs_fold_in_their_turn() -> None:
    second = sparse_linear(32, 16, 3)
    with torch.no_grad():
        second.weight[0] = 0
        second.weight[0, 29:] = 1.0  # reads ablated neurons alone
    model = nn.Sequential(
        sparse_linear(64, 32, 6, ablated=4), nn.ReLU(), second, nn.Tanh(), sparse_linear(16, 8, 12)
    )
    x = randn(5, 64)
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, inputs=(x,))
    assert calls(gm, aten.linear.default)[1].meta[CONDENSED].n_ablated == 1
    assert not _columns(gm, 2)[0]


def test_a_zero_inside_the_mask_is_no_ablation() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = any_type(nn.Linear(64, 32)), sparse_linear(32, 16, 20)
            mask = torch.zeros(32, 64, dtype=torch.bool)
            mask[:, :3] = True
            prune.custom_from_mask(self.a, "weight", mask)
            with torch.no_grad():
                self.a.weight_orig[0, 0], self.a.weight_orig[0, 1], self.a.weight_orig[0, 2] = 1.0, -1.0, 0.0

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x)))
            return y

    x = randn(5, 64)
    gm = graph_of(Masked(), x)
    assert run(gm, fold_constant_channels, inputs=(x,)).rewritten == ()


def test_layer_norm_ends_the_trail() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.LayerNorm(32), sparse_linear(32, 16, 20))
    x = randn(5, 64)
    assert run(graph_of(model, x), fold_constant_channels, inputs=(x,)).rewritten == ()


def _convs(padding: int, *, bias: bool) -> nn.Sequential:
    first, second = nn.Conv2d(3, 8, 3, bias=bias), nn.Conv2d(8, 4, 3, padding=padding)
    for conv in (first, second):
        prune.random_unstructured(conv, "weight", 0.5)
        prune.remove(conv, "weight")
    with torch.no_grad():
        first.weight[2] = 0
    return nn.Sequential(first, nn.ReLU(), second)


def test_a_padded_convolution_folds_only_zeros() -> None:
    torch.manual_seed(0)
    x = randn(2, 3, 8, 8)
    for padding, bias, folded in ((0, True, 1), (1, False, 1), (1, True, 0)):
        model = any_type(_convs(padding, bias=bias))
        if bias:
            with torch.no_grad():
                model[0].bias[2] = 1.0
        result = run(graph_of(model, x), fold_constant_channels, inputs=(x,))
        assert len(result.rewritten) == folded, (padding, bias)
        reasons = [s.reason for s in result.skipped]
        assert reasons == ([] if folded else ["constant inputs stay: padding makes the border differ"])


def _through_a_view(h: Tensor) -> Tensor:
    h.view(-1).mul_(0.5)
    return h


def _through_a_slice(h: Tensor) -> Tensor:
    h[:, 3:30] = 7.0
    return h


def _seen_by_an_earlier_view(h: Tensor) -> Tensor:
    view = h.view(-1, 32)
    h.add_(2.0)
    return view


def _seen_by_dropout(h: Tensor) -> Tensor:
    same = F.dropout(h, 0.5, training=False)
    h.mul_(-1.0)
    return same


def _through_a_transpose(h: Tensor) -> Tensor:
    h.t().exp_()
    return h.tanh()


@pytest.mark.parametrize(
    "between",
    [_through_a_view, _through_a_slice, _seen_by_an_earlier_view, _seen_by_dropout, _through_a_transpose],
)
def test_a_neuron_written_to_by_another_name_is_not_constant(between: Callable[[Tensor], Tensor]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 32, 6, ablated=4), sparse_linear(32, 16, 20)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(between(self.a(x)))
            return y

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    assert run(gm, fold_constant_channels, inputs=(x,)).rewritten == ()


def test_a_function_in_place_is_followed() -> None:
    model = nn.Sequential(
        sparse_linear(64, 32, 6, ablated=4), nn.ReLU(inplace=True), sparse_linear(32, 16, 20)
    )
    x = randn(5, 64)
    gm = graph_of(model, x)
    assert len(run(gm, fold_constant_channels, inputs=(x,)).rewritten) == 1


def test_a_layer_called_with_the_same_constants_is_folded_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 32, 6, ablated=4), sparse_linear(32, 16, 20)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h, other = self.a(x), self.a(-x)
            return self.b(h.relu()), self.b(other.relu()), self.b(h.tanh())

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    assert len(run(gm, fold_constant_channels, inputs=(x,)).rewritten) == 3
    first, second, third = (node.args[1:3] for node in calls(gm, aten.linear.default)[2:])
    assert first == second
    assert first[0] is not third[0]  # tanh is another constant
    assert not set(first) & set(third)
