"""Assertions that state a whole numeric claim at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def assert_close_fp64(
    actual: Tensor,
    expected64: Tensor,
    magnitude64: Tensor | float,
    *,
    k: int,
    factor: float = 2.0,
) -> None:
    """Every element of `actual` lies within its own rounding bound of the fp64 result.

    A sum of k products in fp32, in any order, is off by at most about (k + 2) eps sum|x||w| (Higham,
    Accuracy and Stability of Numerical Algorithms, 3.1); storing it in a narrower dtype adds eps(dtype) |y|.

    Args:
        actual: fp32, bf16 or fp16.
        expected64: the same shape, fp64.
        magnitude64: sum |x| |w| + |bias| + |residual| of each element, fp64.
        k: terms of the longest sum.
        factor: slack for an activation of slope at most 1.2 and its own few ulp.
    """
    assert actual.shape == expected64.shape, (
        f"shape {tuple(actual.shape)}, expected {tuple(expected64.shape)}"
    )
    assert not actual.isnan().any() or expected64.isnan().any(), "NaN: not written, or read from outside"
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(actual.dtype).eps
    tiny = torch.finfo(actual.dtype).smallest_normal
    bound = factor * (k + 2) * eps32 * magnitude64 + (eps * expected64.abs() if eps > eps32 else 0.0) + tiny
    excess = (actual.double() - expected64).abs() / bound
    worst = 0.0 if excess.numel() == 0 else float(excess.max())
    assert worst <= 1.0, (
        f"error is {worst:.2f} times the bound of {k} products in fp32 stored as {actual.dtype}"
    )


def assert_close_at_scale(actual: Any, exact: Any, *, share: float = 1e-5) -> None:
    """Trees of tensors; each element of a floating one lies within `share` of the largest of its tensor, others equal.

    For whole models, where no bound of each element is at hand. Elements near 0 come about by cancellation, so that a
    tolerance relative to the element itself holds on one CPU and fails on the next; relative to the largest element,
    fp32 sums of a few hundred terms through a few layers stay below 1e-5 in any order, and one wrong weight does not.

    Args:
        exact: the same tree in fp64, or in the dtypes of `actual`, which are compared then.
    """
    mine, theirs = pytree.tree_leaves(actual), pytree.tree_leaves(exact)
    assert len(mine) == len(theirs), f"{len(mine)} outputs, expected {len(theirs)}"
    for a, e in zip(mine, theirs, strict=True):
        if not isinstance(e, Tensor) or not e.is_floating_point():
            torch.testing.assert_close(a, e, rtol=0, atol=0)
            continue
        assert a.shape == e.shape, f"shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        assert e.dtype in (a.dtype, torch.float64), f"{a.dtype}, expected {e.dtype}"
        scale = float(e.abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=share * scale)
