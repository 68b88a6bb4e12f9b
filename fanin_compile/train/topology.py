"""Topology updates as pure functions: (weight, dense gradient, mask) -> new mask.

Everything here works on one layer seen as a matrix, [neurons, dense fan-in], and loops over nothing:
neurons are rows, and a row of the mask that is all False is an ablated neuron.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAMPLE = 1 << 14  # entries looked at to guess a selection threshold
_SMALL = 1 << 16  # below this, one exact selection is cheaper than guessing


def _kth_largest(flat: Tensor, count: int) -> Tensor:
    """The value of rank ``count`` (1 = largest), exactly.

    A strided sample guesses a bound slightly below it, so that only the few entries above the bound are
    selected from: 10 x cheaper than a selection over millions. The guess is checked, never trusted.
    """
    if flat.numel() > _SMALL:
        sample = flat[:: flat.numel() // _SAMPLE]
        rank = count * sample.numel() / flat.numel()
        rank = math.ceil(rank + 4.0 * math.sqrt(rank) + 8.0)
        if rank < sample.numel():
            candidates = flat[flat >= torch.kthvalue(sample, sample.numel() - rank + 1).values]
            if candidates.numel() >= count:
                flat = candidates
    return torch.kthvalue(flat, flat.numel() - count + 1).values


def largest(score: Tensor, count: int) -> Tensor:
    """Bool tensor, True at the ``count`` largest entries of ``score`` (any shape, no NaN); of equal ones the
    first in memory order win, so that the choice is the same on every device and rank."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.numel():
        return torch.ones_like(score, dtype=torch.bool)
    flat = score.flatten()
    bound = _kth_largest(flat, count)
    chosen = flat > bound
    missing = count - int(chosen.sum())
    chosen[(flat == bound).nonzero().flatten()[:missing]] = True
    return chosen.view(score.shape)


def largest_per_row(score: Tensor, count: Tensor) -> Tensor:
    """Bool [n, f], True at the ``count[i]`` largest entries of row i of ``score``; ``count`` is int64 [n]."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    widest = int(count.max()) if count.numel() else 0
    if widest <= 0:
        return chosen
    order = torch.topk(score, widest, dim=1).indices
    wanted = torch.arange(widest, device=score.device) < count[:, None]
    return chosen.scatter_(1, order, wanted)


def random_fan_in(neurons: int, dense_fan_in: int, k: int, generator: torch.Generator) -> Tensor:
    """Bool [neurons, dense_fan_in] with exactly ``k`` inputs in every row, drawn uniformly (on the CPU)."""
    score = torch.rand(neurons, dense_fan_in, generator=generator)
    return largest_per_row(score, torch.full((neurons,), k))


def random_unstructured(
    neurons: int, dense_fan_in: int, active_weights: int, generator: torch.Generator
) -> Tensor:
    """Bool [neurons, dense_fan_in] with ``active_weights`` inputs anywhere, drawn uniformly (on the CPU)."""
    return largest(torch.rand(neurons, dense_fan_in, generator=generator), active_weights)


def drop_count(mask: Tensor, fraction: float) -> int:
    """floor(a K): how many of the K active weights this update drops."""
    return math.floor(fraction * int(mask.sum()))


def magnitude(weight: Tensor, mask: Tensor) -> Tensor:
    """|w|, and -1 off the mask: an active weight that is exactly 0 still ranks above an inactive one."""
    return weight.abs().masked_fill_(~mask, -1.0)


def living_neurons(salient: Tensor, min_salient: float, active_weights: int) -> Tensor:
    """Bool [n]: the neurons that are not ablated (Lasby et al. 2024, section 3.1).

    A neuron lives with at least max(1, ``min_salient``) salient weights. When so few do that they could not
    hold ``active_weights`` even with every input connected, the most salient of the others live on.
    """
    n, f = salient.shape
    count = salient.sum(dim=1)
    alive = count >= max(1.0, min_salient)
    needed = math.ceil(active_weights / f)
    if int(alive.sum()) >= needed:
        return alive
    return largest(count, min(needed, n))


def constant_fan_in_update(
    weight: Tensor,
    gradient: Tensor,
    mask: Tensor,
    *,
    fraction: float,
    active_weights: int,
    min_salient: float | None,
) -> Tensor:
    """One SRigL update (Lasby et al. 2024, algorithm 1) of a layer.

    Args:
        weight: [n, f], 0 off the mask.
        gradient: [n, f], the dense gradient.
        mask: bool [n, f], True where a weight is active; K of them.
        fraction: share a of the active weights to drop.
        active_weights: the layer's budget; every living neuron gets k' = budget // living neurons inputs.
        min_salient: ablate neurons with fewer salient weights than this; None keeps every living one.

    Returns:
        bool [n, f] with exactly k' inputs in every living neuron and none in the others.
    """
    w, g = magnitude(weight, mask), gradient.abs()
    prune = drop_count(mask, fraction)
    keep = int(mask.sum()) - prune
    kept = largest(w, keep)
    if min_salient is None:
        alive = mask.any(dim=1)
    else:
        alive = living_neurons(kept | largest(g, prune), min_salient, active_weights)
        dead = ~alive[:, None]
        if (kept & dead).any():  # places freed by ablated neurons go to the next largest weights
            kept = largest(w.masked_fill_(dead, -1.0), min(keep, int((mask & alive[:, None]).sum())))
    k = min(mask.shape[1], active_weights // max(1, int(alive.sum())))
    count = kept.sum(dim=1)
    if bool((count > k).any()):  # only after neurons came back: they share the same budget
        kept &= largest_per_row(w.masked_fill_(~kept, -1.0), count.clamp(max=k))
        count = count.clamp(max=k)
    grown = largest_per_row(g.masked_fill_(kept, -1.0), (k - count) * alive)
    return kept | grown


def unstructured_update(weight: Tensor, growth: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    """One RigL update (Evci et al. 2020, algorithm 1): drop the layer's smallest |w|, grow its largest
    ``growth``.

    Args:
        weight: [n, f], 0 off the mask.
        growth: [n, f], at least 0: |dense gradient| for RigL, random for SET.
        mask: bool [n, f].
        fraction: share of the active weights to exchange.

    Returns:
        bool [n, f] with as many active weights as ``mask``.
    """
    prune = drop_count(mask, fraction)
    kept = largest(magnitude(weight, mask), int(mask.sum()) - prune)
    return kept | largest(growth.masked_fill(kept, -1.0), prune)
