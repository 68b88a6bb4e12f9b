"""Topology updates as pure functions: (weight, dense gradient, mask) -> new mask.

Everything here works on one layer seen as a matrix, [neurons, dense fan-in], and loops over nothing: neurons are
rows, and a row of the mask that is all False is an ablated neuron. What concerns active weights is done on lists
of flat indices, which at 90 % sparsity are a tenth of the matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fanin_compile.train.ranking import largest_entries, largest_per_row, mask_at, per_row, positions


def random_fan_in(neurons: int, dense_fan_in: int, k: int, generator: torch.Generator) -> Tensor:
    """Bool [neurons, dense_fan_in] with exactly ``k`` inputs in every row, drawn uniformly (on the CPU)."""
    score = torch.rand(neurons, dense_fan_in, generator=generator)
    return largest_per_row(score, k)


def random_unstructured(
    neurons: int, dense_fan_in: int, active_weights: int, generator: torch.Generator
) -> Tensor:
    """Bool [neurons, dense_fan_in] with ``active_weights`` inputs anywhere, drawn uniformly (on the CPU)."""
    score = torch.rand(neurons, dense_fan_in, generator=generator)
    return mask_at(largest_entries(score.flatten(), active_weights), score.shape)


def living_neurons(salient: Tensor, min_salient: float, needed: int) -> Tensor:
    """Bool [n]: the neurons that are not ablated (Lasby et al. 2024, section 3.1).

    A neuron lives with at least max(1, ``min_salient``) salient weights; ``salient`` is int64 [n], how many each
    has. If fewer than ``needed`` neurons do, the most salient of the others live on.
    """
    alive = salient >= max(1.0, min_salient)
    if int(alive.sum()) >= needed:
        return alive
    return mask_at(largest_entries(salient, needed), salient.shape)


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
        mask: bool [n, f], True where a weight is active.
        fraction: share a of the active weights to drop.
        active_weights: the layer's budget; every living neuron gets k' = budget // living neurons inputs.
        min_salient: ablate neurons with fewer salient weights than this; None keeps those that live.

    Returns:
        bool [n, f] with exactly k' inputs in every living neuron and none in the others. Of equal scores the lowest
        index wins: a neuron that no gradient reached grows its first inactive inputs.
    """
    n, f = mask.shape
    active = positions(mask)
    size = weight.flatten()[active].abs()
    prune = math.floor(fraction * active.numel())
    keep = active.numel() - prune
    kept = active[largest_entries(size, keep)]
    score = gradient.flatten().abs()  # a kept weight will be infinite, so that a neuron grows what it lacks
    if min_salient is None:
        alive = per_row(active, n, f) > 0
        score[kept] = torch.inf
    else:
        strong = largest_entries(score, prune)
        score[kept] = torch.inf
        salient = per_row(kept, n, f) + per_row(strong[score[strong] < torch.inf], n, f)
        alive = living_neurons(salient, min_salient, needed=math.ceil(active_weights / f))
        living = alive.repeat_interleave(per_row(active, n, f))
        if not living.all():  # the places of weights in ablated neurons go to the next largest
            kept = active[living][largest_entries(size[living], keep)]
            score[kept] = torch.inf
    k = min(f, active_weights // max(1, int(alive.sum())))
    score = score.view(n, f)
    over = per_row(kept, n, f) > k
    if over.any():  # neurons came back, and these give up their smallest
        rows = score[over]
        score[over] = torch.where(rows < torch.inf, -1.0, weight[over].abs())
    if alive.all():
        return largest_per_row(score, k)
    new = torch.zeros_like(mask, memory_format=torch.contiguous_format)
    new[alive] = largest_per_row(score[alive], k)
    return new


def unstructured_update(weight: Tensor, growth: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    """One RigL update (Evci et al. 2020, algorithm 1): the layer's smallest |w| go, its largest ``growth`` come.

    Args:
        weight: [n, f], 0 off the mask.
        growth: [n, f], at least 0: |dense gradient| for RigL, random for SET.
        mask: bool [n, f].
        fraction: share of the active weights to exchange.

    Returns:
        bool [n, f] with as many active weights as ``mask``.
    """
    active = positions(mask)
    prune = math.floor(fraction * active.numel())
    kept = active[largest_entries(weight.flatten()[active].abs(), active.numel() - prune)]
    score = growth.clone().flatten()
    score[kept] = -1.0
    return mask_at(torch.cat([kept, largest_entries(score, prune)]), mask.shape)
