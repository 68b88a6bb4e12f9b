"""Let a linear work on all leading dimensions at once where the graph flattens them around it.

    f = view(x, [-1, in])                             f = view(x, [-1, in])     (dead unless used elsewhere)
    h = linear(f, w, b)               ->              y = linear(x, w, b)
    y = view(h, [*x.shape[:-1], out])

GPT-2's Conv1D and hand-written code do so. Without the views, activations and residuals meet their linear and constant
neurons are followed further.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.effects import writes_between
from fanin_compile.graph import LAYER, replace_node, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)


def unflatten_linears(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    for back in list(gm.graph.nodes):
        linear = back.args[0] if back.target in VIEWS else None
        if (
            not isinstance(linear, fx.Node)
            or linear.target is not aten.linear.default
            or LAYER not in linear.meta
        ):
            continue
        flat = linear.args[0]
        if not isinstance(flat, fx.Node) or flat.target not in VIEWS or list(linear.users) != [back]:
            continue
        if writes_between(flat, back):  # of x
            continue
        x, after = tensor_meta(flat.args[0]), tensor_meta(back)
        before, wide = tensor_meta(flat), tensor_meta(linear)
        if x is None or after is None or before is None or wide is None or before.ndim != 2:
            continue
        same = x.ndim == after.ndim and sym_eq(tuple(x.shape[:-1]), tuple(after.shape[:-1]))
        last = sym_eq((x.shape[-1], after.shape[-1]), (before.shape[-1], wide.shape[-1]))
        if not same or not statically_known_true(same) or not statically_known_true(last):
            continue
        meta = {key: value for key, value in linear.meta.items() if key not in ("val", "tensor_meta")}
        new = replace_node(back, aten.linear.default, (flat.args[0], *linear.args[1:]))
        new.meta.update(meta)
        gm.graph.erase_node(linear)
        rewritten.append(Rewrite(new.meta[LAYER].name, "linear", detail="works on its unflattened input"))
    return PassResult(tuple(rewritten))
