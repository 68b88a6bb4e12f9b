"""Attend over past and new keys and values where they are, instead of appending first.

    k = cat([past_keys, keys], -2)
    v = cat([past_values, values], -2)
    y = scaled_dot_product_attention(q, k, v, mask, scale=s)

    y = attend_appended(q, past_keys, keys, past_values, values, mask, s)        if nobody else reads k and v
    y, k, v = append_attend(q, past_keys, keys, past_values, values, mask, s)    if somebody does: the next step

A decoding step reads all of its cache for one query. Appended first, it is read and written, and read again; once is
enough, and what is written on leaves the kernel in the same pass. Keys may be repeated for the heads of queries that
share them, which the operators do without. Graphs without a condensed layer are left as they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile import ops_attention  # noqa: F401  (it defines the operators named below)
from fanin_compile.attention import ATTENTION, MOST_QUERIES, laid_out, repeats, same_shape, unknown_to_kernels
from fanin_compile.effects import writes_between
from fanin_compile.graph import bind_arguments, has_condensed, replace_node, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten


@dataclass(frozen=True)
class _Appended:
    """A concatenation of past and new rows on its way to an attention.

    Attributes:
        path: from its reader to what the attention reads; they repeat each head `times` times. Empty: once.
    """

    cat: fx.Node
    past: fx.Node
    new: fx.Node
    path: tuple[fx.Node, ...]
    times: int

    def others(self, attention: fx.Node) -> list[fx.Node]:
        """Who else reads it."""
        return [user for user in self.cat.users if user is not attention and user not in self.path]


def fuse_append_attention(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    if not has_condensed(gm.graph):
        return PassResult()
    for node in list(gm.graph.find_nodes(op="call_function", target=ATTENTION)):
        bound = bind_arguments(node)
        keys, values = (_appended(bound[name], node) for name in ("key", "value"))
        if keys is None or values is None:
            continue
        refusal = _refusal(node, bound, keys, values)
        if refusal is not None:
            skipped.append(refusal)
            continue
        inputs = (bound["query"], keys.past, keys.new, values.past, values.new)
        kept = bool(keys.others(node) or values.others(node))
        _replace(node, keys, values, (*inputs, bound["attn_mask"], bound["scale"]), kept=kept)
        detail = "past and new keys where they are" + (", appended in passing" if kept else "")
        rewritten.append(Rewrite(node.name, "append-attention", detail=detail))
    return PassResult(tuple(rewritten), tuple(skipped))


def _appended(node: object, reader: fx.Node) -> _Appended | None:
    """The concatenation that `node`, which `reader` reads, is or repeats the heads of."""
    cat, path, times = repeats(node, reader)
    meta = tensor_meta(cat)
    if not isinstance(cat, fx.Node) or cat.target is not aten.cat.default or meta is None:
        return None
    tensors: Any = cat.args[0]
    if len(tensors) != 2 or bind_arguments(cat)["dim"] % meta.ndim != meta.ndim - 2:
        return None
    past, new = tensors
    return _Appended(cat, past, new, path, times)


def _replace(node: fx.Node, keys: _Appended, values: _Appended, args: tuple[Any, ...], *, kept: bool) -> None:
    if not kept:
        replace_node(node, torch.ops.fanin.attend_appended.default, args)
        return
    olds, graph = (node, keys.cat, values.cat), node.graph
    with graph.inserting_before(node):
        three = graph.call_function(torch.ops.fanin.append_attend.default, args)
        parts = [graph.call_function(operator.getitem, (three, i)) for i in range(3)]
    three.meta = {**node.meta, "val": tuple(old.meta["val"] for old in olds)}
    node.replace_all_uses_with(parts[0])
    graph.erase_node(node)
    for dead in (*reversed(keys.path), *reversed(values.path)):
        graph.erase_node(dead)
    for old, new in zip(olds, parts, strict=True):
        new.meta = dict(old.meta)
    for old, new in dict(zip(olds[1:], parts[1:], strict=True)).items():
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def _refusal(node: fx.Node, bound: dict[str, Any], keys: _Appended, values: _Appended) -> Skip | None:
    def refuse(reason: str, **given: object) -> Skip:
        return Skip(node.name, f"append attention: {reason}", given)

    parts = (bound["query"], keys.past, keys.new, values.past, values.new, node, keys.cat, values.cat)
    tensors = [tensor for part in parts if (tensor := tensor_meta(part)) is not None]
    shapes = {what: tuple(t.shape) for what, t in zip(("query", "past", "new"), tensors, strict=False)}
    if len(tensors) < len(parts) or any(t.ndim != 4 for t in tensors):
        return refuse("not of batches of heads", **shapes)
    if (unknown := unknown_to_kernels(bound, tensors)) is not None:
        reason, given = unknown
        return refuse(reason, **given)
    queries = tensors[0].shape[2]
    if not isinstance(queries, int) or queries > MOST_QUERIES:
        return refuse("more than a few queries", queries=queries, at_most=MOST_QUERIES)
    times = keys.times if keys.times == values.times else 0
    query, _, k, _, v, *results = tensors
    if not times or not _fits(query, k, v, *results, times=times, grouped=bound["enable_gqa"]):
        return refuse("heads or strides are not those of a cache", **shapes)
    if writes_between(min(keys.cat, values.cat), node):
        return refuse("something is written before it reads", keys=keys.cat, values=values.cat)
    early = [user for rows in (keys, values) for user in rows.others(node) if user < node]
    if early:
        return refuse("its keys or values are read before", readers=early)
    return None


def _fits(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    y: Tensor,
    all_keys: Tensor,
    all_values: Tensor,
    *,
    times: int,
    grouped: bool,
) -> bool:
    """Whether the operators take such tensors, and return what the nodes they replace do, with its strides."""
    heads, width = keys.shape[1], values.shape[3]
    if not all(isinstance(n, int) for n in (heads, query.shape[1], keys.shape[3], width)) or heads == 0:
        return False
    shared = query.shape[1] % (heads * times) == 0 if grouped else query.shape[1] == heads * times
    same = [
        ((query.shape[0], query.shape[3]), (keys.shape[0], keys.shape[3])),
        (keys.shape[:2], values.shape[:2]),
        *((t.stride(), laid_out(t, (0, 1, 2, 3))) for t in (all_keys, all_values)),
    ]
    if query.shape[2] != 1:  # of one query every layout is the same
        same.append((y.stride(), laid_out(y, (0, 2, 1, 3))))
    return shared and all(same_shape(a, b) for a, b in same)
