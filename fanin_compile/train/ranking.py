"""Exact selection of the largest entries of a layer: the primitives that topology updates are made of.

On a CPU they go through NumPy, on the same memory: its partition, comparisons and flatnonzero use SIMD where torch's
kthvalue, topk, comparisons and nonzero do not, and take a quarter to a tenth of the time. Elsewhere torch does it.
The answer is the same everywhere: of equal entries those of lowest index win. Scores hold no NaN.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_SAMPLE = 1 << 14  # entries looked at to guess a bound
_SMALL = 1 << 19  # below this, one exact selection is cheaper than guessing


def _array(tensor: Tensor) -> npt.NDArray[Any] | None:
    """The tensor's memory as a NumPy array; None where NumPy cannot reach it."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" else None


def _rankable(score: Tensor) -> Tensor:
    """NumPy has no bfloat16, and float32 holds every half and bfloat16 exactly."""
    return score.float() if score.is_floating_point() and score.itemsize < 4 else score


def positions(mask: Tensor) -> Tensor:
    """int64, ascending: the flat indices where a bool tensor is True."""
    array = _array(mask)
    return mask.flatten().nonzero().flatten() if array is None else torch.from_numpy(np.flatnonzero(array))


def _count(mask: Tensor) -> int:
    array = _array(mask)
    return int(torch.count_nonzero(mask) if array is None else np.count_nonzero(array))


def _kth_largest(score: Tensor, count: int) -> Tensor:
    """[...]: of each row of ``score`` [..., f] the ``count``-th largest entry, 1 <= count <= f."""
    rank = score.shape[-1] - count
    array = _array(score)
    if array is None:
        return torch.kthvalue(score, rank + 1, dim=-1).values
    return torch.from_numpy(np.array(np.partition(array, rank, axis=-1)[..., rank]))


def _reaches(score: Tensor, bound: Tensor) -> Tensor:
    """Bool: score >= bound."""
    array = _array(score)
    return score >= bound if array is None else torch.from_numpy(np.greater_equal(array, bound.numpy()))


def _above_sampled_bound(flat: Tensor, count: int) -> Tensor | None:
    """Indices of a few more than the ``count`` largest entries: those above a bound guessed from a strided
    sample. None where it let too few through, which four deviations of a random sample make rare."""
    stride = flat.numel() // _SAMPLE
    while math.gcd(stride, 2 * 3 * 5 * 7) > 1:  # or it could meet a few columns of the matrix only
        stride -= 1
    sample = flat[::stride]
    rank = count * sample.numel() / flat.numel()
    rank = math.ceil(rank + 4.0 * math.sqrt(rank) + 8.0)
    if rank >= sample.numel():
        return None
    indices = positions(_reaches(flat, _kth_largest(sample, rank)))
    return indices if indices.numel() >= count else None


def largest_entries(flat: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where the ``count`` largest entries of a 1-d tensor are; all of a shorter one."""
    if count <= 0:
        return torch.empty(0, dtype=torch.int64, device=flat.device)
    if count >= flat.numel():
        return torch.arange(flat.numel(), device=flat.device)
    flat = _rankable(flat)
    candidates = _above_sampled_bound(flat, count) if flat.numel() > _SMALL else None
    values = flat if candidates is None else flat[candidates]
    bound = _kth_largest(values, count)
    chosen = _reaches(values, bound)
    if _count(chosen) > count:  # ties at the bound
        chosen = values > bound
        chosen[positions(values == bound)[: count - _count(chosen)]] = True
    indices = positions(chosen)
    return indices if candidates is None else candidates[indices]


def largest_per_row(score: Tensor, count: int) -> Tensor:
    """Bool [n, f]: the ``count`` largest entries of each row of ``score`` [n, f], 0 <= count <= f."""
    n, f = score.shape
    if count in (0, f):
        return torch.full((n, f), count > 0, device=score.device)
    score = _rankable(score)
    bound = _kth_largest(score, count)[:, None]
    chosen = _reaches(score, bound)
    if _count(chosen) > n * count:
        tied = positions(chosen.sum(dim=1) > count)
        above, equal = score[tied] > bound[tied], score[tied] == bound[tied]
        room = count - above.sum(dim=1, keepdim=True)
        chosen[tied] = above | (equal & (equal.cumsum(dim=1) <= room))
    return chosen


def per_row(indices: Tensor, n: int, f: int) -> Tensor:
    """int64 [n]: how many of these flat indices into [n, f], ascending, lie in each row."""
    ends = torch.arange(0, n * f + 1, f, device=indices.device)
    return torch.searchsorted(indices, ends).diff()


def mask_at(indices: Tensor, shape: torch.Size) -> Tensor:
    """Bool tensor of ``shape``, True at these flat indices."""
    mask = torch.zeros(shape.numel(), dtype=torch.bool, device=indices.device)
    return mask.index_fill_(0, indices, True).view(shape)
