"""The max pooling operator: schema, plain-torch reference, fake kernel, autograd.

    max_pool(x, kernel, stride, padding, dilation, ceil_mode, activation)
        y = activation(max_pool{1,2,3}d(x)), by the length of kernel

It stands between condensed convolutions, whose images are planar: torch's own pooling of planar images finds the
indices of its maxima as well, one element at a time. As for the linear operators (ops.py), the first call on CPU builds
and loads the C++ kernel, which takes over the CPU and AutogradCPU keys; the reference serves everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import ACTIVATIONS, until_native
from .ops_conv import empty_output

aten = torch.ops.aten

_ARGUMENTS = (
    "(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
    'str activation="none") -> Tensor'
)
_library = torch.library.Library("fanin", "FRAGMENT")
# The output's memory format follows x's, so that inductor must hand over the strides it traced with.
_library.define("max_pool" + _ARGUMENTS, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
# Called by the C++ kernel: for what it does not know, and when a gradient is wanted.
_library.define("max_pool_reference" + _ARGUMENTS)
_library.define("max_pool_with_grad" + _ARGUMENTS)


# ---- the reference ---------------------------------------------------------------------------------------


def _lifted(x: Tensor, geometry: tuple[Sequence[int], ...]) -> tuple[Tensor, tuple[Sequence[int], ...]]:
    """A 1d pooling as a 2d one, of images one row high: torch finds indices for 2d and 3d alone."""
    if len(geometry[0]) > 1:
        return x, geometry
    neutral = (1, 1, 0, 1)
    return x.unsqueeze(-2), tuple((n, *given) for n, given in zip(neutral, geometry, strict=True))


def _pool_with_indices(
    x: Tensor, geometry: tuple[Sequence[int], ...], ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    pool = aten.max_pool3d_with_indices if len(geometry[0]) == 3 else aten.max_pool2d_with_indices
    y, indices = pool(x, *geometry, ceil_mode)
    return y, indices


def reference_max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    activation: str = "none",
) -> Tensor:
    """max_pool in plain torch; any dtype that torch pools and any device, activations of half precision in fp32.

    Args: see max_pool.
    """
    dims = len(kernel)
    lifted, geometry = _lifted(x, (kernel, stride, padding, dilation))
    y, _ = _pool_with_indices(lifted, geometry, ceil_mode)
    y = y.squeeze(-2) if dims == 1 else y
    if activation != "none":
        y = ACTIVATIONS[activation].forward(y.to(torch.promote_types(y.dtype, torch.float32)))
    return empty_output(x, y.shape[-dims - 1 :], dims).copy_(y)


# ---- the public entry point ------------------------------------------------------------------------------


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    activation: str = "none",
) -> Tensor:
    """activation(the maximum under the kernel), as torch.nn.functional.max_pool1d, max_pool2d and max_pool3d.

    Args:
        x: [batch, channels, *size] or [channels, *size], contiguous or channels_last; other strides are copied.
        kernel: 1 to 3 sizes.
        stride, padding, dilation: one number or one for each dimension; the stride is the kernel's size if not given.
            Padding, up to half of the kernel, counts as -inf.
        ceil_mode: whether a last window may reach beyond the padding.
        activation: a key of ops.ACTIVATIONS, of the maximum; of none, relu and relu6 that is the maximum of activated
            elements as well, wherever a window holds any.

    Returns: [batch, channels, *size] in x's dtype and memory format. A NaN is larger than any number. The kernel knows
        contiguous fp32; the rest runs by the reference.

    Raises:
        ValueError: a geometry that does not fit x, an unknown activation. From the reference, torch's RuntimeError.
    """

    def each(number: int | Sequence[int]) -> list[int]:
        return [number] * len(kernel) if isinstance(number, int) else list(number)

    steps = list(kernel) if stride is None else each(stride)
    y: Tensor = torch.ops.fanin.max_pool(
        x, list(kernel), steps, each(padding), each(dilation), ceil_mode, activation
    )
    return y


# ---- registration ----------------------------------------------------------------------------------------


class _MaxPool(torch.autograd.Function):
    """Gradients to where the maxima stand; of equal ones, to the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = rest
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.fanin.max_pool(x, *rest)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        *given, ceil_mode, activation = ctx.rest
        lifted, geometry = _lifted(x, tuple(given))
        z, indices = _pool_with_indices(lifted, geometry, ceil_mode)
        grad = grad.view(z.shape)
        if activation != "none":
            grad = ACTIVATIONS[activation].backward(grad, z)
        name = "max_pool3d" if len(geometry[0]) == 3 else "max_pool2d"
        back = getattr(aten, f"{name}_with_indices_backward")
        by_x: Tensor = back(grad, lifted, *geometry, ceil_mode, indices)
        return by_x.view(x.shape), None


def _with_grad(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    activation: str = "none",
) -> Tensor:
    rest = (kernel, stride, padding, dilation, ceil_mode, activation)
    y: Tensor = _MaxPool.apply(x, rest)  # type: ignore[no-untyped-call]
    return y


def _fake_max_pool(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
    activation: str = "none",
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"activation {activation!r}: expected one of {[*ACTIVATIONS]}"
    )
    return reference_max_pool(x, kernel, stride, padding, dilation, ceil_mode)


_library.impl("max_pool", until_native("max_pool", reference_max_pool), "CompositeExplicitAutograd")
_library.impl("max_pool", _with_grad, "Autograd")  # any device; C++ takes AutogradCPU
_library.impl("max_pool_reference", reference_max_pool, "CompositeExplicitAutograd")
_library.impl("max_pool_with_grad", _with_grad, "CompositeImplicitAutograd")
torch.library.register_fake("fanin::max_pool", _fake_max_pool, lib=_library)
