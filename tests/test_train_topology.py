"""Topology updates: by eye on small matrices, by property on random ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile.train import topology
from fanin_compile.train.topology import (
    constant_fan_in_update,
    largest_entries,
    largest_per_row,
    unstructured_update,
)


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


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2000) | st.integers(topology._SMALL + 1, topology._SMALL + 100_000),
    st.sampled_from([2, 50, 10**6]),
    st.sampled_from([0.0, 1e-5, 0.03, 1.0]) | st.floats(0, 1),
)
def test_largest_is_exact_at_every_size_and_with_ties(
    seed: int, size: int, levels: int, share: float
) -> None:
    """The sampled bound must never change the answer; of equal entries the first win."""
    score = torch.randint(0, levels, (size,), generator=torch.Generator().manual_seed(seed)).float()
    count = round(share * size)
    expected = torch.sort(score, descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(largest_entries(score, count), expected)


def test_largest_survives_a_sample_that_misleads() -> None:
    """Every sampled entry is large and nothing else is: the guessed bound lets too few through."""
    score = torch.zeros(1 << 20)
    assert score.numel() > topology._SMALL
    score[:: (1 << 20) // topology._SAMPLE] = 1.0
    expected = torch.sort(score, descending=True, stable=True).indices[:100_000].sort().values
    assert torch.equal(largest_entries(score, 100_000), expected)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(3, 4), (1, 70_000), (700, 100), (90, 801), (1000, 67)]),
    st.sampled_from([2, 50, 10**6]),
    st.sampled_from([0.01, 0.04, 0.5, 1.0]),
)
def test_largest_per_row_is_exact_by_value_at_every_size_and_with_ties(
    seed: int, shape: tuple[int, int], levels: int, share: float
) -> None:
    """Sizes on both sides of the ranking by chunks, with few and with many wanted."""
    n, f = shape
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, shape, generator=generator).float()
    count = torch.randint(0, round(share * f) + 1, (n,), generator=generator)
    chosen = topology.mask_at(largest_per_row(score, count), score.shape)
    assert torch.equal(chosen.sum(dim=1), count)
    smallest_chosen = score.masked_fill(~chosen, torch.inf).amin(dim=1)
    largest_left = score.masked_fill(chosen, -torch.inf).amax(dim=1)
    assert (smallest_chosen >= largest_left).all()
