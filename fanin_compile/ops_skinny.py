"""The dense linear operator of few batch rows: schema, plain-torch reference, fake kernel, flop formula.

    skinny_linear(x, weight, bias?)
        y = x @ weight.T + bias, weight dense

The head of a decoder stays dense and is read whole for every token: 154 MB in GPT-2 small, of which torch's own product
with one row reads a third of what memory gives. As for the linear operators (ops.py), the first call on CPU builds and
loads the C++ kernel, which takes over the CPU and AutogradCPU keys; torch's linear serves everything else.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from .ops import until_native

_library = torch.library.Library("fanin", "FRAGMENT")
_library.define(
    "skinny_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag),
)


def reference_skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear. Args: see skinny_linear."""
    return F.linear(x, weight, bias)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, for few rows of x against a weight that comes from memory.

    Args:
        x: [..., in_features]. Up to 6 rows read the weight together, up to 16 take turns; more run by torch's own.
        weight: [out_features, in_features].
        bias: [out_features].

    Returns: [..., out_features]. The kernel knows contiguous fp32 weights; the rest runs by torch's own, and so
        does a call that wants gradients. The kernel's bits depend neither on the number of rows nor on threads.

    Raises:
        ValueError: shapes that do not fit. From the reference, torch's RuntimeError.
    """
    y: Tensor = torch.ops.fanin.skinny_linear(x, weight, bias)
    return y


def _autograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Torch's own where a gradient is wanted."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    with torch._C._AutoDispatchBelowAutograd():
        y: Tensor = torch.ops.fanin.skinny_linear(x, weight, bias)
    return y


def _fake_skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    torch._check(
        weight.ndim == 2 and x.ndim >= 1,
        lambda: (
            f"x must be [..., in_features] of a weight [out_features, in_features], got {x.shape} and {weight.shape}"
        ),
    )
    torch._check(
        x.shape[-1] == weight.shape[1], lambda: f"x has {x.shape[-1]} features, expected {weight.shape[1]}"
    )
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _skinny_linear_flops(x: torch.Size, weight: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two operations per weight and row; arguments are shapes."""
    return 2 * math.prod(x[:-1]) * math.prod(weight)


_library.impl(
    "skinny_linear", until_native("skinny_linear", reference_skinny_linear), "CompositeExplicitAutograd"
)
_library.impl("skinny_linear", _autograd, "Autograd")  # any device; C++ takes AutogradCPU
torch.library.register_fake("fanin::skinny_linear", _fake_skinny_linear, lib=_library)
register_flop_formula(torch.ops.fanin.skinny_linear)(_skinny_linear_flops)
