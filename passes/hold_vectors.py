"""Keep copies of biases and other parameters that are vectors.

    linear(x, w, b)    ->    linear(x, w, copy)

Whoever runs the graph notices when the model's own are changed (fanin_compile.freshness, 0.1 us a tensor), and renews
the copies with the packed weights. Read as inputs, each would be guarded by Dynamo at every call, by six guards or so:
0.1 ms of a decoding step of GPT-2. Matrices stay the model's: copies of those would be memory. So do buffers: a user
may well write to them before each call, and renewing the copies means packing every weight anew.
"""

from __future__ import annotations

from torch import fx

from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import add_constant, has_condensed, tensor_meta
from fanin_compile.pipeline import Context, PassResult

MOST_ELEMENTS = 1 << 16


def hold_vectors(gm: fx.GraphModule, ctx: Context) -> PassResult:
    if not ctx.watched or not has_condensed(gm.graph):
        return PassResult()
    evaluate = Evaluator(gm)
    for node in list(gm.graph.find_nodes(op="get_attr")):
        meta = tensor_meta(node)
        if (
            str(node.target) not in ctx.watched
            or meta is None
            or meta.ndim > 1
            or meta.numel() > MOST_ELEMENTS
        ):
            continue
        if not meta.is_floating_point() or any(user.op == "output" for user in node.users):
            continue
        value = evaluate(node)
        if value is not None:
            node.replace_all_uses_with(add_constant(gm, node, f"{node.name}_copy", value.clone()))
            gm.graph.erase_node(node)
    return PassResult()
