"""Drop the operators which return their input itself, as dropout does in eval mode.

    h = linear(x, w, b)
    d = dropout(h, 0.1, train=False)        ->        y = add(h, r)
    y = add(d, r)

They compute nothing, and stand between a layer and the activation or residual which its epilogue could take.
"""

from __future__ import annotations

from torch import fx

from fanin_compile.graph import Context, PassResult
from fanin_compile.pointwise import returns_its_input


def drop_identities(gm: fx.GraphModule, ctx: Context) -> PassResult:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and returns_its_input(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return PassResult()
