"""Fold an eval batch norm into the masked layer before it.

    h = conv(x, w, b)                          s = gamma / sqrt(var + eps)
    y = batch_norm(h, gamma, beta, mean, var)  ->  y = conv(x, w * s, (b - mean) * s + beta)
    (h has no other user)

A row's scale does not touch its mask, so the fan-in stays what it was. Computed in float64, rounded once.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx

from fanin_compile.condensed import CondensedWeight
from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    Context,
    Evaluator,
    PassResult,
    bind_arguments,
    set_layer_weight,
    tensor_meta,
)
from fanin_compile.records import Rewrite

aten = torch.ops.aten


def fold_batch_norm(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    evaluate = Evaluator(gm)
    for norm in list(gm.graph.find_nodes(op="call_function", target=aten.batch_norm.default)):
        bound = bind_arguments(norm)
        layer = bound["input"]
        if bound["training"] or CONDENSED not in layer.meta or list(layer.users) != [norm]:
            continue
        before, after = tensor_meta(layer), tensor_meta(norm)
        if before is None or after is None or before.dtype != after.dtype:
            continue
        if layer.target is aten.linear.default and before.ndim != 2:
            continue  # batch norm's channels are dimension 1, a linear's are the last
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
        weight = _scaled(layer.meta[CONDENSED], scale)
        set_layer_weight(gm, layer, weight, shift.to(weight.values.dtype))
        norm.replace_all_uses_with(layer)
        gm.graph.erase_node(norm)
        rewritten.append(Rewrite(layer.meta[LAYER].name, "folded", detail="batch norm folded"))
    return PassResult(tuple(rewritten))


def _scaled(weight: CondensedWeight, scale: torch.Tensor) -> CondensedWeight:
    """Each row times its scale [out]; the structure is untouched, so a scale of 0 keeps its row."""
    rows = scale if weight.rows is None else scale[weight.rows.long()]
    factors = rows.repeat_interleave(weight.row_fan_in(), output_size=weight.nnz).view_as(weight.values)
    return dataclasses.replace(weight, values=(weight.values.double() * factors).to(weight.values.dtype))
