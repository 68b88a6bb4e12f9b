"""Which weights become sparse and how sparse: selection and allocation, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypedDict

from torch import nn

from fanin_compile.errors import OptionError
from fanin_compile.train.allocation import budget, erk, exact, uniform
from fanin_compile.train.layers import MhaBlocks, SparseLayer, find_layers
from fanin_compile.train.selection import Pattern, Patterns, as_patterns, matches, refuse_idle

Allocation = Literal["erk", "uniform"]


class LayerOptions(TypedDict, total=False):
    """Which layers become sparse and how the sparsity is shared among them: keyword arguments of SparseTraining,
    which explains them, and of prune_to_fan_in."""

    allocation: Allocation
    erk_power: float
    dense_first: bool | None
    include: Patterns | None
    exclude: Patterns
    overrides: Mapping[str, float] | None


@dataclass(frozen=True)
class Plan:
    """``sparse``: layers with their budgets set. ``dense``: name -> why it stays dense. ``found``: both, all
    that could be sparse. ``last``: the one of them that was registered last, under any of the names it is tied to,
    which is usually the model's output."""

    sparse: tuple[SparseLayer, ...]
    dense: dict[str, str]
    last: str
    found: tuple[SparseLayer, ...]


def _first_match(patterns: tuple[Pattern, ...], layer: SparseLayer, used: set[Pattern]) -> Pattern | None:
    """The first pattern that means ``layer`` under any of the names it is tied to; all that do count as
    used."""
    hits = [p for p in patterns if any(matches(p, module, name) for module, name in layer.names())]
    used.update(hits)
    return hits[0] if hits else None


def choose(layers: list[SparseLayer], option: str, patterns: Patterns) -> set[str]:
    """Names of the layers that ``patterns`` mean; raises OptionError for a name, glob or type that means
    none."""
    wanted, used = as_patterns(patterns), set[Pattern]()
    chosen = {layer.name for layer in layers if _first_match(wanted, layer, used) is not None}
    refuse_idle(option, wanted, used, [layer.name for layer in layers])
    return chosen


def make_plan(
    model: nn.Module,
    *,
    sparsity: float,
    blocks: MhaBlocks,
    keep_masks: bool,
    allocation: Allocation = "erk",
    erk_power: float = 1.0,
    dense_first: bool | None = None,
    include: Patterns | None = None,
    exclude: Patterns = (),
    overrides: Mapping[str, float] | None = None,
) -> Plan:
    """Choose the layers and give each its budget of active weights.

    ``blocks`` is DynamicTraining's mha_blocks. With ``keep_masks`` a layer that has a mask is sparse with that
    mask's budget, whatever the allocation rule says.
    """
    if allocation not in ("erk", "uniform"):
        raise OptionError(f"allocation is {allocation!r}; expected 'erk' or 'uniform'")
    if allocation == "uniform" and erk_power != 1.0:
        raise OptionError(f"erk_power is {erk_power}; expected none with allocation 'uniform'")
    layers, dense = find_layers(model, blocks)
    masked = {layer.name: layer for layer in layers if keep_masks and layer.has_mask}
    if include is not None:
        included = choose(layers, "include", include)
        dense.update({layer.name: "not included" for layer in layers if layer.name not in included})
    excluded = choose(layers, "exclude", exclude)
    dense.update({layer.name: "excluded" for layer in layers if layer.name in excluded})

    own = {pattern: exact(value) for pattern, value in (overrides or {}).items()}
    used: set[Pattern] = set()
    density: dict[str, Fraction] = {}
    for layer in layers:
        pattern = _first_match(tuple(own), layer, used)
        if layer.name not in dense and isinstance(pattern, str):
            density[layer.name] = 1 - own[pattern]
    refuse_idle("overrides", tuple(own), used, [layer.name for layer in layers])

    if dense_first is None:
        dense_first = allocation == "uniform" and len(layers) > 1 and layers[0].name not in masked
    if dense_first and layers and layers[0].name not in density:
        dense.setdefault(layers[0].name, "first layer")
    shapes = {x.name: tuple(x.param.shape) for x in layers if x.name not in dense and x.name not in density}
    rule = (
        uniform(shapes, exact(sparsity))
        if allocation == "uniform"
        else erk(shapes, exact(sparsity), erk_power)
    )
    for name, layer in masked.items():
        if name in dense:
            raise OptionError(
                f"layer {name!r} has a mask, and would be left dense ({dense[name]}), its mask stale; expected it "
                f"among the sparse layers, or without its buffer {layer.mask_name!r}"
            )
        layer.budgets = layer.counts(layer.rows(layer.mask))
        if name in density:
            _refuse_another_density(layer, density[name])
    density.update(rule)
    _warn_of_another_sparsity([x for x in masked.values() if x.name in rule], density, sparsity)

    sparse: list[SparseLayer] = []
    for layer in layers:
        if layer.name in dense:
            continue
        if layer.name not in masked:
            if density[layer.name] >= 1:
                dense[layer.name] = "allocated density 1"
                continue
            each = budget(layer.block_neurons, layer.dense_fan_in, density[layer.name])
            layer.budgets = (each,) * layer.blocks
        sparse.append(layer)
    if not sparse:
        reasons = ", ".join(f"{name}: {reason}" for name, reason in dense.items()) or "the model has none"
        raise OptionError(f"no layer is left to make sparse; expected at least one ({reasons})")
    return Plan(tuple(sparse), dense, _last(model, layers), tuple(layers))


def _last(model: nn.Module, layers: list[SparseLayer]) -> str:
    """The layer whose weight the last registered module holds; a module in several places counts at its last."""
    place = {module: i for i, (_, module) in enumerate(model.named_modules(remove_duplicate=False))}
    return max(layers, key=lambda layer: max(place[module] for module, _ in layer.owners)).name


def _differs(layers: list[SparseLayer], density: Mapping[str, Fraction]) -> bool:
    """Whether masks hold other counts than their layers are allotted; whole fan-ins lose up to 1 a neuron."""
    active = sum(sum(layer.budgets) for layer in layers)
    wanted = float(sum(density[layer.name] * layer.param.numel() for layer in layers))
    return abs(active - wanted) > sum(layer.neurons for layer in layers)


def _refuse_another_density(layer: SparseLayer, density: Fraction) -> None:
    if _differs([layer], {layer.name: density}):
        raise OptionError(
            f"overrides: layer {layer.name!r} has a mask of sparsity {_sparsity([layer]):.4g}, which stays; expected "
            f"{float(1 - density):g}: leave the override out, or delete its buffer {layer.mask_name!r}"
        )


def _warn_of_another_sparsity(
    layers: list[SparseLayer], density: Mapping[str, Fraction], sparsity: float
) -> None:
    """Masks are as asked for if they have this sparsity themselves, or what the allocation rule gives their layers."""
    same = dict.fromkeys(density, 1 - exact(sparsity))
    if layers and _differs(layers, density) and _differs(layers, same):
        warnings.warn(
            f"sparsity is {sparsity:g}, but the masks that {len(layers)} layers have already are of sparsity "
            f"{_sparsity(layers):.4g}; they stay: delete their buffers to draw new ones",
            stacklevel=4,
        )


def _sparsity(layers: list[SparseLayer]) -> float:
    return 1.0 - sum(sum(x.budgets) for x in layers) / sum(x.param.numel() for x in layers)
