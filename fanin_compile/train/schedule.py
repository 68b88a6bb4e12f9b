"""When the topology changes and by how much: a frozen, pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fanin_compile.errors import OptionError


@dataclass(frozen=True)
class UpdateSchedule:
    """Cosine-decayed drop fraction (RigL, Evci et al. 2020, section 3).

    a(t) = alpha / 2 * (1 + cos(pi * t / t_end)), applied at every multiple of ``delta_t`` below ``t_end``.
    Steps are optimizer steps, counted from 1: step t is the t-th one that has been taken.

    >>> UpdateSchedule(alpha=0.3, delta_t=100, t_end=750).fraction(0)
    0.3
    """

    alpha: float
    delta_t: int
    t_end: int

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise OptionError(f"alpha (first drop fraction) is {self.alpha}; expected 0 < alpha <= 1")
        if self.delta_t < 1:
            raise OptionError(f"delta_t (steps between updates) is {self.delta_t}; expected at least 1")
        if self.t_end < 0:
            raise OptionError(f"t_end (step of the last update) is {self.t_end}; expected at least 0")

    def fraction(self, step: int) -> float:
        """Share of the active weights dropped at ``step``; 0 from ``t_end`` on."""
        if step >= self.t_end:
            return 0.0
        return self.alpha / 2.0 * (1.0 + math.cos(math.pi * step / self.t_end))

    def updates_at(self, step: int) -> bool:
        return 0 < step < self.t_end and step % self.delta_t == 0

    def next_update(self, step: int) -> int | None:
        """The first update strictly after ``step``, or None when the topology is final."""
        following = (step // self.delta_t + 1) * self.delta_t
        return following if following < self.t_end else None
