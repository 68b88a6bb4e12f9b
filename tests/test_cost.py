"""The cost gate: rates from the cache or measured, interpolated, compared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin_compile import cost
from fanin_compile.cost import BATCHES, Rates
from fanin_compile.records import Layer

RATES = Rates(
    1,
    dense=(1.0, 2.0, 4.0, 8.0, 16.0),
    condensed=(1.0, 1.0, 1.0, 1.0, 1.0),
    place=(0.1, 0.1, 0.2, 0.5, 0.5),
    conv_dense=(2.0, 8.0, 0.4),
    conv_condensed=(1.0, 0.5, 0.1),
    conv_place=(0.5, 0.25, 0.5),
)


def _layer(
    *,
    batch: int = 1,
    nnz: int = 1000,
    ablated: int = 0,
    op: str = "linear",
    kernel: tuple[int, ...] = (),
    groups: int = 1,
) -> Layer:
    shape = (100, 100, *kernel)
    return Layer("fc", op, shape, (10, 10), nnz, ablated, 40_000, batch * 10_000, batch, groups)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a measurement that costs nothing."""
    file = tmp_path / "rates.json"
    monkeypatch.setattr(cost, "_cache_file", lambda threads, streamed: file)
    monkeypatch.setattr(
        cost, "measure", lambda threads, streamed: dataclasses.replace(RATES, threads=threads)
    )
    cost.host_rates.cache_clear()
    yield file
    cost.host_rates.cache_clear()


def test_estimates_in_microseconds() -> None:
    assert RATES.dense_us(_layer(batch=4)) == 4 * 10_000 / 2.0 / 1e3
    assert RATES.condensed_us(_layer(batch=4)) == 4 * 1000 / 1e3


def test_convolutions_have_rates_of_their_own_by_kernel() -> None:
    pointwise, spatial = (_layer(op="conv2d", kernel=kernel) for kernel in ((1, 1), (3, 3)))
    assert RATES.dense_us(pointwise) == 10_000 / 2.0 / 1e3
    assert RATES.dense_us(spatial) == 10_000 / 8.0 / 1e3
    assert RATES.condensed_us(spatial) == spatial.sparse_macs / 0.5 / 1e3


@pytest.mark.usefixtures("cache")
def test_depthwise_convolutions_stay_dense() -> None:
    layer = Layer("fc", "conv2d", (100, 1, 3, 3), (1, 1), 100, 0, 3600, 900, 1, groups=100)
    skip = cost.gate(layer)
    assert skip is not None
    assert skip.values == {"groups": 100}


@pytest.mark.usefixtures("cache")
def test_grouped_convolutions_have_a_rate_of_their_own() -> None:
    # 10 % of the work at a quarter of the rate gains; 30 % does not
    assert cost.gate(_layer(op="conv2d", kernel=(3, 3), groups=4)) is None
    skip = cost.gate(_layer(op="conv2d", kernel=(3, 3), groups=4, nnz=3 * 90_000 // 10))
    assert skip is not None
    assert skip.values["dense"] == "25 us"


@settings(max_examples=100)
@given(st.integers(0, 10_000))
def test_interpolation_stays_between_its_neighbours(batch: int) -> None:
    rate = cost._interpolate(RATES.dense, batch)
    below = [r for b, r in zip(BATCHES, RATES.dense, strict=True) if b <= batch] or [RATES.dense[0]]
    above = [r for b, r in zip(BATCHES, RATES.dense, strict=True) if b >= batch] or [RATES.dense[-1]]
    assert below[-1] <= rate <= above[0]


def test_at_measured_batches_it_is_the_measurement() -> None:
    assert [cost._interpolate(RATES.dense, b) for b in BATCHES] == list(RATES.dense)


@pytest.mark.usefixtures("cache")
def test_the_gate_lets_gains_through_and_names_both_estimates_else() -> None:
    assert cost.gate(_layer()) is None
    skip = cost.gate(_layer(batch=256))
    assert skip is not None
    assert skip.reason == "dense is estimated to be faster"
    assert skip.values == {"sparsity": "90.0%", "batch": 256, "dense": "160 us", "condensed": "256 us"}
    assert cost.gate(_layer(nnz=940)) is None
    assert cost.gate(_layer(nnz=9_600)) is not None  # gains less than MARGIN asks for


def test_active_neurons_alone_cost_their_share_and_the_placing() -> None:
    assert RATES.active_us(_layer(batch=256, ablated=30)) == pytest.approx(0.7 * 160 + 256 * 100 / 0.5 / 1e3)
    spatial = _layer(op="conv2d", kernel=(3, 3), ablated=30)
    assert RATES.active_us(spatial) == pytest.approx(0.7 * RATES.dense_us(spatial) + 100 / 0.25 / 1e3)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    ("ablated", "nnz", "form", "estimates"),
    [
        (0, 1000, "dense", {"dense": "160 us", "condensed": "256 us"}),
        # placing takes 51 us, so that 32 us saved by every 20 ablated neurons are worth it from 40 on
        (20, 1000, "dense", {"dense": "160 us", "active": "179 us", "condensed": "256 us"}),
        (40, 1000, "dense on its active neurons alone", {"active": "147 us", "condensed": "256 us"}),
        (80, 500, "dense on its active neurons alone", {"active": "83 us", "condensed": "128 us"}),
        (37, 1000, "dense", {"active": "152 us"}),  # gains less than MARGIN asks for
        (80, 320, "dense on its active neurons alone", {"active": "83 us", "condensed": "82 us"}),  # likewise
        (80, 300, None, {}),
    ],
)
def test_the_gate_decides_among_three(
    ablated: int, nnz: int, form: str | None, estimates: dict[str, str]
) -> None:
    skip = cost.gate(_layer(batch=256, nnz=nnz, ablated=ablated))
    if form is None:
        assert skip is None
        return
    assert skip is not None
    assert skip.reason == f"{form} is estimated to be faster"
    assert skip.active == (form != "dense")
    assert estimates.items() <= skip.values.items()
    assert ("active" in skip.values) == (ablated > 0)


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("changes", [{"groups": 2}, {"ablated": 100}])
def test_grouped_layers_and_those_without_active_neurons_have_two_forms(changes: dict[str, int]) -> None:
    layer = _layer(op="conv2d", kernel=(3, 3), nnz=90_000, **{"ablated": 50} | changes)
    skip = cost.gate(layer)
    assert skip is not None
    assert not skip.active
    assert "active" not in skip.values


def test_rates_are_kept_and_read_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cost.host_rates(1) == RATES
    assert json.loads(cache.read_text())["dense"] == list(RATES.dense)
    cost.host_rates.cache_clear()

    def fail(threads: int, streamed: bool) -> Rates:
        raise AssertionError("measured although kept")

    monkeypatch.setattr(cost, "measure", fail)
    assert cost.host_rates(1) == RATES


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "{}"),
        '{"threads": 1, "dense": 3, "condensed": 4}',
        '{"threads": 1, "dense": [1], "condensed": [1]}',
        '{"threads": 1, "dense": [1, 1, 1, 1, 0], "condensed": [1, 1, 1, 1, 1]}',
        '{"threads": 1, "dense": "abcde", "condensed": []}',
    ],
)
def test_a_damaged_file_is_measured_anew(cache: Path, content: str) -> None:
    cache.write_text(content)
    assert cost.host_rates(1) == RATES
    assert Rates.parse(json.loads(cache.read_text())) == RATES


def test_an_unwritable_cache_does_not_matter(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_cache_file", lambda threads, streamed: Path("/proc/nowhere/rates.json"))
    assert cost.host_rates(1) == RATES


def test_weights_beyond_the_caches_are_judged_by_streamed_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = dataclasses.replace(RATES, dense=(0.1,) * len(BATCHES))
    monkeypatch.setattr(cost, "host_rates", lambda threads, streamed=False: slow if streamed else RATES)
    monkeypatch.setattr(cost, "last_level_cache", lambda: 1000)
    layer = _layer(batch=256)
    assert cost.gate_for(1000)(layer) is not None
    assert cost.gate_for(1001)(layer) is None


def test_the_last_level_cache_is_a_plausible_size() -> None:
    assert 1 << 18 <= cost.last_level_cache() <= 1 << 32


@pytest.mark.parametrize("streamed", [False, True])
def test_measuring_gives_positive_rates_of_both_sides(
    monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr(cost, "last_level_cache", lambda: 8 << 20)  # few layers, to be quick
    rates = cost.measure(1, seconds=0.0, streamed=streamed)
    assert rates.threads == 1
    assert Rates.parse(dataclasses.asdict(rates)) == rates
