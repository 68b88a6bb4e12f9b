"""The condensed convolution operator: schema and plain-torch reference (placeholder until the direct kernel lands).

The conv engineer replaces this file whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fanin_compile.condensed import CondensedWeight

_library = torch.library.Library("fanin", "FRAGMENT")
_library.define(
    "gather_conv(Tensor x, Tensor values, Tensor indices, Tensor? row_ptr, Tensor? rows, Tensor? bias, "
    "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups, "
    'str activation="none", Tensor? residual=None) -> Tensor'
)


def _reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    from fanin_compile.ops import ACTIVATIONS

    weight = CondensedWeight(values, indices, row_ptr, rows, tuple(weight_shape)).to_dense(x.dtype)
    convolution = getattr(torch.nn.functional, f"conv{len(weight_shape) - 2}d")
    y: Tensor = convolution(x, weight, bias, stride, padding, dilation, groups)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation].forward(y)


_library.impl("gather_conv", _reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fanin::gather_conv", lib=_library)
def _fake(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    convolution = getattr(torch.nn.functional, f"conv{len(weight_shape) - 2}d")
    y: Tensor = convolution(x, x.new_empty(weight_shape), bias, stride, padding, dilation, groups)
    return y
