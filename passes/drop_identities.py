"""Drop the operators which return their input itself, as dropout does in eval mode, or a needless copy of it.

    h = linear(x, w, b)
    d = dropout(h, 0.1, train=False)        ->        y = add(h, r)
    y = add(d, r)

They compute nothing, and stand between a layer and the activation or residual which its epilogue could take.
Padding by zeros on every side, as models with TensorFlow's rule of padding do, copies: it goes where nobody can tell.
"""

from __future__ import annotations

from torch import fx

from fanin_compile.graph import Context, PassResult, copy_is_needless
from fanin_compile.moves import pads_nothing
from fanin_compile.pointwise import returns_its_input


def drop_identities(gm: fx.GraphModule, ctx: Context) -> PassResult:
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if returns_its_input(node) or (pads_nothing(node) and copy_is_needless(node)):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    return PassResult()
