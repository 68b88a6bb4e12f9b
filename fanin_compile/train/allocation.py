"""How a global sparsity becomes one fan-in per layer, in exact arithmetic (640 inputs at 90 % are 64)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from fanin_compile.errors import OptionError


def exact(sparsity: float | Fraction) -> Fraction:
    """The decimal a person wrote: exact(0.9) is 9/10, where 1 - 0.9 in floats is 0.0999...98."""
    value = sparsity if isinstance(sparsity, Fraction) else Fraction(repr(float(sparsity)))
    if not 0 <= value < 1:
        raise OptionError(f"sparsity is {sparsity}; expected 0 <= sparsity < 1")
    return value


def budget(neurons: int, dense_fan_in: int, density: Fraction) -> int:
    """Active weights a layer may hold: floor(density * numel)."""
    return math.floor(density * neurons * dense_fan_in)


def fan_in(name: str, active_weights: int, active_neurons: int) -> int:
    """k = floor(active weights / active neurons). Raises OptionError, naming the layer, where k would be
    0."""
    k = active_weights // active_neurons
    if k < 1:
        raise OptionError(
            f"layer {name!r}: {active_weights} active weights over {active_neurons} neurons leave a fan-in "
            "of 0; expected at least 1: lower its sparsity or exclude it"
        )
    return k


def uniform(shapes: Mapping[str, Sequence[int]], sparsity: Fraction) -> dict[str, Fraction]:
    """The same density, 1 - sparsity, for every layer."""
    return dict.fromkeys(shapes, 1 - sparsity)


def erk(shapes: Mapping[str, Sequence[int]], sparsity: Fraction, power: float = 1.0) -> dict[str, Fraction]:
    """Erdos-Renyi-kernel densities (Mocanu et al. 2018; Evci et al. 2020, appendix A).

    density_l = eps * (sum(shape_l) / prod(shape_l)) ** power, with the one eps at which
    sum(density_l * numel_l) = (1 - sparsity) * sum(numel_l). A layer that would pass density 1 is set dense,
    and eps is solved again over the others.

    Args:
        shapes: layer name -> weight shape (kernel dimensions included).
        sparsity: share of zeros over all of these layers together.
        power: the ERK power scale; 0 is uniform.
    """
    numel = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shape), numel[name]) for name, shape in shapes.items()}
    if power != 1.0:
        raw = {name: Fraction(float(value) ** power) for name, value in raw.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        wanted = (1 - sparsity) * sum(numel.values()) - sum(numel[name] for name in dense)
        weight = sum((raw[name] * numel[name] for name in sparse), Fraction(0))
        eps = wanted / weight if weight else Fraction(0)
        over = [name for name in sparse if eps * raw[name] > 1]
        if not over:
            return {name: Fraction(1) if name in dense else eps * raw[name] for name in shapes}
        dense.update(over)  # all at once: each that goes raises eps, so that the others stay over
