"""Which elements of an activation are constant, and what they are: the analysis behind removing ablated neurons.

A neuron without inputs outputs its bias whatever the model is fed. This file follows such constants forward through
the graph: pointwise functions, eval batch norm, pooling, whatever moves elements, residual adds, depthwise
convolutions, the values of attention. What mixes neurons (layer norm, other layers) ends the trail.

Constants are float64, NaN where unknown; what is not finite is unknown. A product is constant 0 where one factor is, so
finite activations are assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile.attention import ATTENTION, PRODUCTS, averaged, sums_to_one
from fanin_compile.axes import Spread, together
from fanin_compile.effects import overwritten
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import CONDENSED, CONVOLUTIONS, bind_arguments, tensor_meta
from fanin_compile.moves import AVG_POOLS, CATS, DROPOUTS, PADS, is_move, moved
from fanin_compile.pointwise import BINARY, POINTWISE

aten = torch.ops.aten

Known = Mapping[fx.Node, Spread]


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
    elif node.target is aten.prelu.default:
        found = _prelu(node, meta, known, evaluate)
    elif node.target is aten.instance_norm.default:
        found = _instance_norm(node, meta, known, evaluate)
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
    facts = facts.movedim(dim, 0)
    facts = facts.reshape(len(facts), -1)  # [shape[dim] or 1, elements]
    same = (facts == facts[:, :1]).all(1)
    values: Tensor = torch.where(same, facts[:, 0], torch.nan).expand(size)
    return values


def _known_or_not(node: fx.Node, arg: Any, known: Known) -> Spread | None:
    """What is known of an argument; for one of several tensors put end to end nothing may be."""
    spread = known.get(arg)
    meta = tensor_meta(arg)
    if spread is None and node.target in CATS and meta is not None:
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
    if spread is None or len(node.all_input_nodes) > 1:
        return None
    function: Any = node.target
    # on a copy: the op may work in place; and not all functions keep NaN
    values = function(spread.data.clone(), *node.args[1:], **node.kwargs)
    return spread.with_data(torch.where(spread.data.isnan(), torch.nan, values))


def _binary(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    alpha = dict(zip(("alpha",), node.args[2:], strict=False)) | node.kwargs  # rsub takes it by position
    if any(isinstance(value, fx.Node) for value in alpha.values()):
        return None
    if not any(arg in known for arg in node.args[:2]):
        return None
    sides = together([_operand(arg, known, evaluate) for arg in node.args[:2]], tuple(out.shape))
    if sides is None:
        return None
    function = BINARY[node.target]
    a, b = (side.data for side in sides)
    result = function(a, b, **alpha)
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


def _prelu(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    spread, slope = known.get(node.args[0]), evaluate(node.args[1])  # type: ignore[arg-type]
    if spread is None or slope is None:
        return None
    shape, slope = tuple(out.shape), slope.double()
    slopes = Spread.of(slope.reshape(())) if slope.numel() == 1 else Spread.along(shape, 1, slope)
    sides = together([spread, slopes], shape)
    if sides is None:
        return None
    x, w = (side.data for side in sides)
    return sides[0].with_data(torch.where(x >= 0, x, w * x))


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


def _instance_norm(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    """Over each channel of each image: one that is the same throughout is the bias then."""
    bound = bind_arguments(node)
    spread, bias = known.get(bound["input"]), bound["bias"]
    if spread is None or not bound["use_input_stats"] or any(map(spread.varies, range(2, out.ndim))):
        return None
    shift = torch.zeros(int(out.shape[1])) if bias is None else evaluate(bias)
    if shift is None:
        return None
    shape = tuple(out.shape)
    sides = together([spread, Spread.along(shape, 1, shift.double())], shape)
    if sides is None:
        return None
    return sides[0].with_data(torch.where(sides[0].data.isnan(), torch.nan, sides[1].data))


def _depthwise(node: fx.Node, out: Tensor, known: Known, evaluate: Evaluator) -> Spread | None:
    """A dense convolution, one input to each neuron, of constant inputs: w summed * input + b."""
    bound = bind_arguments(node)
    source, meta, dim = known.get(bound["input"]), tensor_meta(bound["input"]), channel_dim(node)
    if source is None or meta is None or dim is None or bound["groups"] != meta.shape[dim]:
        return None
    values = per_neuron(source, dim)
    if values is None or out.shape[dim] != len(values) or bool(values.isnan().all()):
        return None
    values = foldable(node, values)
    weight = evaluate(bound["weight"])
    bias = None if bound["bias"] is None else evaluate(bound["bias"])
    if weight is None or (bias is None) != (bound["bias"] is None):
        return None
    values = values * weight.flatten(1).sum(1, dtype=torch.float64)
    return Spread.along(tuple(out.shape), dim, values if bias is None else values + bias.double())


def foldable(node: fx.Node, values: Tensor) -> Tensor:
    """Of the constant inputs [in] of a layer those that can be part of its bias, NaN elsewhere: a convolution that pads
    sees less of others than 0 at the border."""
    return torch.where(values == 0, values, torch.nan) if _pads(node) else values


def with_constants(dense: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """bias + what inputs of these values [groups, in/groups] contribute, summed in float64."""
    columns = dense.flatten(2).sum(2, dtype=torch.float64) if dense.ndim > 2 else dense.double()
    shift = torch.einsum("goi,gi->go", columns.view(len(values), -1, values.shape[1]), values).flatten()
    return (shift if bias is None else shift + bias.double()).to(dense.dtype)


def _pads(node: fx.Node) -> bool:
    """Whether a layer is a convolution that adds a border."""
    padding = bind_arguments(node).get("padding", 0)
    return padding != "valid" and any([padding] if isinstance(padding, int | str) else padding)


def _weighted(node: fx.Node, out: Tensor, known: Known) -> Spread | None:
    """Attention's output where its values are the same at all positions: itself, as weights sum to 1; 0 where they
    may not."""
    values: Any = node.args[2 if node.target is ATTENTION else 1]
    spread = averaged(known.get(values), out)
    if spread is None or sums_to_one(node):
        return spread
    return spread.with_data(torch.where(spread.data == 0, spread.data, torch.nan))
