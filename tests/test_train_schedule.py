"""The cosine schedule: its values, its steps, what it refuses."""

from __future__ import annotations

import pytest

from fanin_compile.errors import OptionError
from fanin_compile.train.schedule import UpdateSchedule


def test_fraction_is_a_cosine_from_alpha_to_zero() -> None:
    schedule = UpdateSchedule(alpha=0.3, delta_t=100, t_end=600)
    assert [round(schedule.fraction(t), 6) for t in (0, 200, 300, 400, 600, 700)] == [
        0.3,
        0.225,
        0.15,
        0.075,
        0,
        0,
    ]


def test_updates_at_multiples_of_delta_t_strictly_below_t_end() -> None:
    schedule = UpdateSchedule(alpha=0.3, delta_t=25, t_end=100)
    updates = [t for t in range(130) if schedule.updates_at(t)]
    assert updates == [25, 50, 75]
    assert [schedule.next_update(t) for t in (0, 24, 25, 74, 75)] == [25, 25, 50, 75, None]


@pytest.mark.parametrize(
    ("alpha", "delta_t", "t_end", "message"),
    [(0.0, 1, 1, "alpha"), (1.1, 1, 1, "alpha"), (0.3, 0, 1, "delta_t"), (0.3, 1, -1, "t_end")],
)
def test_values_out_of_range_are_refused_by_name(
    alpha: float, delta_t: int, t_end: int, message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        UpdateSchedule(alpha, delta_t, t_end)
