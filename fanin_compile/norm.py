"""The norm of a layer's input as its kernel computes it (Ba et al. 2016; root mean square: Zhang and Sennrich 2019).

    normalise(x) = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * weight + bias

over the last dimension; of a root-mean-square norm, mean(x) is taken to be 0. Its constants are one tensor [2, in + 1]:
weight [in] and eps, bias [in] and 1 if the mean is taken, else 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_norm(
    size: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool, dtype: torch.dtype
) -> Tensor:
    """The constants of a norm over `size` inputs, [2, size + 1].

    Args:
        weight, bias: [size]; None stands for ones and zeros.
        eps: added to the mean square.
        centred: whether the mean is subtracted.
        dtype: of x; norms of half precision are computed, and packed, in float32.
    """
    packed = torch.zeros(2, size + 1, dtype=torch.promote_types(dtype, torch.float32))
    packed[0, :-1] = 1 if weight is None else weight.detach()
    packed[0, -1] = eps
    if bias is not None:
        packed[1, :-1] = bias.detach()
    packed[1, -1] = centred
    return packed


def normalise(x: Tensor, packed: Tensor) -> Tensor:
    """The plain-torch reference, in the wider dtype of both."""
    wide = x.to(torch.promote_types(x.dtype, packed.dtype))
    weight, eps = packed[0, :-1], packed[0, -1].item()
    if packed[1, -1]:
        return F.layer_norm(wide, (x.shape[-1],), weight, packed[1, :-1], eps)
    return F.rms_norm(wide, (x.shape[-1],), weight, eps) + packed[1, :-1]
