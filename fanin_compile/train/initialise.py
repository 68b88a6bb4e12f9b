"""Starting weights of a sparse layer: the variance belongs to the fan-in it has, not to the dense one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fanin_compile.errors import OptionError

InitScheme = Literal["scale", "he", "xavier", "keep"]


def check_scheme(scheme: str) -> None:
    if scheme not in ("scale", "he", "xavier", "keep"):
        raise OptionError(f"init is {scheme!r}; expected 'scale', 'he', 'xavier' or 'keep'")


def initial_weight(weight: Tensor, mask: Tensor, scheme: InitScheme, generator: torch.Generator) -> Tensor:
    """The weights to start from, 0 off the mask (Evci et al. 2022, "Gradient flow in sparse neural
    networks").

    With k inputs in a neuron and, of n neurons, n k / f on average reading an input:

    * scale: the weight as it is times sqrt(f / k): whatever scheme made it, its outputs keep their variance;
    * he: N(0, 2 / k); xavier: N(0, 2 / (k + n k / f)), k of the neuron itself in both;
    * keep: the weight as it is.

    Args:
        weight: [n, f]. mask: bool [n, f]. generator: on the CPU.
    """
    check_scheme(scheme)
    n, f = weight.shape
    k = mask.sum(dim=1, keepdim=True).clamp(min=1).to(weight.dtype)
    if scheme == "scale":
        weight = weight * (f / k).sqrt()
    elif scheme != "keep":
        fans = k / 2.0 if scheme == "he" else (k + n * k / f) / 2.0
        drawn = torch.randn(n, f, generator=generator, dtype=torch.float32)
        weight = drawn.to(weight) * fans.rsqrt()
    return weight.masked_fill(~mask, 0.0)
