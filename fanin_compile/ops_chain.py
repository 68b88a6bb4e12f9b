"""The chain operator: two linear layers with an activation between them, as one call.

    gather_matmul_chain(x, values, structure, bias?, activation, gated, values2, structure2, bias2?, out_features,
                        activation2, residual?, norm?)
        z = norm(x) @ W.T + bias
        h = activation(z)            or, gated: activation(z[..., :n]) * z[..., n:], n = hidden_features
        y = activation2(h @ W2.T + bias2 + residual)

The kernel keeps a tile of h in cache, in the order in which the second layer reads it: h is never written to memory,
packed or transposed. The reference below is the same in two calls of gather_matmul; it also serves gradients, other
devices and dtypes the kernels do not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .ops import ACTIVATIONS, _gather_matmul_flops, until_native

_ARGUMENTS = (
    "(Tensor x, Tensor values, Tensor structure, Tensor? bias, str activation, bool gated, "
    "Tensor values2, Tensor structure2, Tensor? bias2, int hidden_features, int out_features, "
    'str activation2="none", Tensor? residual=None, Tensor? norm=None) -> Tensor'
)
_library = torch.library.Library("fanin", "FRAGMENT")
_library.define(
    "gather_matmul_chain" + _ARGUMENTS, tags=(torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
)
# called by the C++ kernel for what it leaves to two calls
_library.define("gather_matmul_chain_reference" + _ARGUMENTS)


def reference_gather_matmul_chain(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    values2: Tensor,
    structure2: Tensor,
    bias2: Tensor | None,
    hidden_features: int,
    out_features: int,
    activation2: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """gather_matmul_chain as two calls of gather_matmul, which has gradients.

    Args: see gather_matmul_chain.
    """
    first = torch.ops.fanin.gather_matmul
    if gated:
        z = first(x, values, structure, bias, 2 * hidden_features, norm=norm)
        gate, up = z.split(hidden_features, -1)
        h = ACTIVATIONS[activation].forward(gate) * up
    else:
        h = first(x, values, structure, bias, hidden_features, activation, norm=norm)
    y: Tensor = torch.ops.fanin.gather_matmul(
        h, values2, structure2, bias2, out_features, activation2, residual
    )
    return y


def gather_matmul_chain(
    x: Tensor,
    values: Tensor,
    structure: Tensor,
    bias: Tensor | None,
    activation: str,
    gated: bool,
    values2: Tensor,
    structure2: Tensor,
    bias2: Tensor | None,
    hidden_features: int,
    out_features: int,
    activation2: str = "none",
    residual: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """activation2(h @ W2.T + bias2 + residual), h = activation(norm(x) @ W.T + bias): see the module's docstring.

    Args:
        x: [..., in_features], any strides.
        values, structure: packed W [hidden_features, in_features]; if gated [2 * hidden_features, ...], gates first.
        bias: of W's rows.
        activation, activation2: keys of ops.ACTIVATIONS.
        values2, structure2: packed W2 [out_features, hidden_features].
        residual: [..., out_features].
        norm: of norm.pack_norm, [2, in_features + 1]: x is normalised over its last dimension first.

    Returns: [..., out_features] in x's dtype. The kernel keeps h in fp32, also where x is bf16 or fp16; where it is two
        calls after all (h of eight rows beyond 960 KiB, a small gated layer), h has x's dtype.
    """
    y: Tensor = torch.ops.fanin.gather_matmul_chain(
        *(x, values, structure, bias, activation, gated, values2, structure2, bias2),
        *(hidden_features, out_features, activation2, residual, norm),
    )
    return y


def _fake_chain(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out_features = args[9] if len(args) > 9 else kwargs["out_features"]
    return x.new_empty(*x.shape[:-1], out_features)


def _chain_flops(
    x: torch.Size,
    values: torch.Size,
    s: Any,
    b: Any,
    act: str,
    gated: bool,
    values2: torch.Size,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    return _gather_matmul_flops(x, values) + _gather_matmul_flops(x, values2)


_library.impl(
    "gather_matmul_chain",
    until_native("gather_matmul_chain", reference_gather_matmul_chain),
    "CompositeExplicitAutograd",
)
_library.impl(
    "gather_matmul_chain", reference_gather_matmul_chain, "Autograd"
)  # any device; C++ takes AutogradCPU
_library.impl("gather_matmul_chain_reference", reference_gather_matmul_chain, "CompositeImplicitAutograd")
torch.library.register_fake("fanin::gather_matmul_chain", _fake_chain, lib=_library)
register_flop_formula(torch.ops.fanin.gather_matmul_chain)(_chain_flops)
