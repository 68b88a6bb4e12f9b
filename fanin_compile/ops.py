"""The gather-matmul operator: schema, plain-torch reference, fake kernel, autograd, flop formula.

    gather_matmul(x, values, structure, bias?, out_features, activation, residual?, norm?)
        y = activation(norm(x) @ W.T + bias + residual), W packed (packing.py) into values and structure

Importing this module builds nothing: the first call on CPU builds and loads the C++ kernels (kernels/build.py), which
then take over the CPU and AutogradCPU dispatch keys, so that no Python stays in the hot path. The reference serves
other devices, dtypes the kernels do not know (float64) and machines without a compiler.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .errors import BuildError, FormatError
from .kernels import build
from .norm import normalise
from .packed import decode
from .packed_conv import decode_conv

log = logging.getLogger("fanin_compile")
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A pointwise function and its derivative: backward(grad_y, z) is the gradient by z."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(grad: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)  # aten.silu_backward has no derivative of its own
    return grad * s * (1 + z * (1 - s))


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda z: z, lambda g, z: g),
    "relu": Activation(torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "relu6": Activation(F.relu6, lambda g, z: aten.hardtanh_backward(g, z, 0, 6)),
    "gelu": Activation(F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": Activation(F.silu, _silu_backward),
    "hardswish": Activation(F.hardswish, lambda g, z: aten.hardswish_backward(g, z)),
    "sigmoid": Activation(torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": Activation(torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
}

_ARGUMENTS = (
    "(Tensor x, Tensor values, Tensor structure, Tensor? bias, "
    'int out_features, str activation="none", Tensor? residual=None, Tensor? norm=None) -> Tensor'
)
_library = torch.library.Library("fanin", "DEF")
# Strides are handled inside (a copy only where x has no [batch, in] view), so inductor may hand over any.
_library.define("gather_matmul" + _ARGUMENTS, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
# called by the C++ kernel for dtypes it does not know
_library.define("gather_matmul_reference" + _ARGUMENTS)
# called by the C++ autograd key when a gradient is wanted
_library.define("gather_matmul_with_grad" + _ARGUMENTS)
# what its backward needs of a structure, whose contents a tracer cannot see
_library.define(
    "packed_to_dense(Tensor values, Tensor structure, int[] shape) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dense_to_packed(Tensor dense, Tensor structure, int entries) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define("scratch_nbytes() -> int")
_library.define("kept_output_nbytes() -> int")
_library.define("release_outputs() -> ()")


# ---- the reference ---------------------------------------------------------------------------------------


def decode_any(structure: Tensor, shape: Sequence[int]) -> tuple[int, Tensor, Tensor]:
    """A linear weight's structure, or a convolution's, in plain tensors.

    Returns: the number of entries; int64 [nnz], places in the flattened dense weight; int64 [nnz], their entries.

    Raises:
        FormatError: a damaged structure, or a weight of another shape.
    """
    header, index, entry = decode(structure) if len(shape) == 2 else decode_conv(structure)
    if not header.fits(shape):
        raise FormatError(f"weight has shape {tuple(shape)}, expected that of the packed one: {header.size}")
    return header.entries, index, entry


def packed_to_dense(values: Tensor, structure: Tensor, shape: Sequence[int]) -> Tensor:
    """The dense weight of `shape`. FormatError if the parts do not fit together."""
    entries, index, entry = decode_any(structure, shape)
    if values.ndim != 1 or len(values) < entries:
        raise FormatError(f"values has shape {tuple(values.shape)}, expected at least {entries} elements")
    dense = values.new_zeros(math.prod(shape))
    dense[index] = values[entry]
    return dense.view(list(shape))


def _dense_to_packed(dense: Tensor, structure: Tensor, entries: int) -> Tensor:
    """What stands in a dense weight where the packed one has its values, in their order [entries]."""
    _, index, entry = decode_any(structure, dense.shape)
    packed = dense.new_zeros(entries)
    packed[entry] = dense.flatten()[index]
    return packed


def reference_gather_matmul(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """gather_matmul in plain torch, for any floating dtype and device; half precision is computed in fp32.

    Args: see gather_matmul. The weight is made dense: one [out, in] of memory.
    """
    dtype = x.dtype
    if norm is not None:
        x = normalise(x, norm)
    wide = functools.reduce(torch.promote_types, (x.dtype, values.dtype, torch.float32))
    dense = packed_to_dense(values, structure, (out_features, x.shape[-1])).to(wide)
    z = x.to(wide) @ dense.t()
    if bias is not None:
        z = z + bias.to(wide)
    if residual is not None:
        z = z + residual.to(wide)
    return ACTIVATIONS[activation].forward(z).to(dtype)


# ---- the public entry point ------------------------------------------------------------------------------


def gather_matmul(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """activation(norm(x) @ W.T + bias + residual) for a packed W [out_features, in_features].

    Args:
        x: [..., in_features], any strides; fp32, bf16 or fp16 in the kernels, others by the reference.
        values: of packing.Packed, fp32, bf16 or fp16; need not have x's dtype.
        structure: of packing.Packed, uint8.
        bias: [out_features].
        activation: a key of ACTIVATIONS.
        residual: [..., out_features], added before the activation.
        norm: of norm.pack_norm, [2, in_features + 1]: x is normalised over its last dimension first.

    Returns: [..., out_features] in x's dtype; sums are kept in fp32. Ablated neurons are activation(bias + residual).

    Raises:
        ValueError: parts that do not fit together, a structure of another version, an unknown activation.
    """
    y: Tensor = torch.ops.fanin.gather_matmul(
        x, values, structure, bias, out_features, activation, residual, norm
    )
    return y


# ---- registration ----------------------------------------------------------------------------------------


@functools.cache
def native_available() -> bool:
    """Build and load the C++ kernels if that has not happened yet; False, with one warning, where it cannot."""
    try:
        build.load()
    except BuildError as error:
        log.warning("no native kernels, running the plain-torch reference: %s", error)
        return False
    return True


def scratch_nbytes() -> int:
    """Most bytes of scratch that one thread has held for the kernels so far; 0 without native kernels."""
    return int(torch.ops.fanin.scratch_nbytes()) if native_available() else 0


def kept_output_nbytes() -> int:
    """Bytes of freed outputs of 128 KiB and more that are kept for the next calls; 0 without native kernels.

    Never more than were in use at one time. Handed back to the system, their pages would be cleared anew in each call.
    """
    return int(torch.ops.fanin.kept_output_nbytes()) if native_available() else 0


def release_outputs() -> None:
    """Give the memory of freed outputs back to the system."""
    if native_available():
        torch.ops.fanin.release_outputs()


def require_native() -> None:
    """As native_available, but BuildError where the kernels cannot be built or loaded."""
    build.load()


def until_native(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of operator `name` for any device: `reference`, but on CPU it loads the C++ kernel, which outranks it
    from then on, and calls that.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if args[0].device.type == "cpu" and native_available():
            return getattr(torch.ops.fanin, name).default(*args, **kwargs)
        return reference(*args, **kwargs)

    return kernel


class _GatherMatmul(torch.autograd.Function):
    """Gradients by x, values, bias and residual, by products with the dense weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Any, residual: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        structure, out_features, activation = rest
        ctx.save_for_backward(x, values, structure, bias, residual)
        ctx.out_features, ctx.activation = out_features, activation
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.fanin.gather_matmul(
                x, values, structure, bias, out_features, activation, residual
            )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, values, structure, bias, residual = ctx.saved_tensors
        wants_x, wants_values, wants_bias, wants_residual, _ = ctx.needs_input_grad
        if ctx.activation != "none":
            z = torch.ops.fanin.gather_matmul(x, values, structure, bias, ctx.out_features, "none", residual)
            grad = ACTIVATIONS[ctx.activation].backward(grad, z)
        wide = torch.promote_types(x.dtype, values.dtype)
        g = grad.reshape(math.prod(x.shape[:-1]), ctx.out_features).to(wide)  # [b, out]
        by_bias = g.sum(0).to(bias.dtype) if wants_bias else None
        by_residual = grad.to(residual.dtype) if wants_residual else None
        by_x = by_values = None
        if wants_x:
            dense = torch.ops.fanin.packed_to_dense(values, structure, [ctx.out_features, x.shape[-1]])
            by_x = (g @ dense.to(wide)).view(x.shape).to(x.dtype)
        if wants_values:
            by_dense = g.t() @ x.reshape(len(g), x.shape[-1]).to(wide)  # [out, in]
            by_values = torch.ops.fanin.dense_to_packed(by_dense.to(values.dtype), structure, values.shape[0])
        return by_x, by_values, by_bias, by_residual, None


def _with_grad(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    dtype = x.dtype
    if norm is not None:
        x = normalise(x, norm)  # which has gradients of its own
    y: Tensor = _GatherMatmul.apply(  # type: ignore[no-untyped-call]
        x, values, bias, residual, (structure, out_features, activation)
    )
    return y.to(dtype)


def _fake_gather_matmul(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"activation {activation!r}: expected one of {[*ACTIVATIONS]}"
    )
    return x.new_empty(*x.shape[:-1], out_features)


def _gather_matmul_flops(
    x: torch.Size, values: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two operations per packed value and batch row; arguments are shapes."""
    return 2 * math.prod(x[:-1]) * math.prod(values)


# Each of the two is linear in its first argument, and the other one's transpose.


def _save_structure(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensor, structure, *_ = inputs
    ctx.save_for_backward(structure)
    ctx.shape = tensor.shape


def _packed_to_dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (structure,) = ctx.saved_tensors
    return torch.ops.fanin.dense_to_packed(grad, structure, *ctx.shape), None, None


def _dense_to_packed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (structure,) = ctx.saved_tensors
    return torch.ops.fanin.packed_to_dense(grad, structure, list(ctx.shape)), None, None


def _fake_packed_to_dense(values: Tensor, structure: Tensor, shape: list[int]) -> Tensor:
    return values.new_empty(shape)


def _fake_dense_to_packed(dense: Tensor, structure: Tensor, entries: int) -> Tensor:
    return dense.new_empty(entries)


_library.impl(
    "gather_matmul", until_native("gather_matmul", reference_gather_matmul), "CompositeExplicitAutograd"
)
_library.impl("gather_matmul", _with_grad, "Autograd")  # any device; C++ takes AutogradCPU
_library.impl("gather_matmul_reference", reference_gather_matmul, "CompositeExplicitAutograd")
_library.impl("gather_matmul_with_grad", _with_grad, "CompositeImplicitAutograd")
_library.impl("packed_to_dense", packed_to_dense, "CompositeExplicitAutograd")
_library.impl("dense_to_packed", _dense_to_packed, "CompositeExplicitAutograd")
torch.library.register_fake("fanin::gather_matmul", _fake_gather_matmul, lib=_library)
torch.library.register_fake("fanin::packed_to_dense", _fake_packed_to_dense, lib=_library)
torch.library.register_fake("fanin::dense_to_packed", _fake_dense_to_packed, lib=_library)
torch.library.register_autograd(
    "fanin::packed_to_dense", _packed_to_dense_backward, setup_context=_save_structure, lib=_library
)
torch.library.register_autograd(
    "fanin::dense_to_packed", _dense_to_packed_backward, setup_context=_save_structure, lib=_library
)
register_flop_formula(torch.ops.fanin.gather_matmul)(_gather_matmul_flops)
