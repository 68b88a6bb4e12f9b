"""Which ATen operators treat each element by itself, which of them the kernels know, and which change nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fanin_compile.graph import bind_arguments, tensor_meta

aten = torch.ops.aten


def _clamp_name(node: fx.Node) -> str | None:
    """Of hardtanh and clamp, whose bounds are their second and third argument."""
    _, low, high = bind_arguments(node).values()
    if low != 0:
        return None
    return "relu" if high is None else "relu6" if high == 6 else None


_ACTIVATIONS: dict[object, Callable[[fx.Node], str | None]] = {
    aten.relu.default: lambda _: "relu",
    aten.relu_.default: lambda _: "relu",
    aten.relu6.default: lambda _: "relu6",
    aten.relu6_.default: lambda _: "relu6",
    aten.hardtanh.default: _clamp_name,
    aten.hardtanh_.default: _clamp_name,
    aten.clamp.default: _clamp_name,
    aten.clamp_.default: _clamp_name,
    **dict.fromkeys(
        (aten.clamp_min.default, aten.clamp_min_.default), lambda n: "relu" if n.args[1] == 0 else None
    ),
    aten.gelu.default: lambda n: "gelu_tanh" if n.kwargs.get("approximate") == "tanh" else "gelu",
    aten.silu.default: lambda _: "silu",
    aten.silu_.default: lambda _: "silu",
    aten.hardswish.default: lambda _: "hardswish",
    aten.hardswish_.default: lambda _: "hardswish",
    aten.sigmoid.default: lambda _: "sigmoid",
    aten.sigmoid_.default: lambda _: "sigmoid",
    aten.tanh.default: lambda _: "tanh",
    aten.tanh_.default: lambda _: "tanh",
}
# of one tensor, element by element; the rest of their arguments are numbers
POINTWISE = (
    *(aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default, aten.silu_.default),
    *(aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.sigmoid.default),
    *(aten.sigmoid_.default, aten.tanh.default, aten.tanh_.default, aten.relu6.default, aten.relu6_.default),
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu.default, aten.leaky_relu_.default),
    *(aten.elu.default, aten.elu_.default, aten.celu.default, aten.celu_.default, aten.selu.default),
    *(aten.selu_.default, aten.mish.default, aten.mish_.default, aten.softplus.default, aten.erf.default),
    *(aten.hardsigmoid_.default, aten.threshold.default, aten.threshold_.default, aten.hardshrink.default),
    *(aten.softshrink.default, aten.neg.default, aten.neg_.default, aten.exp.default, aten.exp_.default),
    *(aten.abs.default, aten.abs_.default, aten.square.default, aten.square_.default, aten.sqrt.default),
    *(aten.sqrt_.default, aten.rsqrt.default, aten.reciprocal.default, aten.log1p.default, aten.sin.default),
    *(aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_.default, aten.clamp_min.default),
    *(aten.clamp_min_.default, aten.clamp_max.default, aten.clamp_max_.default, aten.log_sigmoid.default),
    aten.cos.default,
)
# of two
BINARY: dict[object, Callable[..., Tensor]] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.sub_.Tensor: torch.sub,
    aten.rsub.Scalar: torch.rsub,
    aten.rsub.Tensor: torch.rsub,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.div_.Tensor: torch.div,
}
_DROPOUTS = (
    *(aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default),
    *(aten.feature_dropout_.default, aten.alpha_dropout.default, aten.alpha_dropout_.default),
)
_COPIES = (aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default)
CASTS = (aten.to.dtype, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default)


def activation_name(node: fx.Node) -> str | None:
    """The key of ops.ACTIVATIONS of what `node` computes of its first argument, None if there is none."""
    name = _ACTIVATIONS.get(node.target)
    return None if name is None else name(node)


def returns_its_input(node: fx.Node) -> bool:
    """Whether `node` returns its first argument itself: dropout in eval mode, a cast to the dtype it has, what leaves
    autograd, which no graph of the passes has."""
    if node.target is aten.detach_.default:
        return True
    if node.target in _DROPOUTS:
        return bind_arguments(node)["train"] is False
    return node.target in CASTS and node.target is not aten._to_copy.default and _casts_nothing(node)


def keeps_values(node: fx.Node) -> bool:
    """Whether `node` has the values and the shape of its first argument, in whatever memory."""
    return (
        node.target in _COPIES or returns_its_input(node) or (node.target in CASTS and _casts_nothing(node))
    )


def _casts_nothing(node: fx.Node) -> bool:
    before, after = tensor_meta(node.args[0]), tensor_meta(node)
    if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
        return False
    bound = bind_arguments(node)
    return not bound.get("copy") and bound.get("memory_format") is None
