"""Topology updates: by eye on small matrices, by property on random ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile.train import topology
from fanin_compile.train.topology import constant_fan_in_update, unstructured_update


def test_a_neuron_swaps_its_smallest_weight_for_its_largest_gradient() -> None:
    weight = torch.tensor([[5.0, 1.0, 0.0, 0.0], [0.0, 4.0, 3.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.1, 9.0], [2.0, 0.0, 0.0, 1.0]])
    mask = weight != 0
    new = constant_fan_in_update(
        weight, gradient, mask, fraction=0.25, active_weights=4, min_salient=None
    )  # one of the four goes: the 1; its neuron grows where the gradient is 9
    assert new.int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0]]


def test_a_weight_dropped_may_grow_again_in_the_same_update() -> None:
    weight = torch.tensor([[5.0, 1.0, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 9.0, 1.0, 1.0]])
    new = constant_fan_in_update(
        weight, gradient, weight != 0, fraction=0.5, active_weights=2, min_salient=None
    )
    assert new.int().tolist() == [[1, 1, 0, 0]]


def test_a_neuron_without_salient_weights_is_ablated_and_the_others_share_its_budget() -> None:
    weight = torch.tensor([[5.0, 6.0, 0.0, 0.0], [0.1, 0.2, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 8.0, 7.0], [0.3, 0.0, 0.0, 0.0]])
    # keep 2 (5 and 6), prune 2 (8 and 7): the second neuron has nothing salient
    new = constant_fan_in_update(
        weight, gradient, weight != 0, fraction=0.5, active_weights=4, min_salient=0.5
    )
    assert new.int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def test_ablation_never_leaves_fewer_neurons_than_can_hold_the_weights() -> None:
    """Six weights need two neurons of four inputs, whatever the threshold says."""
    weight = torch.tensor([[3.0, 4, 0, 0], [2, 1, 0, 0], [0.2, 0.1, 0, 0]])
    new = constant_fan_in_update(
        weight, torch.rand(3, 4), weight != 0, fraction=0.3, active_weights=6, min_salient=100.0
    )
    assert new.sum(dim=1).tolist() == [3, 3, 0]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]])
def test_an_ablated_neuron_comes_back_by_its_gradient_and_the_others_give_their_smallest(
    order: list[int],
) -> None:
    weight = torch.tensor([[5.0, 6.0, 7.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    weight[0] = weight[0, order]
    gradient = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 3.0, 1.0]])
    # keep 3, prune 1; k' = 4 // 2, so that the first neuron keeps its two largest: 7 and 8
    new = constant_fan_in_update(
        weight, gradient, weight != 0, fraction=0.25, active_weights=4, min_salient=1.0
    )
    assert sorted(weight[0][new[0]].tolist()) == [7.0, 8.0]
    assert new[1].int().tolist() == [0, 1, 1, 0]


def test_a_weight_large_in_both_ways_is_one_salient_weight() -> None:
    """The second neuron's only salient weight has the largest gradient too: still one, where two are asked."""
    weight = torch.tensor([[5.0, 6.0, 0.0, 0.0], [9.0, 0.1, 0.0, 0.0]])
    gradient = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])
    # keep 3 (9, 6, 5), prune 1 (8, which belongs to the 9)
    new = constant_fan_in_update(
        weight, gradient, weight != 0, fraction=0.25, active_weights=4, min_salient=2.0
    )
    assert new.any(dim=1).tolist() == [True, False]


def test_an_active_weight_of_exactly_zero_ranks_above_inactive_ones() -> None:
    weight = torch.tensor([[0.0, 2.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False]])
    assert torch.equal(unstructured_update(weight, torch.zeros(1, 4), mask, fraction=0.0), mask)


def test_rigl_exchanges_over_the_whole_layer() -> None:
    weight = torch.tensor([[5.0, 1.0], [0.0, 0.0]])
    new = unstructured_update(weight, torch.tensor([[0.0, 0.0], [1.0, 3.0]]), weight != 0, fraction=0.5)
    assert new.int().tolist() == [[1, 0], [0, 1]]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """(weight, gradient, mask, k): a constant fan-in k, some neurons ablated, ties and zeros in both scores."""
    n, f = draw(st.integers(1, 12)), draw(st.integers(1, 20))
    k = draw(st.integers(1, f))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = topology.random_fan_in(n, f, k, generator)
    mask[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.4]))] = False
    levels = draw(st.sampled_from([2, 1000]))
    weight, gradient = (torch.randint(-levels, levels, (n, f), generator=generator) / 7.0 for _ in range(2))
    return weight * mask, gradient, mask, k


@settings(deadline=None, max_examples=150)
@given(layers(), st.floats(0.0, 1.0), st.sampled_from([None, 0.5, 2.0, 1e9]))
def test_every_living_neuron_has_exactly_k_inputs_within_the_budget(
    layer: tuple[Tensor, Tensor, Tensor, int], fraction: float, min_salient: float | None
) -> None:
    weight, gradient, mask, k = layer
    n, f = mask.shape
    budget = n * k
    new = constant_fan_in_update(
        weight, gradient, mask, fraction=fraction, active_weights=budget, min_salient=min_salient
    )
    counts = new.sum(dim=1)
    alive = counts > 0
    if min_salient is None:
        assert torch.equal(alive, mask.any(dim=1)), "without ablation no neuron goes or comes"
        if not alive.any():
            return
        assert counts[alive].eq(min(f, budget // int(alive.sum()))).all()
    else:
        assert int(alive.sum()) * f >= budget, "the guard"
        assert counts[alive].eq(budget // int(alive.sum())).all()
    assert int(new.sum()) <= budget


def by_the_book(
    weight: Tensor, gradient: Tensor, mask: Tensor, fraction: float, budget: int, min_salient: float | None
) -> list[list[int]]:
    """Algorithm 1 of Lasby et al. (2024), one weight at a time: the inputs of every neuron."""
    n, f = mask.shape
    size, grad = weight.abs().flatten().tolist(), gradient.abs().flatten().tolist()

    def top(indices: list[int], score: list[float], count: int) -> list[int]:
        return sorted(indices, key=lambda i: (-score[i], i))[: max(0, count)]

    active = [i for i, on in enumerate(mask.flatten().tolist()) if on]
    prune = math.floor(fraction * len(active))
    keep = len(active) - prune
    kept = top(active, size, keep)
    alive = sorted({i // f for i in active})
    if min_salient is not None:
        either = {*kept, *top(list(range(n * f)), grad, prune)}
        salient: list[float] = [sum(i // f == row for i in either) for row in range(n)]
        alive = [row for row in range(n) if salient[row] >= max(1.0, min_salient)]
        needed = math.ceil(budget / f)
        if len(alive) < needed:
            alive = sorted(top(list(range(n)), salient, needed))
        kept = top([i for i in active if i // f in alive], size, keep)
    k = min(f, budget // max(1, len(alive)))
    rows: list[list[int]] = [[] for _ in range(n)]
    for row in alive:
        own = top([i for i in kept if i // f == row], size, k)
        others = [i for i in range(row * f, row * f + f) if i not in own]
        rows[row] = sorted(i % f for i in own + top(others, grad, k - len(own)))
    return rows


@settings(deadline=None, max_examples=200)
@given(layers(), st.floats(0.0, 1.0), st.sampled_from([None, 0.5, 2.0, 5.0, 1e9]))
def test_the_vectorised_update_is_the_algorithm_with_ties_to_the_lowest_index(
    layer: tuple[Tensor, Tensor, Tensor, int], fraction: float, min_salient: float | None
) -> None:
    weight, gradient, mask, k = layer
    budget = len(mask) * k
    new = constant_fan_in_update(
        weight, gradient, mask, fraction=fraction, active_weights=budget, min_salient=min_salient
    )
    expected = by_the_book(weight, gradient, mask, fraction, budget, min_salient)
    assert [row.nonzero().flatten().tolist() for row in new] == expected


@settings(deadline=None, max_examples=100)
@given(layers(), st.floats(0.0, 1.0))
def test_kept_weights_are_no_smaller_than_dropped_ones(
    layer: tuple[Tensor, Tensor, Tensor, int], fraction: float
) -> None:
    weight, gradient, mask, _ = layer
    prune = math.floor(fraction * int(mask.sum()))
    new = unstructured_update(weight, gradient.abs(), mask, fraction=fraction)
    assert int(new.sum()) == int(mask.sum())
    dropped, kept = weight.abs()[mask & ~new], weight.abs()[mask & new]
    if dropped.numel() and int((new & ~mask).sum()) == prune:  # none regrew
        assert dropped.max() <= kept.min() if kept.numel() else True
