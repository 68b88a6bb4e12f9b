"""Let the gather-matmul's store do what follows it: a residual add, then an activation.

    h = gather_matmul(x, ...)
    y = relu(h + r)               ->     y = gather_matmul(x, ..., activation="relu", residual=r)
    (h has no other user)

The result tile is in registers when it is stored, so this saves one pass over the output each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.graph import (
    LAYER,
    NAME,
    PLANAR,
    Context,
    PassResult,
    bind_arguments,
    replace_node,
    tensor_meta,
    writes_between,
)
from fanin_compile.pointwise import activation_name
from fanin_compile.records import Rewrite

aten = torch.ops.aten

_STORES = (torch.ops.fanin.gather_matmul.default, *PLANAR)


def fuse_epilogue(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    for node in list(gm.graph.nodes):
        what = _fuse_residual(node) or _fuse_activation(node)
        if what is not None:
            rewritten.append(what)
    return PassResult(tuple(rewritten))


def _fuse_residual(add: fx.Node) -> Rewrite | None:
    if add.target not in (aten.add.Tensor, aten.add_.Tensor) or add.kwargs:  # kwargs: alpha
        return None
    out = tensor_meta(add)
    # add_ writes its first operand: it may only be our own output, which nobody else sees
    orders = [add.args] if add.target is aten.add_.Tensor else [add.args, add.args[::-1]]
    for producer, other in orders:
        if not _fusable(producer, add) or out is None:
            continue
        assert isinstance(producer, fx.Node)
        args = bind_arguments(producer)
        if "residual" not in args:  # a pooling's
            continue
        metas = (tensor_meta(producer), tensor_meta(other))
        # a broadcast add, or one that promotes the dtype, is not the store's
        same = all(m is not None and m.dtype == out.dtype and _same_shape(m, out) for m in metas)
        if same and args["residual"] is None and args["activation"] == "none" and producer is not other:
            return _absorb(producer, add, {**args, "residual": other}, "+ residual")
    return None


def _fuse_activation(node: fx.Node) -> Rewrite | None:
    name = activation_name(node)
    if name is None or not _fusable(node.args[0], node):
        return None
    producer = node.args[0]
    assert isinstance(producer, fx.Node)
    args = bind_arguments(producer)
    if args["activation"] != "none":
        return None
    return _absorb(producer, node, {**args, "activation": name}, f"+ {name}")


def _fusable(producer: object, user: fx.Node) -> bool:
    """`producer` is one of our ops, nobody but `user` sees its output, and it may run as late as `user`."""
    if not isinstance(producer, fx.Node) or producer.target not in _STORES or list(producer.users) != [user]:
        return False
    return not writes_between(producer, user)  # of the producer's input


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.ndim == b.ndim and statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))


def _absorb(producer: fx.Node, user: fx.Node, args: dict[str, Any], what: str) -> Rewrite:
    layer = producer.meta.get(LAYER)
    target = producer.target
    assert callable(target)
    new = replace_node(user, target, tuple(args.values()))
    new.meta.update({k: v for k, v in producer.meta.items() if k not in ("val", "tensor_meta")})
    producer.graph.erase_node(producer)
    name = layer.name if layer else producer.meta.get(NAME, producer.name)
    return Rewrite(name, "epilogue", detail=what)
