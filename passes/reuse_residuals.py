"""Let pointwise convolutions write their output over the residual that they add, where nobody else reads it any more.

    y = gather_conv(x, ..., residual=r); z = f(y)    ->    gather_conv_(x, ..., r); z = f(r)

Such a layer is bound by memory: its output's cache lines are read before they are written, and here they are those of
the residual. It is overwritten if an operator of ours made it, all other readers come before, and none of them hands it
on as a view. Spatial layers compute some pixels twice, so they keep an output of their own.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.effects import is_view
from fanin_compile.graph import LAYER, PLANAR, bind_arguments, replace_node, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite

_OURS = (torch.ops.fanin.gather_matmul.default, torch.ops.fanin.gather_matmul_chain.default, *PLANAR)


def reuse_residuals(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    if not ctx.in_place:
        return PassResult()
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.fanin.gather_conv.default)):
        args = bind_arguments(node)
        residual = args["residual"]
        pointwise = all(k == 1 for k in args["weight_shape"][2:]) and not any(args["padding"])
        if not pointwise or not isinstance(residual, fx.Node) or not _free(residual, node):
            continue
        layer = node.meta.get(LAYER)
        node.replace_all_uses_with(residual)
        new = replace_node(node, torch.ops.fanin.gather_conv_.default, tuple(args.values()))
        new.meta["val"] = None
        rewritten.append(
            Rewrite(layer.name if layer else node.name, "epilogue", detail="in place of the residual")
        )
    return PassResult(tuple(rewritten))


def _free(residual: fx.Node, last: fx.Node) -> bool:
    """Whether `last` may be the last one to read `residual`, and its output fits there."""
    if residual.target not in _OURS or last.args.count(residual) != 1:
        return False
    old, new = tensor_meta(residual), tensor_meta(last)
    if old is None or new is None or old.dtype != new.dtype or old.ndim != new.ndim:
        return False
    same = sym_eq((*old.shape, *old.stride()), (*new.shape, *new.stride()))
    if not statically_known_true(same):
        return False
    others = [user for user in residual.users if user is not last]
    return all(user < last and user.op == "call_function" and not is_view(user) for user in others)
