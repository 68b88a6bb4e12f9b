"""Which channels of an activation are constant, and what they are: the analysis behind removing ablated neurons.

A neuron without inputs outputs its bias whatever the model is fed. This file follows such constants forward through
the graph: pointwise functions, eval batch norm, pooling, reshapes, slices, concatenations, residual adds. What mixes
channels (layer norm, softmax, attention) ends the trail.

A product is constant 0 where one factor is, so finite activations are assumed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile.graph import CONDENSED, CONVOLUTIONS, Evaluator, bind_arguments, tensor_meta

aten = torch.ops.aten


@dataclass(frozen=True)
class Channels:
    """Along dimension `dim` of a tensor, channel c equals values[c] everywhere if constant[c].

    Attributes:
        dim: counted from the left.
        constant: bool [C].
        values: float64 [C], meaningful where constant.
    """

    dim: int
    constant: Tensor
    values: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Channels:
        return Channels(self.dim, self.constant, function(self.values))


Known = Mapping[fx.Node, Channels]
Transfer = Callable[[fx.Node, Known, Evaluator], Channels | None]

POINTWISE = (
    *(aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default, aten.silu_.default),
    *(aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default, aten.sigmoid.default),
    *(aten.sigmoid_.default, aten.tanh.default, aten.tanh_.default, aten.relu6.default, aten.relu6_.default),
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.leaky_relu.default, aten.leaky_relu_.default),
    *(aten.elu.default, aten.elu_.default, aten.mish.default, aten.softplus.default, aten.neg.default),
    *(aten.exp.default, aten.abs.default, aten.pow.Tensor_Scalar, aten.clamp.default, aten.erf.default),
)
BINARY: dict[object, Callable[..., Tensor]] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
}
SAME_VALUE = (
    *(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default),
    *(aten.to.dtype, aten._to_copy.default, aten.dropout.default, aten.dropout_.default),
)
SPATIAL_MEANS = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
)
MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVG_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
RESHAPES = (
    *(aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unsqueeze.default),
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
)
PERMUTES = (aten.transpose.int, aten.permute.default, aten.t.default)


def constant_channels(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    """The constant channels of `node` by those of its inputs; None if none are known."""
    if node.op != "call_function":
        return None
    if CONDENSED in node.meta:
        return _layer(node, evaluate)
    transfer = _TRANSFERS.get(node.target)
    if transfer is None:
        return None
    channels = transfer(node, known, evaluate)
    return channels if channels is not None and bool(channels.constant.any()) else None


def channel_dim(node: fx.Node) -> int | None:
    """The dimension of a linear's or convolution's output that counts its neurons."""
    meta = tensor_meta(node)
    if meta is None:
        return None
    return meta.ndim - (1 if node.target is aten.linear.default else CONVOLUTIONS[node.target] + 1)


def _layer(node: fx.Node, evaluate: Evaluator) -> Channels | None:
    weight = node.meta[CONDENSED]
    dim = channel_dim(node)
    if weight.rows is None or dim is None:
        return None
    constant = torch.ones(weight.out_features, dtype=torch.bool)
    constant[weight.rows.long()] = False
    bias = bind_arguments(node)["bias"]
    if bias is None:
        return Channels(dim, constant, torch.zeros(weight.out_features, dtype=torch.float64))
    values = evaluate(bias)
    return None if values is None else Channels(dim, constant, values.double())


def _pointwise(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    channels = known.get(node.args[0])  # type: ignore[arg-type]
    if channels is None:
        return None
    function: Any = node.target
    # on a copy: the op may work in place
    return channels.map(lambda v: function(v.clone(), *node.args[1:], **node.kwargs))


def _same(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    if node.target in (aten.dropout.default, aten.dropout_.default) and node.args[2]:
        return None
    return known.get(node.args[0])  # type: ignore[arg-type]


def _binary(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    function = BINARY[node.target]
    out = tensor_meta(node)
    sides = [_operand(arg, known, evaluate, out) for arg in node.args[:2]]
    named = [s for s in sides if isinstance(s, Channels)]
    if out is None or not named or len({s.dim for s in named}) != 1:
        return None
    dim, size = named[0].dim, len(named[0].constant)
    constants, values = [], []
    for side in sides:
        if side is None:
            constants.append(torch.zeros(size, dtype=torch.bool))
            values.append(torch.zeros(size, dtype=torch.float64))
        elif isinstance(side, Channels):
            constants.append(side.constant)
            values.append(side.values)
        else:
            vector = _per_channel(side, dim, out.ndim, size)
            if vector is None:
                return None
            constants.append(torch.ones(size, dtype=torch.bool))
            values.append(vector)
    constant = constants[0] & constants[1]
    result = function(values[0], values[1], **node.kwargs)  # alpha
    if function is torch.mul:
        for c, v in zip(constants, values, strict=True):
            zero = c & (v == 0)
            constant, result = constant | zero, torch.where(zero, 0.0, result)
    return Channels(dim, constant, result)


def _operand(arg: Any, known: Known, evaluate: Evaluator, out: Tensor | None) -> Channels | Tensor | None:
    """Channels in the coordinates of `out`, a constant tensor, or None: unknown."""
    if isinstance(arg, int | float):
        return torch.tensor(float(arg), dtype=torch.float64)
    meta = tensor_meta(arg)
    if arg in known and meta is not None and out is not None:
        channels = known[arg]
        if meta.shape[channels.dim] != out.shape[channels.dim + out.ndim - meta.ndim]:
            return None
        return Channels(channels.dim + out.ndim - meta.ndim, channels.constant, channels.values)
    value = evaluate(arg)
    return None if value is None else value.double()


def _per_channel(value: Tensor, dim: int, ndim: int, size: int) -> Tensor | None:
    """[size] if a constant tensor, broadcast to ndim dimensions, varies along `dim` at most."""
    if value.numel() == 1:
        return value.reshape(1).expand(size)
    position = dim - (ndim - value.ndim)
    if 0 <= position < value.ndim and value.shape[position] == value.numel() == size:
        return value.reshape(size)
    return None


def _batch_norm(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    bound = bind_arguments(node)
    channels = known.get(bound["input"])
    if channels is None or bound["training"] or channels.dim != 1:
        return None
    mean, var = evaluate(bound["running_mean"]), evaluate(bound["running_var"])
    weight, bias = evaluate(bound["weight"]), evaluate(bound["bias"])
    if mean is None or var is None:
        return None
    scale = (1.0 if weight is None else weight.double()) / (var.double() + bound["eps"]).sqrt()
    shift = 0.0 if bias is None else bias.double()
    return channels.map(lambda v: (v - mean.double()) * scale + shift)


def _pool(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    bound = bind_arguments(node)
    channels = known.get(bound["self"])
    out = tensor_meta(node)
    if channels is None or out is None:
        return None
    padded = bound.get("padding") not in (0, None) and any(_list(bound["padding"]))
    if node.target in AVG_POOLS and padded and bound["count_include_pad"]:
        return None  # the border would average in zeros
    return channels if channels.dim < out.ndim - pool_dims(node) else None


def pool_dims(node: fx.Node) -> int:
    """How many dimensions, the last ones, a pool pools over."""
    return int(str(node.target).split("pool")[1][0])


def _list(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _mean(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    bound = bind_arguments(node)
    channels, meta = known.get(bound["self"]), tensor_meta(bound["self"])
    if channels is None or meta is None or bound["dim"] is None:
        return None
    dims = {d % meta.ndim for d in _list(bound["dim"])}
    if channels.dim in dims:
        return None
    left = 0 if bound["keepdim"] else sum(d < channels.dim for d in dims)
    return Channels(channels.dim - left, channels.constant, channels.values)


def _reshape(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    """Keeps [..., C, inner] apart or merges C with what follows: each channel then covers `inner` new ones."""
    channels, before, after = known.get(node.args[0]), tensor_meta(node.args[0]), tensor_meta(node)  # type: ignore[arg-type]
    if channels is None or before is None or after is None:
        return None
    tail, count = list(before.shape[channels.dim :]), len(channels.constant)
    if not all(isinstance(s, int) for s in tail):
        return None
    inner = math.prod(tail[1:])
    # [C, *inner] or [C, inner] at the end, whatever became of the dimensions before
    for end in (tail, [count, inner]):
        if list(after.shape[-len(end) :]) == end:
            return Channels(after.ndim - len(end), channels.constant, channels.values)
    if after.ndim and after.shape[-1] == count * inner:
        return Channels(
            after.ndim - 1,
            channels.constant.repeat_interleave(inner),
            channels.values.repeat_interleave(inner),
        )
    return None


def _permute(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    channels, meta = known.get(node.args[0]), tensor_meta(node.args[0])  # type: ignore[arg-type]
    if channels is None or meta is None:
        return None
    return Channels(permuted(node, meta.ndim).index(channels.dim), channels.constant, channels.values)


def permuted(node: fx.Node, ndim: int) -> list[int]:
    """For a transpose, t or permute node: which input dimension each output dimension is."""
    args: Any = node.args
    if node.target is aten.permute.default:
        return [d % ndim for d in args[1]]
    a, b = (0, ndim - 1) if node.target is aten.t.default else (args[1] % ndim, args[2] % ndim)
    order = list(range(ndim))
    order[a], order[b] = order[b], order[a]
    return order


def _cat(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    tensors = node.args[0]
    out = tensor_meta(node)
    if out is None or not isinstance(tensors, list | tuple):
        return None
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % out.ndim  # type: ignore[arg-type]
    constants, values = [], []
    for tensor in tensors:
        channels, meta = known.get(tensor), tensor_meta(tensor)  # type: ignore[arg-type]
        if meta is None or meta.ndim != out.ndim or not isinstance(size := meta.shape[dim], int):
            return None  # cat also takes an empty vector among tensors of any rank
        if channels is not None and channels.dim == dim:
            constants.append(channels.constant)
            values.append(channels.values)
        else:
            constants.append(torch.zeros(size, dtype=torch.bool))
            values.append(torch.zeros(size, dtype=torch.float64))
    return Channels(dim, torch.cat(constants), torch.cat(values))


def _slice(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    bound = bind_arguments(node)
    channels, meta = known.get(bound["self"]), tensor_meta(bound["self"])
    if channels is None or meta is None:
        return None
    if bound["dim"] % meta.ndim != channels.dim:
        return channels
    span = slice(bound["start"], bound["end"], bound["step"])
    if not all(isinstance(s, int | None) for s in (span.start, span.stop, span.step)):
        return None
    return Channels(channels.dim, channels.constant[span], channels.values[span])


def _piece(node: fx.Node, known: Known, evaluate: Evaluator) -> Channels | None:
    """getitem of chunk or split."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    if source.target not in (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default):
        return None
    channels, meta = known.get(source.args[0]), tensor_meta(source.args[0])  # type: ignore[arg-type]
    if channels is None or meta is None:
        return None
    dim = (int(source.args[2]) if len(source.args) > 2 else 0) % meta.ndim  # type: ignore[arg-type]
    if dim != channels.dim:
        return channels
    sizes = [piece.shape[dim] for piece in source.meta["val"]]
    start = sum(sizes[:index])
    span = slice(start, start + sizes[index])
    return Channels(dim, channels.constant[span], channels.values[span])


_TRANSFERS: dict[object, Transfer] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(SAME_VALUE, _same),
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys((*SPATIAL_MEANS, *MAX_POOLS, *AVG_POOLS), _pool),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(PERMUTES, _permute),
    aten.batch_norm.default: _batch_norm,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    operator.getitem: _piece,
}
