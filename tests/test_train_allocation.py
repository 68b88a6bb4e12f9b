"""Allocation: exact fan-ins, ERK by hand and by property."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin_compile.errors import OptionError
from fanin_compile.train.allocation import budget, erk, exact, fan_in, uniform


@pytest.mark.parametrize(
    ("dense_fan_in", "sparsity", "k"), [(640, 0.9, 64), (1000, 0.99, 10), (20, 0.95, 1), (10, 0.7, 3)]
)
def test_fan_in_is_not_truncated_by_floats(dense_fan_in: int, sparsity: float, k: int) -> None:
    """int(640 * (1 - 0.9)) is 63."""
    assert fan_in("fc", budget(7, dense_fan_in, 1 - exact(sparsity)), 7) == k


def test_fan_in_zero_names_the_layer() -> None:
    with pytest.raises(OptionError, match=r"'fc': 5 active weights over 10 neurons"):
        fan_in("fc", 5, 10)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_out_of_range_is_refused(sparsity: float) -> None:
    with pytest.raises(OptionError, match="0 <= sparsity < 1"):
        exact(sparsity)


def test_erk_by_hand() -> None:
    # raw densities 20/100 and 30/200; eps (20 + 30) = 0.2 * 300, so eps = 1.2
    assert erk({"a": (10, 10), "b": (10, 20)}, exact(0.8)) == {"a": Fraction(24, 100), "b": Fraction(18, 100)}


def test_erk_sets_small_layers_dense_and_solves_again() -> None:
    # "a" would pass 1 (eps = 41/... > 5), so its 4 weights are dense and "b" gets the other 0.5 * 10004 - 4
    density = erk({"a": (2, 2), "b": (100, 100)}, exact(0.5))
    assert density["a"] == 1
    assert density["b"] * 10000 == Fraction(10004, 2) - 4


def test_power_zero_is_uniform() -> None:
    shapes = {"a": (4, 30), "b": (10, 10, 3, 3)}
    assert erk(shapes, exact(0.9), power=0.0) == uniform(shapes, exact(0.9))


shapes = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.lists(st.integers(1, 300), min_size=2, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(0, 99).map(lambda p: p / 100), st.sampled_from([0.5, 1.0, 2.0]))
def test_erk_meets_the_sparsity_exactly_with_densities_to_1(
    shapes: dict[str, tuple[int, ...]], sparsity: float, power: float
) -> None:
    density = erk(shapes, exact(sparsity), power)
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(density[name] * numel[name] for name in shapes) == (1 - exact(sparsity)) * sum(numel.values())
    assert all(0 <= value <= 1 for value in density.values())
