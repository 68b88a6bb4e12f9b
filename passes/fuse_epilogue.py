"""Let the gather-matmul's store do what follows it: a residual add, then an activation.

    h = gather_matmul(x, ...)
    y = relu(h + r)               ->     y = gather_matmul(x, ..., activation="relu", residual=r)
    (h has no other user)

    h = gather_matmul(x, ...)           h = gather_matmul(x, ..., residual=permute(r, [0, 2, 3, 1]))
    y = r + permute(h, [0, 3, 1, 2])  ->  y = permute(h, [0, 3, 1, 2])      if r lies in memory as permute(h) does

The result tile is in registers when it is stored, so this saves one pass over the output each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fanin_compile.effects import writes_between
from fanin_compile.graph import (
    LAYER,
    NAME,
    PLANAR,
    bind_arguments,
    renew_value,
    replace_node,
    same_shape,
    tensor_meta,
)
from fanin_compile.moves import PERMUTES, laid_out_alike, permuted
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.pointwise import activation_name
from fanin_compile.records import Rewrite

aten = torch.ops.aten

_STORES = (torch.ops.fanin.gather_matmul.default, *PLANAR)


def fuse_epilogue(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    for node in list(gm.graph.nodes):
        what = _fuse_residual(node) or _fuse_permuted(node) or _fuse_activation(node)
        if what is not None:
            rewritten.append(what)
    return PassResult(tuple(rewritten))


def _fuse_residual(add: fx.Node) -> Rewrite | None:
    for producer, other in _sums(add):
        if _fusable(producer, add) and _takes(producer, producer, other, add):
            return _absorb(producer, add, {**bind_arguments(producer), "residual": other}, "+ residual")
    return None


def _fuse_permuted(add: fx.Node) -> Rewrite | None:
    """Add to the output before it is permuted, as those of linears in models of images are."""
    for moved, other in _sums(add):
        producer = moved.args[0] if moved.target in PERMUTES else None
        if list(moved.users) != [add] or not isinstance(producer, fx.Node) or producer.target in PLANAR:
            continue
        if (
            not _fusable(producer, moved)
            or writes_between(moved, add)
            or not _takes(producer, moved, other, add)
        ):
            continue
        metas = [node.meta["val"] for node in (moved, other, add)]
        if not all(laid_out_alike(metas[0], meta) for meta in metas[1:]):
            continue  # the residual would be read, or the sum lie, across the rows of the output
        order = permuted(moved, metas[0].ndim)
        with add.graph.inserting_before(add):
            back = add.graph.call_function(
                aten.permute.default, (other, [order.index(d) for d in range(len(order))])
            )
            inner = add.graph.call_function(aten.add.Tensor, (producer, back))
        renew_value(add.graph, back)
        inner.meta = {**add.meta, "val": producer.meta["val"]}
        replace_node(add, aten.permute.default, (inner, order))
        inner.graph.erase_node(moved)
        return _fuse_residual(inner)
    return None


def _sums(add: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """The operands of a plain sum, each first that may be the output of ours."""
    if add.target not in (aten.add.Tensor, aten.add_.Tensor) or add.kwargs:  # kwargs: alpha
        return []
    # add_ writes its first operand: it may only be our own output, which nobody else sees
    orders: Any = [add.args] if add.target is aten.add_.Tensor else [add.args, add.args[::-1]]
    return [(a, b) for a, b in orders if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b]


def _takes(producer: fx.Node, output: fx.Node, other: fx.Node, out: fx.Node) -> bool:
    """Whether `producer`, seen as `output`, can add `other` to make `out`."""
    args, sum_ = bind_arguments(producer), tensor_meta(out)
    if "residual" not in args or args["residual"] is not None or args["activation"] != "none":
        return False  # a pooling's has none
    metas = (tensor_meta(output), tensor_meta(other))
    # a broadcast add, or one that promotes the dtype, is not the store's
    return sum_ is not None and all(
        m is not None and m.dtype == sum_.dtype and same_shape(m, sum_) for m in metas
    )


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


def _absorb(producer: fx.Node, user: fx.Node, args: dict[str, Any], what: str) -> Rewrite:
    layer = producer.meta.get(LAYER)
    target = producer.target
    assert callable(target)
    new = replace_node(user, target, tuple(args.values()))
    new.meta.update({k: v for k, v in producer.meta.items() if k not in ("val", "tensor_meta")})
    producer.graph.erase_node(producer)
    name = layer.name if layer else producer.meta.get(NAME, producer.name)
    return Rewrite(name, "epilogue", detail=what)
