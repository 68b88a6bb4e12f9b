"""Fold an eval batch norm into the masked layer or the dense convolution before it.

    h = conv(x, w, b)                          s = gamma / sqrt(var + eps)
    y = batch_norm(h, gamma, beta, mean, var)  ->  y = conv(x, w * s, (b - mean) * s + beta)
    (h has no other user)

A row's scale does not touch its mask, so the fan-in stays what it was. Computed in float64, rounded once. Graphs
without a masked layer are left as they are.
"""

from __future__ import annotations

import torch
from torch import fx

from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    CONDENSED,
    CONVOLUTIONS,
    LAYER,
    NAME,
    add_constant,
    bind_arguments,
    set_layer_weight,
    tensor_meta,
)
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite

aten = torch.ops.aten


def fold_batch_norm(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    if not any(CONDENSED in node.meta for node in gm.graph.nodes):
        return PassResult()
    evaluate = Evaluator(gm)
    for norm in list(gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default)):
        bound = bind_arguments(norm)
        layer = bound["input"]
        if bound["training"] or list(layer.users) != [norm]:
            continue
        dense = None if CONDENSED in layer.meta else _dense_weight(layer, evaluate)
        if CONDENSED not in layer.meta and dense is None:
            continue
        before, after = tensor_meta(layer), tensor_meta(norm)
        if before is None or after is None or before.dtype != after.dtype:
            continue
        if before.ndim != (len(layer.meta[CONDENSED].shape) if dense is None else dense.ndim):
            continue  # batch norm's channels are dimension 1: not a linear's of rows, nor those of one image
        bias = evaluate(bind_arguments(layer)["bias"])
        if bias is None and bind_arguments(layer)["bias"] is not None:
            continue
        statistics = [evaluate(bound[name]) for name in ("running_mean", "running_var")]
        affine = [evaluate(bound[name]) for name in ("weight", "bias")]
        given = [bound[name] is not None for name in ("weight", "bias")]
        if any(value is None for value in statistics) or any(
            g and value is None for g, value in zip(given, affine, strict=True)
        ):
            continue
        mean, var = (value.double() for value in statistics if value is not None)
        scale = (var + bound["eps"]).rsqrt()
        if affine[0] is not None:
            scale = scale * affine[0].double()
        shift = -mean * scale if bias is None else (bias.double() - mean) * scale
        if affine[1] is not None:
            shift = shift + affine[1].double()
        if dense is None:
            name = layer.meta[LAYER].name
            weight = layer.meta[CONDENSED].scaled(scale)
            set_layer_weight(gm, layer, weight, shift.to(weight.values.dtype))
        else:
            target = str(bind_arguments(layer)["weight"].target)
            name = ctx.names.get(target, target)
            scaled = dense.double() * scale.view(-1, *[1] * (dense.ndim - 1))
            constants = {"weight": scaled.to(dense.dtype), "bias": shift.to(dense.dtype)}
            nodes = [add_constant(gm, layer, f"{layer.name}_{kind}", t) for kind, t in constants.items()]
            layer.args = (layer.args[0], *nodes, *layer.args[3:])
            layer.meta[NAME] = name
        norm.replace_all_uses_with(layer)
        gm.graph.erase_node(norm)
        rewritten.append(Rewrite(name, "folded", detail="batch norm folded"))
    return PassResult(tuple(rewritten))


def _dense_weight(layer: fx.Node, evaluate: Evaluator) -> torch.Tensor | None:
    """Of a convolution, if it is constant and no other node reads it."""
    if layer.target not in CONVOLUTIONS or layer.kwargs:
        return None
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or list(weight.users) != [layer]:
        return None
    value = evaluate(weight)
    return value if value is not None and value.layout == torch.strided else None
