"""Selection of the largest entries: exact at every size, with ties, in every dtype, by NumPy and by torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin_compile.train import ranking
from fanin_compile.train.ranking import largest_entries, largest_per_row, mask_at, per_row, positions

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


@pytest.fixture(params=["numpy", "torch"], autouse=True, scope="module")
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs on a CPU, and what runs on every other device."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(ranking, "_array", lambda tensor: None)
        yield request.param


def scores(shape: tuple[int, ...], levels: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, levels, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def first_largest(score: torch.Tensor, count: int) -> torch.Tensor:
    """The rule itself: a stable sort of each row, ascending positions."""
    return torch.sort(score, dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31),
    st.integers(1, 2000) | st.integers(ranking._SMALL + 1, ranking._SMALL + 100_000),
    st.sampled_from([2, 50, 10**6]),
    st.sampled_from([0.0, 1e-5, 0.03, 1.0]) | st.floats(0, 1),
    st.sampled_from(DTYPES),
)
def test_largest_entries_are_those_of_a_stable_sort(
    seed: int, size: int, levels: int, share: float, dtype: torch.dtype
) -> None:
    """On both sides of the size from which a sampled bound narrows the choice."""
    score = scores((size,), levels, seed, dtype)
    count = round(share * size)
    assert torch.equal(largest_entries(score, count), first_largest(score, count))


def test_a_sample_that_misleads_changes_nothing() -> None:
    """Every sampled entry is large and nothing else is: the guessed bound lets too few through."""
    score = torch.zeros(ranking._SMALL * 2 + 1)
    sampled: list[torch.Tensor] = []

    def watched(values: torch.Tensor, count: int, exact: Any = ranking._kth_largest) -> Any:
        sampled.append(values)
        return exact(values, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_kth_largest", watched)
        largest_entries(score, 100_000)
    assert sampled[0].numel() < 2 * ranking._SAMPLE
    score[:: sampled[0].stride()[0]] = 1.0
    assert ranking._above_sampled_bound(score, 100_000) is None
    assert torch.equal(largest_entries(score, 100_000), first_largest(score, 100_000))


@pytest.mark.parametrize("columns", [512, 768, 3072])
def test_the_sample_meets_every_column_of_a_matrix(columns: int) -> None:
    """The gradient of a few examples is large in whole columns, which a stride of 48 would see or miss."""
    score = torch.zeros(2048, columns)
    score[:, :: columns // 16] = 1.0
    found = ranking._above_sampled_bound(score.flatten(), 2048 * 8)
    assert found is not None
    assert found.numel() == 2048 * 16


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(1, 1), (3, 4), (1, 3000), (200, 33)]),
    st.sampled_from([1, 2, 50, 10**6]),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
)
def test_largest_per_row_are_those_of_a_stable_sort(
    seed: int, shape: tuple[int, int], levels: int, share: float, dtype: torch.dtype
) -> None:
    score = scores(shape, levels, seed, dtype)
    count = round(share * shape[1])
    expected = torch.zeros(shape, dtype=torch.bool).scatter_(1, first_largest(score, count), True)
    assert torch.equal(largest_per_row(score, count), expected)


def test_infinite_entries_come_first_and_minus_infinite_ones_last() -> None:
    score = torch.tensor([[1.0, torch.inf, -torch.inf, 2.0], [-torch.inf, -torch.inf, 0.0, -1.0]])
    assert largest_per_row(score, 2).int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert largest_per_row(score, 3).int().tolist() == [[1, 1, 0, 1], [1, 0, 1, 1]]


@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_positions_counts_and_masks_agree(seed: int, n: int, f: int, transposed: bool) -> None:
    mask = scores((f, n), 2, seed, torch.bool).t() if transposed else scores((n, f), 2, seed, torch.bool)
    flat = positions(mask)
    assert flat.tolist() == [i for i, on in enumerate(mask.flatten().tolist()) if on]
    assert torch.equal(per_row(flat, n, f), mask.sum(dim=1))
    assert torch.equal(mask_at(flat, mask.shape), mask)
