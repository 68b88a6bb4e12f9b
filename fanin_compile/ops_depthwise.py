"""The dense depthwise convolution operator: schema, plain-torch reference, fake kernel, autograd, flop formula.

    depthwise_conv(x, weight, bias?, stride, padding, dilation, activation, residual?)
        y = activation(conv(x, weight, groups=channels) + bias + residual), padded unevenly where asked for

It stands between condensed convolutions, whose outputs are planar and which it would take a copy on either side to
leave. As for the linear operators (ops.py), the first call on CPU builds and loads the C++ kernels, which take over the
CPU and AutogradCPU keys; the reference serves everything else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .ops import ACTIVATIONS, until_native
from .ops_conv import empty_output, finish

aten = torch.ops.aten

_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation, "
    'str activation="none", Tensor? residual=None) -> Tensor'
)
_library = torch.library.Library("fanin", "FRAGMENT")
# The output's memory format follows x's, so that inductor must hand over the strides it traced with.
_library.define(
    "depthwise_conv" + _ARGUMENTS, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
)
# Called by the C++ kernels: for dtypes they do not know, and when a gradient is wanted.
_library.define("depthwise_conv_reference" + _ARGUMENTS)
_library.define("depthwise_conv_with_grad" + _ARGUMENTS)


# ---- the reference ---------------------------------------------------------------------------------------


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    """[..., *size] with zeros in front of and behind each of the last dimensions, outermost first in `padding`."""
    pairs = [padding[i : i + 2] for i in range(0, len(padding), 2)]
    return F.pad(x, [number for pair in reversed(pairs) for number in pair])


def reference_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """depthwise_conv in plain torch; any floating dtype and device, half precision in fp32.

    Args: see depthwise_conv.
    """
    wide = functools.reduce(torch.promote_types, (x.dtype, weight.dtype, torch.float32))
    dims = weight.ndim - 2
    batch = _pad(x.unsqueeze(0) if x.ndim == dims + 1 else x, padding).to(wide)
    z: Tensor = aten.convolution(
        batch, weight.to(wide), None, stride, [0] * dims, dilation, False, [0] * dims, batch.shape[1]
    )
    return finish(x, z, bias, residual, activation)


# ---- the public entry point ------------------------------------------------------------------------------


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv(x, weight, groups=channels) + bias + residual).

    Args:
        x: [batch, channels, *size] or [channels, *size], contiguous or channels_last; other strides are copied.
        weight: [channels * multiplier, 1, *kernel], 1 to 3 kernel dimensions.
        bias: [channels * multiplier].
        stride, dilation: one number or one for each dimension.
        padding: one number, one for each dimension, or two for each: zeros before and behind, outermost first.
        activation: a key of ops.ACTIVATIONS.
        residual: of the output's shape, added before the activation.

    Returns: [batch, channels * multiplier, *size] in x's dtype and memory format. The kernels know fp32, of which sums
        are kept in fp32; other dtypes run by the reference.

    Raises:
        ValueError: parts that do not fit together, an unknown activation.
    """
    dims = weight.ndim - 2

    def each(number: int | Sequence[int]) -> list[int]:
        return [number] * dims if isinstance(number, int) else list(number)

    pads = each(padding)
    if len(pads) == dims:
        pads = [number for number in pads for _ in range(2)]
    y: Tensor = torch.ops.fanin.depthwise_conv(
        x, weight, bias, each(stride), pads, each(dilation), activation, residual
    )
    return y


# ---- registration ----------------------------------------------------------------------------------------


class _DepthwiseConv(torch.autograd.Function):
    """Gradients by x, weight, bias and residual, by those of aten's convolution of the padded x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        *geometry, activation = rest
        ctx.save_for_backward(x, weight, bias, residual)
        ctx.geometry, ctx.activation = geometry, activation
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.fanin.depthwise_conv(x, weight, bias, *geometry, activation, residual)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, bias, residual = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_residual, _ = ctx.needs_input_grad
        stride, padding, dilation = ctx.geometry
        if ctx.activation != "none":
            z = torch.ops.fanin.depthwise_conv(x, weight, bias, *ctx.geometry, "none", residual)
            grad = ACTIVATIONS[ctx.activation].backward(grad, z)
        dims = weight.ndim - 2
        unbatched = x.ndim == dims + 1
        g, xb = (t.to(weight.dtype).unsqueeze(0) if unbatched else t.to(weight.dtype) for t in (grad, x))
        by_padded, by_weight, _ = aten.convolution_backward(
            g, _pad(xb, padding), weight, None, stride, [0] * dims, dilation, False, [0] * dims, xb.shape[1],
            [wants_x, wants_weight, False],
        )  # fmt: skip
        by_x = None
        if wants_x:
            by_x = _pad(by_padded, [-number for number in padding])
            by_x = (by_x.squeeze(0) if unbatched else by_x).to(x.dtype)
        by_bias = g.sum([0, *range(2, dims + 2)]).to(bias.dtype) if wants_bias else None
        by_residual = grad.to(residual.dtype) if wants_residual else None
        return by_x, by_weight if wants_weight else None, by_bias, by_residual, None


def _with_grad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    rest = (stride, padding, dilation, activation)
    y: Tensor = _DepthwiseConv.apply(x, weight, bias, residual, rest)  # type: ignore[no-untyped-call]
    return y


def _fake_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"activation {activation!r}: expected one of {[*ACTIVATIONS]}"
    )
    dims = weight.ndim - 2
    sizes = [
        (size + before + behind - d * (k - 1) - 1) // s + 1
        for size, k, s, before, behind, d in zip(
            x.shape[-dims:], weight.shape[2:], stride, padding[::2], padding[1::2], dilation, strict=True
        )
    ]
    return empty_output(x, [weight.shape[0], *sizes], dims)


def _depthwise_conv_flops(
    x: torch.Size, weight: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two operations per tap and output; arguments are shapes."""
    outputs: int = math.prod(out_shape)
    return 2 * outputs * math.prod(weight[2:])


_library.impl(
    "depthwise_conv", until_native("depthwise_conv", reference_depthwise_conv), "CompositeExplicitAutograd"
)
_library.impl("depthwise_conv", _with_grad, "Autograd")  # any device; C++ takes AutogradCPU
_library.impl("depthwise_conv_reference", reference_depthwise_conv, "CompositeExplicitAutograd")
_library.impl("depthwise_conv_with_grad", _with_grad, "CompositeImplicitAutograd")
torch.library.register_fake("fanin::depthwise_conv", _fake_depthwise_conv, lib=_library)
register_flop_formula(torch.ops.fanin.depthwise_conv)(_depthwise_conv_flops)
