"""Drop the operators which return their input itself, as dropout does in eval mode, or a needless copy of it.

    h = linear(x, w, b)
    d = dropout(h, 0.1, train=False)        ->        y = add(h, r)
    y = add(d, r)

    c = cat([empty, past], -2)              ->        k = cat([past, new], -2)
    k = cat([c, new], -2)

They compute nothing, and stand between a layer and the activation or residual which its epilogue could take.
Padding by zeros on every side, as models with TensorFlow's rule of padding do, copies, and so does a cache to whose
emptiness its first keys are appended: such go where nobody can tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fanin_compile.effects import copy_is_needless
from fanin_compile.graph import tensor_meta
from fanin_compile.moves import laid_out_alike, pads_nothing
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.pointwise import returns_its_input

aten = torch.ops.aten


def drop_identities(gm: fx.GraphModule, ctx: Context) -> PassResult:
    for node in list(gm.graph.nodes):
        source = _source(node) if node.op == "call_function" else None
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    return PassResult()


def _source(node: fx.Node) -> fx.Node | None:
    """What may stand for `node`, if anything does."""
    if node.target is aten.cat.default:
        return _all_of(node)
    source: Any = node.args[0] if node.args else None
    if returns_its_input(node) or (pads_nothing(node) and copy_is_needless(node, source)):
        return source  # type: ignore[no-any-return]
    return None


def _all_of(cat: fx.Node) -> fx.Node | None:
    """The one tensor that a concatenation holds, if nobody can tell it from that; vectors of nothing are left out."""
    tensors: Any
    tensors, out = cat.args[0], tensor_meta(cat)
    metas = [tensor_meta(t) for t in tensors] if isinstance(tensors, list | tuple) else []
    if out is None or not metas or any(meta is None or meta.dtype != out.dtype for meta in metas):
        return None  # what holds nothing may still widen the dtype
    # torch takes vectors of nothing among tensors of any rank, and they have no say in the format of the result
    kept = [t for t in tensors if out.ndim == 1 or not _holds_nothing(t, ndim=1)]
    if 0 < len(kept) < len(tensors):
        cat.args = (kept, *cat.args[1:])
    full = [t for t in kept if not _holds_nothing(t, ndim=out.ndim)]
    if len(full) != 1:
        return None
    (source,) = full
    alike = laid_out_alike(source.meta["val"], out)
    return source if alike and copy_is_needless(cat, source) else None


def _holds_nothing(node: fx.Node, *, ndim: int) -> bool:
    meta = node.meta["val"]
    return meta.ndim == ndim and any(isinstance(size, int) and size == 0 for size in meta.shape)
