"""The condensed convolution operator: schema, plain-torch reference, fake kernel, autograd, flop formula.

    gather_conv(x, values, structure, bias?, weight_shape, stride, padding, dilation, groups, activation, residual?)
        y = activation(conv(x, W) + bias + residual)

for W of weight_shape [out, in/groups, *kernel], packed (packing_conv.py); 1d, 2d and 3d by its length. As for linear
weights (ops.py), the first call on CPU builds and loads the C++ kernels, which take over the CPU and AutogradCPU keys;
the reference serves everything else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.utils.flop_counter import register_flop_formula

from .ops import ACTIVATIONS, packed_to_dense, until_native

aten = torch.ops.aten

_ARGUMENTS = (
    "(Tensor x, Tensor values, Tensor structure, Tensor? bias, int[] weight_shape, "
    "int[] stride, int[] padding, int[] dilation, int groups, "
    'str activation="none", Tensor? residual=None) -> Tensor'
)
_library = torch.library.Library("fanin", "FRAGMENT")
# The output's memory format follows x's, so that inductor must hand over the strides it traced with.
_library.define("gather_conv" + _ARGUMENTS, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
# The same, written over the residual: for graphs in which nobody reads it any more (passes/reuse_residuals.py).
_library.define(
    "gather_conv_" + _ARGUMENTS.partition("str activation")[0] + "str activation, Tensor(a!) residual) -> ()",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
# Called by the C++ kernels: for dtypes they do not know, and when a gradient is wanted.
_library.define("gather_conv_reference" + _ARGUMENTS)
_library.define("gather_conv_with_grad" + _ARGUMENTS)


# ---- the reference ---------------------------------------------------------------------------------------


def memory_format_by_input(x: Tensor, dims: int) -> torch.memory_format:
    """Of what the operators here compute: channels_last only where x is not contiguous as well; x may be unbatched."""
    if x.is_contiguous():
        return torch.contiguous_format
    format: torch.memory_format = suggest_memory_format(x.unsqueeze(0) if x.ndim == dims + 1 else x)
    return format


def output_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Of torch's convolution: channels_last where x or weight [out, in/groups, *kernel] is, as an image of one channel
    or pixel may be as well as contiguous; x may be unbatched."""
    unbatched = x.ndim == weight.ndim - 1
    if weight.ndim == 5 and (unbatched or weight.dtype == torch.float64):
        return torch.contiguous_format  # it is there, whatever they are
    batched = x.unsqueeze(0) if unbatched else x
    formats = (suggest_memory_format(weight), suggest_memory_format(batched))
    return next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)


def empty_output(x: Tensor, sizes: Sequence[int], dims: int) -> Tensor:
    """[batch, out, *size] of x's dtype and memory format; without the batch if x has none."""
    batch = [1] if x.ndim == dims + 1 else x.shape[:1]
    y = torch.empty(
        [*batch, *sizes], dtype=x.dtype, device=x.device, memory_format=memory_format_by_input(x, dims)
    )
    return y.squeeze(0) if x.ndim == dims + 1 else y


def finish(x: Tensor, z: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
    """activation(z + bias + residual) in x's dtype and memory format; z [batch, out, *size] is a convolution of x."""
    dims = z.ndim - 2
    z = z.squeeze(0) if x.ndim == dims + 1 else z
    if bias is not None:
        z = z + bias.to(z.dtype).view(-1, *[1] * dims)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return empty_output(x, z.shape[-dims - 1 :], dims).copy_(ACTIVATIONS[activation].forward(z))


def reference_gather_conv(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """gather_conv with the weight made dense; any floating dtype and device, half precision in fp32.

    Args: see gather_conv.
    """
    wide = functools.reduce(torch.promote_types, (x.dtype, values.dtype, torch.float32))
    weight = packed_to_dense(values.to(wide), structure, weight_shape)
    dims = len(weight_shape) - 2
    batch = x.unsqueeze(0) if x.ndim == dims + 1 else x
    z: Tensor = aten.convolution(
        batch.to(wide), weight, None, stride, padding, dilation, False, [0] * dims, groups
    )
    return finish(x, z, bias, residual, activation)


def _write_over_residual(x: Tensor, *args: Any) -> None:
    residual = args[-1]
    residual.copy_(reference_gather_conv(x, *args))


# ---- the public entry point ------------------------------------------------------------------------------


def gather_conv(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(conv(x, W) + bias + residual) for a packed W [out, in/groups, *kernel].

    Args:
        x: [batch, in, *size] or [in, *size], contiguous or channels_last; other strides are copied.
        values, structure: of packing_conv.pack_conv. A weight packed for a pointwise layer (kernel of 1, no padding)
            runs through the reference if it is called with padding.
        bias: [out].
        weight_shape: 1 to 3 kernel dimensions.
        stride, padding, dilation: one number for each dimension; padding is with zeros.
        activation: a key of ops.ACTIVATIONS.
        residual: of the output's shape, added before the activation.

    Returns: [batch, out, *size] in x's dtype and memory format; sums are kept in fp32. Output channels without a
        single non-zero are activation(bias + residual).

    Raises:
        ValueError: parts that do not fit together, a structure of another version, an unknown activation.
    """
    y: Tensor = torch.ops.fanin.gather_conv(
        x, values, structure, bias, weight_shape, stride, padding, dilation, groups, activation, residual
    )
    return y


# ---- registration ----------------------------------------------------------------------------------------


class _GatherConv(torch.autograd.Function):
    """Gradients by x, values, bias and residual, by the dense convolution's with the densified weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Any, residual: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        structure, *geometry, activation = rest
        ctx.save_for_backward(x, values, structure, bias, residual)
        ctx.geometry, ctx.activation = geometry, activation
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.fanin.gather_conv(
                x, values, structure, bias, *geometry, activation, residual
            )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, values, structure, bias, residual = ctx.saved_tensors
        wants_x, wants_values, wants_bias, wants_residual, _ = ctx.needs_input_grad
        shape, stride, padding, dilation, groups = ctx.geometry
        if ctx.activation != "none":
            z = torch.ops.fanin.gather_conv(x, values, structure, bias, *ctx.geometry, "none", residual)
            grad = ACTIVATIONS[ctx.activation].backward(grad, z)
        dims = len(shape) - 2
        unbatched = x.ndim == dims + 1
        g, xb = (t.to(values.dtype).unsqueeze(0) if unbatched else t.to(values.dtype) for t in (grad, x))
        by_x, by_weight, _ = aten.convolution_backward(
            g, xb, torch.ops.fanin.packed_to_dense(values, structure, shape), None, stride, padding, dilation, False,
            [0] * dims, groups, [wants_x, wants_values, False],
        )  # fmt: skip
        if wants_x:
            by_x = (by_x.squeeze(0) if unbatched else by_x).to(x.dtype)
        by_values = None
        if wants_values:
            by_values = torch.ops.fanin.dense_to_packed(by_weight, structure, values.shape[0])
        by_bias = g.sum([0, *range(2, dims + 2)]).to(bias.dtype) if wants_bias else None
        by_residual = grad.to(residual.dtype) if wants_residual else None
        return by_x, by_values, by_bias, by_residual, None


def _with_grad(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    rest = (structure, weight_shape, stride, padding, dilation, groups, activation)
    y: Tensor = _GatherConv.apply(x, values, bias, residual, rest)  # type: ignore[no-untyped-call]
    return y


def _fake_gather_conv(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"activation {activation!r}: expected one of {[*ACTIVATIONS]}"
    )
    dims = len(weight_shape) - 2
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(x.shape[-dims:], weight_shape[2:], stride, padding, dilation, strict=True)
    ]
    return empty_output(x, [weight_shape[0], *sizes], dims)


def _gather_conv_flops(
    x: torch.Size, values: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two operations per packed value, image and output pixel; arguments are shapes."""
    out_channels = int(args[2][0])
    pixels: int = math.prod(out_shape) // max(out_channels, 1)
    return 2 * math.prod(values) * pixels


_library.impl("gather_conv", until_native("gather_conv", reference_gather_conv), "CompositeExplicitAutograd")
_library.impl("gather_conv_", until_native("gather_conv_", _write_over_residual), "CompositeExplicitAutograd")
_library.impl("gather_conv", _with_grad, "Autograd")  # any device; C++ takes AutogradCPU
_library.impl("gather_conv_reference", reference_gather_conv, "CompositeExplicitAutograd")
_library.impl("gather_conv_with_grad", _with_grad, "CompositeImplicitAutograd")
torch.library.register_fake("fanin::gather_conv", _fake_gather_conv, lib=_library)
torch.library.register_fake("fanin::gather_conv_", lambda *args: None, lib=_library)
register_flop_formula(torch.ops.fanin.gather_conv)(_gather_conv_flops)
