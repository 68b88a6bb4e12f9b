"""Removing neurons through slices, pieces, concatenations and repetitions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fanin_compile.graph import CONDENSED
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from tests.compile_support import any_type, assert_equals_model, randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten
WIDTH = 24


class Between(nn.Module):
    """A masked layer of 24 neurons, those of `dead` ablated, something, a masked layer."""

    def __init__(self, between: Callable[[Tensor], Tensor], dead: list[int], *, ndim: int = 2) -> None:
        super().__init__()
        self.a, self.between = sparse_linear(16, WIDTH, 6), between
        with torch.no_grad():
            self.a.weight[dead] = 0
        features = between(torch.zeros(2, *[3] * (ndim - 2), WIDTH)).shape[-1]
        self.b = sparse_linear(features, 8, max(1, features * 3 // 4), seed=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.between(self.a(x)))
        return y


def _gate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return torch.sigmoid(gate) * up


def _three(h: Tensor) -> Tensor:
    a, b, c = torch.split(h, 8, dim=-1)
    return a * b + c.tanh()


def _strided(h: Tensor) -> Tensor:
    return torch.cat([h[:, ::2], h[:, 1::2]], -1)


def _shuffled(h: Tensor) -> Tensor:
    """Channel shuffle of 4 groups."""
    return h.view(-1, 4, 6).transpose(1, 2).reshape(-1, 24)


def _with_input(h: Tensor) -> Tensor:
    return torch.cat([h, h.softmax(-1)], -1)


GIVEN_UP = range(0, 24, 6)  # 0, 6, 12, 18

# name -> what stands between the layers, and how many of the 24 neurons are left after those of GIVEN_UP died
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "slice": (lambda h: h[:, 4:20], 13),  # 0 to 3 and 20 to 23 are read by nobody; 6, 12 and 18 are dead
    "negative slice": (lambda h: h[:, -20:-2], 15),
    "one neuron": (lambda h: h[:, 5:6], 1),
    "select and back": (lambda h: torch.stack([h[:, 5], h[:, 7]], -1), 24),
    "narrow": (lambda h: h.narrow(1, 2, 9), 8),
    "gate": (_gate, 20),  # a neuron goes with its gate: 0 and 12, 6 and 18
    "pieces": (_three, 24),
    "two pieces put together": (lambda h: torch.cat(h.chunk(3, -1)[::2], -1), 13),
    "cat with itself": (lambda h: torch.cat([h, h.relu()], -1), 20),
    "cat with another": (_with_input, 24),
    "heads, one of which is sliced": (lambda h: h.view(-1, 4, 6)[:, 1:3].flatten(1), 20),
    "a slice of every head": (lambda h: h.view(-1, 4, 6)[:, :, 1:4].flatten(1), 12),
    "expanded": (lambda h: h[:, None].expand(-1, 3, -1).flatten(1), 20),
    "repeated": (lambda h: h.repeat(1, 2), 20),
    "mean of others": (lambda h: h[:, None].expand(-1, 3, -1).mean(1), 20),
    "unflatten, unbind": (lambda h: torch.cat(h.unflatten(1, (2, 12)).unbind(1)[::-1], 1), 20),
    "squeezed": (lambda h: h[:, None].squeeze(1).unsqueeze(0).squeeze(), 20),
    "every other": (_strided, 24),
    "shuffle": (_shuffled, 24),
    "roll": (lambda h: h.roll(1, -1), 24),
}


@pytest.mark.parametrize("name", CASES)
def test_slices_and_concatenations(name: str) -> None:
    between, left = CASES[name]
    x = randn(5, 16)
    gm = graph_of(Between(between, list(GIVEN_UP)), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[CONDENSED].shape == (left, 16)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(CASES)), st.sets(st.integers(0, WIDTH - 1)))
def test_any_neurons_may_be_ablated(name: str, dead: set[int]) -> None:
    x = randn(5, 16)
    model = Between(CASES[name][0], sorted(dead))
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    with torch.no_grad():
        assert_equals_model(gm(x), model, x)


class _Dense(nn.Module):
    """DenseNet's pattern: every layer reads all before it."""

    def __init__(self, dead: dict[int, list[int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(sparse_linear(16 + 8 * i, 8, 15 + 8 * i, seed=i) for i in range(4))
        with torch.no_grad():
            for i, rows in dead.items():
                any_type(self.layers[i]).weight[rows] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = torch.cat([h, torch.relu(layer(h))], -1)
        return h[:, -8:]


def test_a_neuron_that_many_layers_read_leaves_all_of_them() -> None:
    x = randn(5, 16)
    gm = graph_of(_Dense({0: [1, 2], 1: [7], 2: [0, 1, 2]}), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    kept = [node.meta[CONDENSED].shape for node in calls(gm, aten.linear.default)]
    assert [shape[1] for shape in kept] == [16, 16 + 6, 16 + 6 + 7, 16 + 6 + 7 + 5]
    assert kept[3][0] == 8  # seen by the output


def test_a_split_keeps_its_pieces_whole_where_the_rest_sees_them() -> None:
    x = randn(5, 16)

    def between(h: Tensor) -> Tensor:
        a, b = h.split([10, 14], -1)
        return torch.cat([a, b.cumsum(-1)], -1)

    gm = graph_of(Between(between, list(GIVEN_UP)), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[CONDENSED].shape == (22, 16)  # 0 and 6
    assert [(s.layer, s.values) for s in result.skipped] == [("a", {"ablated": 2})]
    assert "cumsum" in result.skipped[0].reason


def test_positions_of_different_heads_are_narrowed_alike() -> None:
    """A constant added to [B, H, D] is selected from for each head."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(16, 24, 6), sparse_linear(24, 8, 16, seed=1)
            self.offset, self.same = nn.Parameter(randn(4, 6)), nn.Parameter(randn(6, seed=2))
            with torch.no_grad():
                self.b.weight[:, [0, 1, 7, 8, 12, 17, 22, 23]] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).view(-1, 4, 6) + self.offset
            y: Tensor = self.b((h * self.same).flatten(1))
            return y

    x = randn(5, 16)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[CONDENSED].shape == (16, 16)


def test_one_position_alone() -> None:
    x = randn(16)
    model = nn.Sequential(sparse_linear(16, 24, 6, ablated=4), nn.Tanh(), sparse_linear(24, 8, 20, seed=1))
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[CONDENSED].shape == (20, 16)


def test_a_vector_for_a_weight_reads_all_and_has_no_neurons() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.vector = sparse_linear(16, 24, 6, ablated=4), nn.Parameter(randn(24))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.a(x), self.vector)

    x = randn(5, 16)
    result = run(graph_of(Model(), x), fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert ["is read whole by linear" in s.reason for s in result.skipped] == [True]


def _in_place(h: Tensor) -> Tensor:
    h[:, 4:20] *= 2.0
    return h.relu_()


def _filled(h: Tensor) -> Tensor:
    h[:, 3:9] = 7.0
    return h


@pytest.mark.parametrize("between", [_in_place, _filled])
def test_writes_into_slices(between: Callable[[Tensor], Tensor]) -> None:
    x = randn(5, 16)
    model = Between(between, list(GIVEN_UP))
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    with torch.no_grad():
        assert_equals_model(gm(x), model, x)
