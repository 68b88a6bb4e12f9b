"""Write the gated linear unit behind a masked layer as the operators it is made of.

    y = glu(h, dim)    ->    a, b = chunk(h, 2, dim);  y = a * sigmoid(b)

As one operator it reads a layer's neurons whole; as a product, neurons are followed through it, and a gate of halves is
one call with the layer that reads it.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from fanin_compile.graph import LAYER, bind_arguments, renew_value, replace_node
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite

aten = torch.ops.aten


def spell_out_glu(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    for node in list(gm.graph.find_nodes(op="call_function", target=aten.glu.default)):
        layer = node.args[0]
        if not isinstance(layer, fx.Node) or LAYER not in layer.meta:
            continue
        with gm.graph.inserting_before(node):
            halves = gm.graph.call_function(aten.chunk.default, (layer, 2, bind_arguments(node)["dim"]))
            value, gate = (gm.graph.call_function(operator.getitem, (halves, i)) for i in range(2))
            opened = gm.graph.call_function(aten.sigmoid.default, (gate,))
        for new in (halves, value, gate, opened):
            new.meta = dict(node.meta)
            renew_value(gm.graph, new)
        replace_node(node, aten.mul.Tensor, (value, opened))
        rewritten.append(Rewrite(layer.meta[LAYER].name, "activation", detail="glu written as a product"))
    return PassResult(tuple(rewritten))
