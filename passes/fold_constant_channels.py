"""Fold inputs that are constant, as those from ablated neurons are, into the bias of the layer that reads them.

    h = relu(linear(x, w1, b1))    neuron c of w1 has no inputs, so h[..., c] = relu(b1[c])
    y = linear(h, w2, b2)      ->  y = linear(h, w2 with column c empty, b2 + w2[:, c] * relu(b1[c]))

Exact, whoever else reads h. The arithmetic on column c is gone; a neuron left without inputs is constant in its turn,
so chains fold in one sweep. A convolution that pads folds only channels that are 0: the border sees fewer of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fanin_compile.channels import Channels, constant_channels
from fanin_compile.condensed import CondensedWeight
from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    Context,
    Evaluator,
    PassResult,
    bind_arguments,
    overwritten,
    set_layer_weight,
    tensor_meta,
    use_layer_weight,
)
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten


def fold_constant_channels(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    known: dict[fx.Node, Channels] = {}
    changed = overwritten(gm.graph)
    folded: dict[object, fx.Node] = {}  # a weight called again with the same constants is folded once
    for node in list(gm.graph.nodes):
        if CONDENSED in node.meta:
            layer, channels = node.meta[LAYER], known.get(node.args[0])
            if channels is not None:
                refusal = _fold(gm, node, channels, evaluate, folded)
                if isinstance(refusal, Skip):
                    skipped.append(refusal)
                elif refusal:
                    rewritten.append(
                        Rewrite(layer.name, "folded", detail=f"{refusal} constant inputs folded")
                    )
        found = constant_channels(node, known, evaluate)
        if found is not None and node not in changed:
            known[node] = found
    return PassResult(tuple(rewritten), tuple(skipped))


def _fold(
    gm: fx.GraphModule,
    node: fx.Node,
    channels: Channels,
    evaluate: Evaluator,
    folded: dict[object, fx.Node],
) -> int | Skip:
    """How many of the weight's input columns were folded away, or why constant ones stay."""
    weight: CondensedWeight = node.meta[CONDENSED]
    name = node.meta[LAYER].name
    bound = bind_arguments(node)
    meta = tensor_meta(node.args[0])
    linear = node.target is aten.linear.default
    if meta is None or channels.dim != meta.ndim - (len(weight.shape) - 1):
        return 0
    fold = channels.constant
    if not linear:
        if bound["groups"] != 1:
            return Skip(name, "constant inputs stay: grouped convolution", {"groups": bound["groups"]})
        padding = bound["padding"]
        if padding != "valid" and any([padding] if isinstance(padding, int | str) else padding):
            fold = fold & (channels.values == 0)
            if not bool(fold.any()):
                values = {"padding": padding, "channels": int(channels.constant.sum())}
                return Skip(name, "constant inputs stay: padding makes the border differ", values)
    mask = weight.mask()
    read = mask.flatten(2).any(2).any(0) if not linear else mask.any(0)
    if not bool((read & fold).any()):
        return 0
    bias = evaluate(bound["bias"]) if bound["bias"] is not None else None
    if bound["bias"] is not None and bias is None:
        return Skip(name, "constant inputs stay: its bias is not constant")
    constants = str(torch.where(fold, channels.values, torch.inf).tolist())
    same = folded.setdefault((bound["weight"], bound["bias"], constants), node)
    if same is not node:
        use_layer_weight(node, same.args[1:3], same.meta[CONDENSED])
        return int((read & fold).sum())
    dense = weight.to_dense()
    new_bias = _with_constants(dense, fold, channels.values, bias)
    mask[:, fold] = False
    set_layer_weight(gm, node, CondensedWeight.from_dense(dense, mask), new_bias)
    return int((read & fold).sum())


def _with_constants(dense: Tensor, fold: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """bias + what the folded columns contribute, summed in float64."""
    columns = dense.flatten(2).sum(2, dtype=torch.float64) if dense.ndim > 2 else dense.double()
    shift = columns[:, fold] @ values[fold]
    total = shift if bias is None else shift + bias.double()
    return total.to(dense.dtype)
