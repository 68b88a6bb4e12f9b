"""Topology updates as pure functions: (weight, dense gradient, mask) -> new mask.

Everything here works on one layer seen as a matrix, [neurons, dense fan-in], and loops over nothing: neurons are
rows, and a row of the mask that is all False is an ablated neuron. What concerns active weights is done on lists
of flat indices, which at 90 % sparsity are a tenth of the matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAMPLE = 1 << 14  # entries looked at to guess a bound
_SMALL = 1 << 19  # below this, one exact selection is cheaper than guessing
_FEW_ROWS = 1 << 16  # below this many entries, ranking whole rows is cheaper than ranking chunks first


def _above_sampled_bound(flat: Tensor, count: int) -> Tensor | None:
    """Indices of a few more than the ``count`` largest entries: those above a bound guessed from a strided
    sample. None where it let too few through, which four deviations of a random sample make rare."""
    sample = flat[:: flat.numel() // _SAMPLE]
    rank = count * sample.numel() / flat.numel()
    rank = math.ceil(rank + 4.0 * math.sqrt(rank) + 8.0)
    if rank >= sample.numel():
        return None
    indices = (flat >= torch.kthvalue(sample, sample.numel() - rank + 1).values).nonzero().flatten()
    return indices if indices.numel() >= count else None


def largest_entries(flat: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where the ``count`` largest entries of a 1-d tensor without NaN are.

    Exact; of equal entries the first win, so that the choice is the same on every device and rank.
    """
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    if count >= flat.numel():
        return torch.arange(flat.numel(), device=flat.device)
    candidates = _above_sampled_bound(flat, count) if flat.numel() > _SMALL else None
    values = flat if candidates is None else flat[candidates]
    bound = torch.kthvalue(values, values.numel() - count + 1).values
    chosen = values >= bound
    if int(torch.count_nonzero(chosen)) > count:  # ties at the bound
        chosen = values > bound
        ties = (values == bound).nonzero().flatten()
        chosen[ties[: count - int(torch.count_nonzero(chosen))]] = True
    indices = chosen.nonzero().flatten()
    return indices if candidates is None else candidates[indices]


def largest_per_row(score: Tensor, count: Tensor) -> Tensor:
    """int64, flat indices into ``score`` [n, f] of the ``count[i]`` largest entries of each row i.

    Exact. ``count`` is int64 [n], at most f. At least count[i] entries of row i reach the count[i]-th largest of
    the maxima of disjoint chunks of it, so that only entries which do are ranked: few more than are wanted.
    """
    n, f = score.shape
    wanting = count.nonzero().flatten()
    if not len(wanting):
        return wanting
    if len(wanting) < n:  # the rows of ablated neurons want nothing
        found = largest_per_row(score[wanting], count[wanting])
        return wanting[found // f] * f + found % f
    widest = int(count.max())
    chunk = min(8, f // (4 * widest))
    if chunk < 4 or score.numel() < _FEW_ROWS:
        order = torch.topk(score, widest, dim=1).indices
        wanted = torch.arange(widest, device=score.device) < count[:, None]
        return (order + torch.arange(n, device=score.device)[:, None] * f)[wanted]
    chunks = f // chunk
    maxima = score[:, : chunks * chunk].view(n, chunk, chunks).amax(dim=1)
    bound = torch.topk(maxima, widest, dim=1).values.gather(1, count[:, None] - 1)
    candidates = (score >= bound).flatten().nonzero().flatten()
    row = candidates // f
    found = torch.bincount(row, minlength=n)
    start = found.cumsum(0) - found
    packed = score.new_full((n, int(found.max())), -torch.inf)
    packed[row, torch.arange(len(row), device=row.device) - start[row]] = score.flatten()[candidates]
    order = torch.topk(packed, widest, dim=1).indices + start[:, None]
    wanted = torch.arange(widest, device=score.device) < count[:, None]
    return candidates[order[wanted]]


def mask_at(indices: Tensor, shape: torch.Size) -> Tensor:
    """Bool tensor of ``shape``, True at these flat indices."""
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=indices.device)
    mask[indices] = True
    return mask.view(shape)


def random_fan_in(neurons: int, dense_fan_in: int, k: int, generator: torch.Generator) -> Tensor:
    """Bool [neurons, dense_fan_in] with exactly ``k`` inputs in every row, drawn uniformly (on the CPU)."""
    score = torch.rand(neurons, dense_fan_in, generator=generator)
    return mask_at(largest_per_row(score, torch.full((neurons,), k)), score.shape)


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
        bool [n, f] with exactly k' inputs in every living neuron and none in the others.
    """
    n, f = mask.shape
    w, g = weight.flatten(), gradient.abs().flatten()
    active = mask.flatten().nonzero().flatten()
    prune = math.floor(fraction * active.numel())
    keep = active.numel() - prune
    kept = active[largest_entries(w[active].abs(), keep)]
    if min_salient is None:
        alive = mask.any(dim=1)
    else:
        strong = largest_entries(g, prune)
        strong = strong[~mask_at(kept, mask.shape).flatten()[strong]]
        salient = torch.bincount(kept // f, minlength=n) + torch.bincount(strong // f, minlength=n)
        alive = living_neurons(salient, min_salient, needed=math.ceil(active_weights / f))
        living = active[alive[active // f]]
        # Outside ablated neurons, whose places go to the next largest weights.
        kept = living[largest_entries(w[living].abs(), keep)]
    k = min(f, active_weights // max(1, int(alive.sum())))
    count = torch.bincount(kept // f, minlength=n)
    if bool((count > k).any()):  # neurons came back, and the others give up their smallest
        score = torch.full_like(w, -1.0)
        score[kept] = w[kept].abs()
        count = count.clamp(max=k)
        kept = largest_per_row(score.view(n, f), count)
    g[kept] = -1.0
    grown = largest_per_row(g.view(n, f), (k - count) * alive)
    return mask_at(torch.cat([kept, grown]), mask.shape)


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
    active = mask.flatten().nonzero().flatten()
    prune = math.floor(fraction * active.numel())
    kept = active[largest_entries(weight.flatten()[active].abs(), active.numel() - prune)]
    score = growth.clone().flatten()
    score[kept] = -1.0
    return mask_at(torch.cat([kept, largest_entries(score, prune)]), mask.shape)
