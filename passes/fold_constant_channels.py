"""Fold inputs that are constant, as those from ablated neurons are, into the bias of the layer that reads them.

    h = relu(linear(x, w1, b1))    neuron c of w1 has no inputs, so h[..., c] = relu(b1[c])
    y = linear(h, w2, b2)      ->  y = linear(h, w2 with column c empty, b2 + w2[:, c] * relu(b1[c]))

Exact, whoever else reads h. The arithmetic on column c is gone; a neuron left without inputs is constant in its turn,
so chains fold in one sweep. A convolution that pads folds only channels that are 0: the border sees fewer of them.
"""

from __future__ import annotations

import torch
from torch import fx

from fanin_compile.axes import Spread
from fanin_compile.channels import channel_dim, constant_elements, foldable, per_neuron, with_constants
from fanin_compile.condensed import CondensedWeight
from fanin_compile.effects import overwritten
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import CONDENSED, LAYER, bind_arguments, set_layer_weight, use_layer_weight
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten


def fold_constant_channels(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    known: dict[fx.Node, Spread] = {}
    changed = overwritten(gm.graph)
    folded: dict[object, fx.Node] = {}  # a weight called again with the same constants is folded once
    for node in list(gm.graph.nodes):
        if CONDENSED in node.meta and node.args[0] in known:
            done = _fold(gm, node, known[node.args[0]], evaluate, folded)
            if isinstance(done, Skip):
                skipped.append(done)
            elif done:
                detail = f"{done} constant inputs folded"
                rewritten.append(Rewrite(node.meta[LAYER].name, "folded", detail=detail))
        found = constant_elements(node, known, evaluate)
        if found is not None and node not in changed:
            known[node] = found
    return PassResult(tuple(rewritten), tuple(skipped))


def _fold(
    gm: fx.GraphModule,
    node: fx.Node,
    inputs: Spread,
    evaluate: Evaluator,
    folded: dict[object, fx.Node],
) -> int | Skip:
    """How many inputs of the layer were folded away, or why constant ones stay."""
    weight: CondensedWeight = node.meta[CONDENSED]
    name = node.meta[LAYER].name
    bound = bind_arguments(node)
    dim = channel_dim(node)
    values = None if dim is None else per_neuron(inputs, dim)
    if values is None:
        return 0
    groups = bound.get("groups", 1)
    constant = ~values.isnan()
    fold = ~foldable(node, values).isnan()
    mask = weight.mask()
    connected = mask.flatten(2).any(2) if mask.ndim > 2 else mask  # [out, in/groups]
    read = connected.view(groups, -1, connected.shape[1]).any(1).flatten()
    if not bool((read & fold).any()):
        if not bool((read & constant).any()):
            return 0
        described = {"padding": bound["padding"], "channels": int(constant.sum())}
        return Skip(name, "constant inputs stay: padding makes the border differ", described)
    bias = evaluate(bound["bias"]) if bound["bias"] is not None else None
    if bound["bias"] is not None and bias is None:
        return Skip(name, "constant inputs stay: its bias is not constant")
    count = int((read & fold).sum())
    key = (bound["weight"], bound["bias"], str(torch.where(fold, values, torch.nan).tolist()))
    same = folded.setdefault(key, node)
    if same is not node:
        use_layer_weight(node, same.args[1:3], same.meta[CONDENSED])
        return count
    dense = weight.to_dense()
    new_bias = with_constants(dense, torch.where(fold, values, 0.0).view(groups, -1), bias)
    kept = ~fold.view(groups, 1, -1, *[1] * (mask.ndim - 2))
    mask = (mask.view(groups, -1, *mask.shape[1:]) & kept).view(mask.shape)
    set_layer_weight(gm, node, CondensedWeight.from_dense(dense, mask), new_bias)
    return count
