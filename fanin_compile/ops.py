"""The gather-matmul operators: schemas, plain-torch reference, fake kernel, autograd, flop formula.

    gather_matmul(x, values, indices, row_ptr?, rows?, bias?, plan?, out_features, activation, residual?)
        y[..., rows[r]] = activation(sum_j values[r, j] * x[..., indices[r, j]] + bias + residual)

Importing this module builds nothing: the first call on CPU builds and loads the C++ kernels (kernels/build.py), which
then take over the CPU and AutogradCPU dispatch keys, so that no Python stays in the hot path. The reference serves
other devices, dtypes the kernels do not know (float64) and machines without a compiler.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .errors import BuildError
from .kernels import build

log = logging.getLogger("fanin_compile")
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A pointwise function and its derivative: backward(grad_y, z) is the gradient by z."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda z: z, lambda g, z: g),
    "relu": Activation(torch.relu, lambda g, z: aten.threshold_backward(g, z, 0)),
    "gelu": Activation(F.gelu, lambda g, z: aten.gelu_backward(g, z)),
    "gelu_tanh": Activation(
        functools.partial(F.gelu, approximate="tanh"),
        lambda g, z: aten.gelu_backward(g, z, approximate="tanh"),
    ),
    "silu": Activation(F.silu, lambda g, z: aten.silu_backward(g, z)),
    "hardswish": Activation(F.hardswish, lambda g, z: aten.hardswish_backward(g, z)),
    "sigmoid": Activation(torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z))),
    "tanh": Activation(torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z))),
}

_ARGUMENTS = (
    "(Tensor x, Tensor values, Tensor indices, Tensor? row_ptr, Tensor? rows, Tensor? bias, Tensor? plan, "
    'int out_features, str activation="none", Tensor? residual=None) -> Tensor'
)
_library = torch.library.Library("fanin", "DEF")
# Strides are handled inside (a copy only where x has no [batch, in] view), so inductor may hand over any.
_library.define("gather_matmul" + _ARGUMENTS, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag))
_library.define(
    "gather_matmul_reference" + _ARGUMENTS
)  # called by the C++ kernel for dtypes it does not know
_library.define(
    "gather_matmul_with_grad" + _ARGUMENTS
)  # called by the C++ autograd key when a gradient is wanted
_library.define("gather_matmul_variant" + _ARGUMENTS.replace(") ->", ', str variant="") ->'))
_library.define(
    "gather_matmul_plan(Tensor indices, Tensor? row_ptr, int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# ---- the reference ---------------------------------------------------------------------------------------


def _row_of_each(row_ptr: Tensor, nnz: int) -> Tensor:
    counts = row_ptr.diff().to(torch.int64)
    return torch.repeat_interleave(torch.arange(len(counts), device=row_ptr.device), counts, output_size=nnz)


def _to_dense(values: Tensor, indices: Tensor, row_ptr: Tensor | None, in_features: int) -> Tensor:
    """[n, in_features] with repeated columns added up."""
    columns = indices.to(torch.int64)
    if row_ptr is None:
        return values.new_zeros(values.shape[0], in_features).scatter_add_(1, columns, values)
    flat = values.new_zeros((len(row_ptr) - 1) * in_features)
    where = _row_of_each(row_ptr, len(columns)) * in_features + columns
    return flat.scatter_add_(0, where, values).view(-1, in_features)


def _sums(x: Tensor, values: Tensor, indices: Tensor, row_ptr: Tensor | None) -> Tensor:
    """x [b, in] -> [b, n], by gathering or by a dense product, whichever materialises fewer elements."""
    n = values.shape[0] if row_ptr is None else len(row_ptr) - 1
    if x.shape[0] * values.numel() > n * x.shape[1]:
        return x @ _to_dense(values, indices, row_ptr, x.shape[1]).t()
    products = x[:, indices.flatten().to(torch.int64)] * values.flatten()  # [b, nnz]
    if row_ptr is None:
        return products.view(x.shape[0], *values.shape).sum(2)
    return x.new_zeros(x.shape[0], n).index_add_(1, _row_of_each(row_ptr, len(values)), products)


def reference_gather_matmul(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    plan: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """gather_matmul in plain torch, for any floating dtype and device; half precision is computed in fp32.

    Args: see gather_matmul; plan is not used.
    """
    if out_features is None:
        out_features = default_out_features(indices, row_ptr, rows)
    wide = functools.reduce(torch.promote_types, (x.dtype, values.dtype, torch.float32))
    z = _sums(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(wide), values.to(wide), indices, row_ptr)
    if rows is not None:
        z = z.new_zeros(z.shape[0], out_features).index_copy_(1, rows.to(torch.int64), z)
    z = z.view(*x.shape[:-1], out_features)
    if bias is not None:
        z = z + bias.to(wide)
    if residual is not None:
        z = z + residual.to(wide)
    return ACTIVATIONS[activation].forward(z).to(x.dtype)


def default_out_features(indices: Tensor, row_ptr: Tensor | None, rows: Tensor | None) -> int:
    """Outputs of a layer without ablated neurons."""
    if rows is not None:
        raise TypeError("gather_matmul: out_features is needed when rows is given")
    return indices.shape[0] if row_ptr is None else len(row_ptr) - 1


# ---- the public entry points -----------------------------------------------------------------------------


def gather_matmul(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    plan: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """activation(x @ W.T + bias + residual) for a condensed W.

    Args:
        x: [..., in_features], any strides.
        values: [n, k], or [nnz] with row_ptr.
        indices: columns of values, ascending in each row; uint8, uint16 or int32.
        row_ptr: int32 [n + 1] for rows of unequal fan-in.
        rows: int32 [n], ascending: the output of each condensed row. None: n == out_features, in order.
            Outputs that no row names are activation(bias + residual).
        bias: [out_features].
        plan: of gather_matmul_plan; without it a batch of 2 or more builds one in every call.
        activation: a key of ACTIVATIONS.
        residual: [..., out_features], added before the activation.

    Returns: [..., out_features] in x's dtype; sums are kept in fp32.
    """
    if out_features is None:
        out_features = default_out_features(indices, row_ptr, rows)
    y: Tensor = torch.ops.fanin.gather_matmul(
        x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual
    )
    return y


def gather_matmul_plan(indices: Tensor, row_ptr: Tensor | None, in_features: int) -> Tensor:
    """The order in which the kernel for batches visits the non-zeros: int32 [plan_size(n, in_features)].

    Its size depends on shapes only, so a new structure of the same shape is an in-place copy_.
    """
    plan: Tensor = torch.ops.fanin.gather_matmul_plan(indices, row_ptr, in_features)
    return plan


def plan_size(n: int, in_features: int) -> int:
    """Elements of a plan: Plan::size in kernels/linear.h."""
    return 8 + 2 * sum(n * -(-in_features // width) + 3 for width in (224, 448, 896))


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


def require_native() -> None:
    """As native_available, but BuildError where the kernels cannot be built or loaded."""
    build.load()


def _until_native(name: str, reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel for any device; on CPU it loads the C++ kernel, which outranks it from then on, and calls that."""

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        if args[0].device.type == "cpu" and native_available():
            y: Tensor = getattr(torch.ops.fanin, name).default(*args, **kwargs)
            return y
        return reference(*args, **kwargs)

    return kernel


def _empty_plan(indices: Tensor, row_ptr: Tensor | None, in_features: int) -> Tensor:
    n = indices.shape[0] if row_ptr is None else row_ptr.shape[0] - 1
    return indices.new_zeros(
        plan_size(n, in_features), dtype=torch.int32
    )  # version 0: the kernels rebuild it


class _GatherMatmul(torch.autograd.Function):
    """Gradients by x, values, bias and residual, by dense products with the densified weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Any, residual: Any, rest: tuple[Any, ...]
    ) -> Tensor:
        indices, row_ptr, rows, plan, out_features, activation = rest
        ctx.save_for_backward(x, values, indices, row_ptr, rows, bias, plan, residual)
        ctx.out_features, ctx.activation = out_features, activation
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = torch.ops.fanin.gather_matmul(
                x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual
            )
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, values, indices, row_ptr, rows, bias, plan, residual = ctx.saved_tensors
        wants_x, wants_values, wants_bias, wants_residual, _ = ctx.needs_input_grad
        if ctx.activation != "none":
            z = torch.ops.fanin.gather_matmul(
                x, values, indices, row_ptr, rows, bias, plan, ctx.out_features, "none", residual
            )
            grad = ACTIVATIONS[ctx.activation].backward(grad, z)
        g = grad.reshape(math.prod(x.shape[:-1]), ctx.out_features).to(values.dtype)  # [b, out]
        by_bias = g.sum(0).to(bias.dtype) if wants_bias else None
        by_residual = grad.to(residual.dtype) if wants_residual else None
        if rows is not None:
            g = g[:, rows.to(torch.int64)]  # [b, n]
        by_x = by_values = None
        if wants_x:
            dense = _to_dense(values, indices, row_ptr, x.shape[-1])
            by_x = (g @ dense).view(x.shape).to(x.dtype)
        if wants_values:
            dense = g.t() @ x.reshape(-1, x.shape[-1]).to(g.dtype)  # [n, in]
            columns = indices.to(torch.int64)
            if row_ptr is None:
                by_values = dense.gather(1, columns)
            else:
                by_values = dense[_row_of_each(row_ptr, len(columns)), columns]
        return by_x, by_values, by_bias, by_residual, None


def _with_grad(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    plan: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    y: Tensor = _GatherMatmul.apply(  # type: ignore[no-untyped-call]
        x, values, bias, residual, (indices, row_ptr, rows, plan, out_features, activation)
    )
    return y


def _fake_gather_matmul(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None,
    rows: Tensor | None,
    bias: Tensor | None,
    plan: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"activation {activation!r}: expected one of {[*ACTIVATIONS]}"
    )
    return x.new_empty(*x.shape[:-1], out_features)


def _gather_matmul_flops(
    x: torch.Size, values: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """Two operations per non-zero and batch row; arguments are shapes."""
    return 2 * math.prod(x[:-1]) * math.prod(values)


_library.impl(
    "gather_matmul", _until_native("gather_matmul", reference_gather_matmul), "CompositeExplicitAutograd"
)
_library.impl("gather_matmul", _with_grad, "Autograd")  # any device; C++ takes AutogradCPU
_library.impl("gather_matmul_reference", reference_gather_matmul, "CompositeExplicitAutograd")
_library.impl("gather_matmul_with_grad", _with_grad, "CompositeImplicitAutograd")
_library.impl(
    "gather_matmul_plan", _until_native("gather_matmul_plan", _empty_plan), "CompositeExplicitAutograd"
)
torch.library.register_fake("fanin::gather_matmul", _fake_gather_matmul, lib=_library)
torch.library.register_fake("fanin::gather_matmul_plan", _empty_plan, lib=_library)
register_flop_formula(torch.ops.fanin.gather_matmul)(_gather_matmul_flops)
