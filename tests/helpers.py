"""Assertions that state a whole numeric claim at once."""

from __future__ import annotations

import torch
from torch import Tensor


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
