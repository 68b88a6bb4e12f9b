"""Swap masked linears for condensed gather-matmuls.

    y = linear(x, w, b)    ->    y = fanin.gather_matmul(x, values, structure, b, out)

The weight's zeros are gone from memory and from the arithmetic; y keeps its shape: an ablated neuron's is its bias.
"""

from __future__ import annotations

import torch
from torch import fx

from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    REFUSAL,
    ConstantNodes,
    bind_arguments,
    kernel_refuses,
    replace_node,
)
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip


def condense_linear(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    constants = ConstantNodes(gm)
    details: dict[fx.Node, str] = {}
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)):
        layer, weight = node.meta.get(LAYER), node.meta.get(CONDENSED)
        if layer is None or weight is None:
            continue
        bound = bind_arguments(node)
        x, dense, bias = bound["input"], bound["weight"], bound["bias"]
        refusal = kernel_refuses(node, layer.name, weight, x, bias) or ctx.gate(layer)
        if refusal is not None:
            node.meta[REFUSAL] = refusal
            skipped.append(refusal)
            continue
        if dense not in constants:
            packing = ctx.pack(weight.with_dtype(ctx.values_dtype), layer)
            if isinstance(packing, Skip):
                node.meta[REFUSAL] = packing
                skipped.append(packing)
                continue
            packed, details[dense] = packing
            constants.add(dense, values=packed.values, structure=packed.structure)
        values, structure = constants[dense]
        replace_node(
            node,
            torch.ops.fanin.gather_matmul.default,
            (x, values, structure, bias, weight.out_features),
        )
        nbytes = constants.nbytes(dense)
        rewritten.append(
            Rewrite(layer.name, "gather-matmul", bytes=nbytes, macs=layer.sparse_macs, detail=details[dense])
        )
    return PassResult(tuple(rewritten), tuple(skipped))
