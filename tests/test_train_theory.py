"""Closed forms of the output norm's variance against simulation, and against each other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin_compile.errors import OptionError
from fanin_compile.train.theory import MASK_LAWS, MaskLaw, output_norm_variance, simulate_output_norm


@pytest.mark.parametrize(("n", "k"), [(10, 2), (16, 4), (5, 5)])
@pytest.mark.parametrize("law", MASK_LAWS)
def test_closed_form_is_within_the_simulation_s_interval(n: int, k: int, law: MaskLaw) -> None:
    """Four deviations: a right formula fails once in 16000 seeds, and the seed is fixed."""
    simulated = simulate_output_norm(n, k, law, samples=100_000)
    expected = output_norm_variance(n, k, law)
    assert abs(simulated.mean - 1.0) < 4 * simulated.mean_error
    assert abs(simulated.variance - expected) < 4 * simulated.variance_error
    assert simulated.variance_error < 0.035 * expected, "tight enough to tell the laws apart"


def test_the_simulation_tells_the_laws_apart() -> None:
    """Each law's closed form lies outside the others' intervals, so that the test above could fail."""
    for law in ("bernoulli", "fan-in"):
        simulated = simulate_output_norm(10, 2, law, samples=100_000)
        for other in {"bernoulli", "fan-in"} - {law}:
            distance = abs(simulated.variance - output_norm_variance(10, 2, other))  # type: ignore[arg-type]
            assert distance > 4 * simulated.variance_error


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 500), st.data())
def test_constant_fan_in_is_least_noisy_by_the_stated_gap(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    bernoulli, layer, fan_in = (output_norm_variance(n, k, law) for law in MASK_LAWS)
    assert fan_in <= layer + 1e-12
    assert layer <= bernoulli + 1e-12
    assert bernoulli - fan_in == pytest.approx(6 * (n - k) / (k * n * (n + 2)))


@pytest.mark.parametrize("n", [2, 16, 200])
def test_a_dense_layer_has_one_variance_whatever_the_law(n: int) -> None:
    assert len({round(output_norm_variance(n, n, law), 12) for law in MASK_LAWS}) == 1


@pytest.mark.parametrize(
    ("n", "k", "law"), [(4, 5, "fan-in"), (4, 0, "fan-in"), (1, 1, "fan-in"), (4, 2, "erk")]
)
def test_refusals(n: int, k: int, law: MaskLaw) -> None:
    with pytest.raises(OptionError, match="expected"):
        output_norm_variance(n, k, law)
