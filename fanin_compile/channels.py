"""Which elements of an activation are constant, and what they are: the analysis behind removing ablated neurons.

A neuron without inputs outputs its bias whatever the model is fed. This file follows such constants forward through
the graph: pointwise functions, eval batch norm, pooling, whatever moves elements, residual adds, depthwise
convolutions, the values of attention. What mixes neurons (layer norm, other layers) ends the trail.

Constants are float64, NaN where unknown; what is not finite is unknown. A product is constant 0 where one factor is, so
finite activations are assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.axes import Spread, together
from fanin_compile.graph import CONDENSED, CONVOLUTIONS, Evaluator, bind_arguments, overwritten, tensor_meta
from fanin_compile.moves import AVG_POOLS, PADS, SAME, VIEWS, is_move, moved

aten = torch.ops.aten

Known = Mapping[fx.Node, Spread]

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
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.bmm.default, aten.matmul.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
_RESHAPES = (*VIEWS, aten.unsqueeze.default, aten.slice.Tensor, aten.expand.default, aten.contiguous.default)
DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)


def constants(graph: fx.Graph, evaluate: Evaluator) -> dict[fx.Node, Spread]:
    """The constant elements of every node's tensor that has some."""
    known: dict[fx.Node, Spread] = {}
    changed = overwritten(graph)
    for node in graph.nodes:
        found = constant_elements(node, known, evaluate)
        if found is not None and node not in changed:
            known[node] = found
    return known


def constant_elements(node: fx.Node, known: Known, evaluate: Evaluator) -> Spread | None:
    """The constant elements of `node` by those of its inputs; None if none are known."""
    meta = tensor_meta(node)
    if node.op != "call_function" or meta is None or not meta.dtype.is_floating_point:
        return None
    found = None
    if CONDENSED in node.meta:
        found = _layer(node, evaluate)
    elif node.target in POINTWISE:
        found = _pointwise(node, known)
    elif node.target in BINARY:
        found = _binary(node, meta, known, evaluate)
    elif node.target is aten.batch_norm.default:
        found = _batch_norm(node, meta, known, evaluate)
    elif node.target in CONVOLUTIONS:
        found = _depthwise(node, meta, known, evaluate)
    elif node.target is ATTENTION or node.target in PRODUCTS:
        found = _weighted(node, meta, known)
    elif is_move(node) and _keeps_values(node):
        found = moved(node, lambda arg: _known_or_not(node, arg, known), _same_or_unknown)
        if found is not None and node.target in PADS:
            found = _padded(node, found)
    if found is None:
        return None
    finite = torch.where(found.data.isfinite(), found.data, torch.nan)
    return None if bool(finite.isnan().all()) else found.with_data(finite)


def channel_dim(node: fx.Node) -> int | None:
    """The dimension of a linear's or convolution's output, or input, that counts its neurons."""
    meta = tensor_meta(node)
    if meta is None:
        return None
    return meta.ndim - (1 if node.target is aten.linear.default else CONVOLUTIONS[node.target] + 1)


def per_neuron(spread: Spread, dim: int) -> Tensor | None:
    """[shape[dim]]: constants of the slices along `dim`, NaN where one holds several; None if its size is symbolic."""
    facts = spread.by_dim()
    size = spread.shape[dim]
    if facts is None or not isinstance(size, int):
        return None
    facts = facts.movedim(dim, 0).flatten(1)  # [shape[dim] or 1, elements]
    same = (facts == facts[:, :1]).all(1)
    values: Tensor = torch.where(same, facts[:, 0], torch.nan).expand(size)
    return values


def _known_or_not(node: fx.Node, arg: Any, known: Known) -> Spread | None:
    """What is known of an argument; for one of several tensors put end to end nothing may be."""
    spread = known.get(arg)
    meta = tensor_meta(arg)
    if spread is None and node.target is aten.cat.default and meta is not None:
        return Spread.of(torch.tensor(torch.nan, dtype=torch.float64)).broadcast(tuple(meta.shape))
    return spread


def _same_or_unknown(data: list[Tensor]) -> Tensor:
    """Of elements that share one fact, the one they have in common."""
    first: Tensor
    first, *others = torch.broadcast_tensors(*data)
    for other in others:
        first = torch.where(first == other, first, torch.nan)
    return first


def _keeps_values(node: fx.Node) -> bool:
    if node.target in DROPOUTS:
        return not node.args[2]
    if node.target in AVG_POOLS:
        bound = bind_arguments(node)
        padding = bound["padding"]
        padded = any([padding] if isinstance(padding, int) else padding)
        # the border would average in zeros
        return not (padded and bound["count_include_pad"]) and bound.get("divisor_override") is None
    return True


def _padded(node: fx.Node, found: Spread) -> Spread | None:
    bound = bind_arguments(node)
    if bound.get("mode", "constant") != "constant":
        return found  # others repeat what is there
    fill = bound["value"] or 0.0
    pads: Any = node.args[1]
    if not isinstance(fill, int | float) or not any(pads):
        return found if isinstance(fill, int | float) else None
    return found.with_data(torch.where(found.data == fill, found.data, torch.nan))


def _layer(node: fx.Node, evaluate: Evaluator) -> Spread | None:
    weight, meta, dim = node.meta[CONDENSED], tensor_meta(node), channel_dim(node)
    if weight.rows is None or meta is None or dim is None:
        return None
    bias = bind_arguments(node)["bias"]
    values = torch.zeros(weight.out_features, dtype=torch.float64)
    if bias is not None:
        given = evaluate(bias)
        if given is None:
            return None
        values = given.double().clone()
    values[weight.rows.long()] = torch.nan
    return Spread.along(tuple(meta.shape), dim, values)


def _pointwise(node: fx.Node, known: Known) -> Spread | None:
    spread = known.get(node.args[0])  # type: ignore[arg-type]
    if spread is None:
        return None
    function: Any = node.target
    # on a copy: the op may work in place; and not all functions keep NaN
    values = function(spread.data.clone(), *node.args[1:], **node.kwargs)
    return spread.with_data(torch.where(spread.data.isnan(), torch.nan, values))


def _binary(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    if not any(arg in known for arg in node.args[:2]):
        return None
    sides = together([_operand(arg, known, evaluate) for arg in node.args[:2]], tuple(out.shape))
    if sides is None:
        return None
    function = BINARY[node.target]
    a, b = (side.data for side in sides)
    result = function(a, b, **node.kwargs)  # alpha
    if function is torch.mul:
        result = torch.where((a == 0) | (b == 0), 0.0, result)
    return sides[0].with_data(result)


def _operand(arg: Any, known: Known, evaluate: Evaluator) -> Spread:
    """The constant elements of a number, of a constant tensor, of a node: in float64, NaN where unknown."""
    if isinstance(arg, int | float):
        return Spread.of(torch.tensor(float(arg), dtype=torch.float64))
    if arg in known:
        return known[arg]
    value = evaluate(arg)
    if value is not None:
        return Spread.of(value.double())
    return Spread.of(torch.tensor(torch.nan, dtype=torch.float64))


def _batch_norm(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    bound = bind_arguments(node)
    spread = known.get(bound["input"])
    if spread is None or bound["training"]:
        return None
    given = [bound[name] for name in ("running_mean", "running_var", "weight", "bias")]
    mean, var, weight, bias = (evaluate(arg) for arg in given)
    if (
        mean is None
        or var is None
        or (weight is None) != (given[2] is None)
        or (bias is None) != (given[3] is None)
    ):
        return None
    scale = (1.0 if weight is None else weight.double()) / (var.double() + bound["eps"]).sqrt()
    shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
    shape = tuple(out.shape)
    sides = together([spread, Spread.along(shape, 1, scale), Spread.along(shape, 1, shift)], shape)
    return None if sides is None else sides[0].with_data(sides[0].data * sides[1].data + sides[2].data)


def _depthwise(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    """A dense convolution, one input to each neuron, of constant inputs: w summed * input + b."""
    bound = bind_arguments(node)
    source, meta, dim = known.get(bound["input"]), tensor_meta(bound["input"]), channel_dim(node)
    if source is None or meta is None or dim is None or bound["groups"] != meta.shape[dim]:
        return None
    values = per_neuron(source, dim)
    if values is None or out.shape[dim] != len(values) or bool(values.isnan().all()):
        return None
    if pads(bound["padding"]):
        values = torch.where(values == 0, values, torch.nan)  # the border sees less of the others
    weight = evaluate(bound["weight"])
    bias = None if bound["bias"] is None else evaluate(bound["bias"])
    if weight is None or (bias is None) != (bound["bias"] is None):
        return None
    values = values * weight.flatten(1).sum(1, dtype=torch.float64)
    return Spread.along(tuple(out.shape), dim, values if bias is None else values + bias.double())


def pads(padding: Any) -> bool:
    """Whether a convolution with this argument adds a border."""
    return padding != "valid" and any([padding] if isinstance(padding, int | str) else padding)


def _weighted(node: fx.Node, out: Tensor, known: Known) -> Spread | None:
    """Attention's output where its values are the same at all positions: itself, as weights sum to 1; 0 where they
    may not."""
    values: Any = node.args[2 if node.target is ATTENTION else 1]
    spread, meta = known.get(values), tensor_meta(values)
    if (
        spread is None
        or meta is None
        or meta.ndim < 3
        or meta.ndim != out.ndim
        or spread.varies(out.ndim - 2)
    ):
        return None
    if not _sums_to_one(node):
        spread = spread.with_data(torch.where(spread.data == 0, spread.data, torch.nan))
    shape = tuple(out.shape)
    if not statically_known_true(sym_eq(spread.shape[:-2], shape[:-2])):
        return None  # heads or batches are broadcast
    return spread.resized(shape, (out.ndim - 2,))


def _sums_to_one(node: fx.Node) -> bool:
    """Whether the weights by which a product or an attention averages its values do, at every position."""
    if node.target is ATTENTION:
        bound = bind_arguments(node)
        if bound["dropout_p"] or bound["enable_gqa"]:
            return False
        return bound["attn_mask"] is None or hides_nothing(bound["attn_mask"])
    weights: Any = node.args[0]
    while weights.target in SAME and not (weights.target in DROPOUTS and weights.args[2]):
        weights = weights.args[0]
    meta = tensor_meta(weights)
    if weights.target not in SOFTMAXES or meta is None:
        return False
    return bool(weights.args[1] % meta.ndim == meta.ndim - 1)


def hides_nothing(mask: object) -> bool:
    """Whether a boolean attention mask is True throughout: `arange(n) + a >= b`, a >= b, however shaped."""
    while isinstance(mask, fx.Node) and mask.target in _RESHAPES:
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.target is not aten.ge.Scalar:
        return False
    least, bound = 0.0, mask.args[1]
    source: Any = mask.args[0]
    while isinstance(source, fx.Node) and source.target is not aten.arange.default:
        if source.target is aten.add.Tensor and not source.kwargs and isinstance(source.args[1], int):
            least += source.args[1]
        elif source.target not in _RESHAPES:
            return False
        source = source.args[0]
    return isinstance(source, fx.Node) and isinstance(bound, int | float) and least >= bound


def feeds_softmax(node: fx.Node) -> bool:
    """Whether all that becomes of `node` is a softmax over its last dimension, after factors and sums at most: what is
    added to all elements of a row alike changes nothing."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in SOFTMAXES:
            meta = tensor_meta(user)
            return meta is not None and bool(user.args[1] % meta.ndim == meta.ndim - 1)  # type: ignore[operator]
        scaled = user.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(user.args[1], int | float)
        summed = user.target is aten.add.Tensor and user.args[0] is not user.args[1]
        if not (scaled or summed):
            return False
        node = user
    return False
