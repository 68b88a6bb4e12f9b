"""Run max pooling beside condensed convolutions by our own kernel, the activation before it included.

    h = relu(conv(x))
    y = max_pool2d(h, 3, 2, 1)    ->    y = fanin.max_pool(conv(x), (3, 3), (2, 2), (1, 1), ..., activation="relu")
    (h has no other user)

torch's own pooling of planar images looks for the indices of its maxima as well, one element at a time. An activation
that never decreases is that of the maximum, of which there are fewer.
"""

from __future__ import annotations

import torch
from torch import fx

from fanin_compile.effects import is_view, writes, writes_between
from fanin_compile.graph import bind_arguments, replace_node, spread, tensor_meta
from fanin_compile.moves import MAX_POOLS, pooled_dims
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.planar import has_planar, is_beside_planar
from fanin_compile.pointwise import activation_name
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten

_WITH_INDICES = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
_MONOTONE = ("relu", "relu6")  # in the kernels' arithmetic too


def lower_max_pool(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    if not has_planar(gm.graph):
        return PassResult()
    for node in list(gm.graph.nodes):
        if node.target not in (*MAX_POOLS, *_WITH_INDICES):
            continue
        values = _values(node)
        refusal = _refusal(node, values)
        if refusal is not None or values is None:
            skipped += [] if refusal is None else [refusal]
            continue
        dims = len(pooled_dims(node, 3))
        bound = bind_arguments(node)
        kernel = spread(bound["kernel_size"], dims)
        stride = spread(bound["stride"], dims) or kernel  # none given: the kernel's size
        padding, dilation = spread(bound["padding"], dims), spread(bound["dilation"], dims)
        # a dilated kernel may step over all of x, so that there is nothing to activate
        activation = None if any(padding) and max(dilation) > 1 else _activation_before(node)
        x = node.args[0] if activation is None else activation.args[0]
        name = "none" if activation is None else activation_name(activation)
        new = replace_node(
            node,
            torch.ops.fanin.max_pool.default,
            (x, kernel, stride, padding, dilation, bound["ceil_mode"], name),
        )
        if values is not node:
            new.meta = dict(values.meta)
            values.replace_all_uses_with(new)
            gm.graph.erase_node(values)
        if activation is not None:
            gm.graph.erase_node(activation)
        detail = "planar kernel" if activation is None else f"planar kernel, {name} folded"
        rewritten.append(Rewrite(node.name, "max-pool", detail=detail))
    return PassResult(tuple(rewritten), tuple(skipped))


def _values(pool: fx.Node) -> fx.Node | None:
    """The node of the maxima; None if somebody reads their indices or nobody reads anything."""
    if pool.target in MAX_POOLS:
        return pool
    users = list(pool.users)
    return users[0] if len(users) == 1 and users[0].args == (pool, 0) else None


def _refusal(pool: fx.Node, values: fx.Node | None) -> Skip | None:
    x = pool.args[0]
    meta = tensor_meta(x)
    if values is None:
        return Skip(pool.name, "max pool: its indices are read", {"readers": list(pool.users)})
    if meta is None or meta.dtype != torch.float32:
        dtype = None if meta is None else meta.dtype
        return Skip(pool.name, "max pool: the planar kernel knows float32 alone", {"input": dtype})
    if meta.device.type != "cpu":
        return Skip(pool.name, "max pool: no kernel for this device", {"device": meta.device.type})
    if not is_beside_planar(x, values):
        return Skip(pool.name, "max pool: beside no condensed convolution", {"input": x})
    return None


def _activation_before(pool: fx.Node) -> fx.Node | None:
    """The activation of which the pool is the only reader, if it may as well come after the maximum."""
    node = pool.args[0]
    if not isinstance(node, fx.Node) or list(node.users) != [pool] or writes_between(node, pool):
        return None
    if activation_name(node) not in _MONOTONE:
        return None
    if writes(node):  # in place: over a value that nobody else sees
        before = node.args[0]
        assert isinstance(before, fx.Node)
        fresh = before.op == "call_function" and not is_view(before)
        if not fresh or list(before.users) != [node]:
            return None
    return node
