"""Attend over a cache of keys and values in a kernel that reads what a query may see of it.

    keys.index_copy_(2, position, new_keys)
    values.index_copy_(2, position, new_values)
    y = scaled_dot_product_attention(q, keys, values, mask, scale=s)   ->   y = attend_cache(q, keys, values, mask, s)

A cache made for all tokens to come is written in place and read whole, under a mask that hides what is not there yet;
one of a decoder's cross-attention is read by every step. Keys may be repeated for the heads of queries that share them,
which the operator does without. A cache is what the graph is given from outside. Graphs without a condensed layer are
left as they are, and attention of more than a few queries, of which this says nothing: it is a product of matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile import ops_attention  # noqa: F401  (it defines the operator named below)
from fanin_compile.attention import (
    ATTENTION,
    MOST_QUERIES,
    Repeated,
    laid_out,
    repeats,
    same_shape,
    unknown_to_kernels,
)
from fanin_compile.effects import writes_between
from fanin_compile.graph import bind_arguments, has_condensed, replace_node, tensor_meta
from fanin_compile.moves import CUTS, PERMUTES, SAME, SQUEEZES, VIEWS
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
WRITES = (aten.index_copy_.default, aten.index_put_.default, aten.copy_.default, aten.slice_scatter.default)
_WAYS = (*WRITES, *CUTS, *PERMUTES, *SAME, *SQUEEZES, *VIEWS, aten.unsqueeze.default)


def lower_cache_attention(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    if not has_condensed(gm.graph):
        return PassResult()
    for node in list(gm.graph.find_nodes(op="call_function", target=ATTENTION)):
        bound = bind_arguments(node)
        query = tensor_meta(bound["query"])
        if query is None or query.ndim != 4 or not _few(query.shape[2]):
            continue
        keys, values = (repeats(bound[name], node) for name in ("key", "value"))
        if not (_is_cache(keys.source) and _is_cache(values.source)):
            continue
        refusal = _refusal(node, bound, keys, values)
        if refusal is not None:
            skipped.append(refusal)
            continue
        args = (bound["query"], keys.source, values.source, bound["attn_mask"], bound["scale"])
        replace_node(node, torch.ops.fanin.attend_cache.default, args)
        mask = tensor_meta(bound["attn_mask"])
        hides = mask is not None and mask.dtype == torch.bool
        detail = "keys of a cache where they are" + (", hidden ones unread" if hides else "")
        rewritten.append(Rewrite(node.name, "cache-attention", detail=detail))
    return PassResult(tuple(rewritten), tuple(skipped))


def _few(queries: object) -> bool:
    return isinstance(queries, int) and queries <= MOST_QUERIES


def _is_cache(node: object) -> bool:
    """Whether `node` is a tensor from outside the graph, or of one after writing to it."""
    while isinstance(node, fx.Node) and node.target in _WAYS:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def _refusal(node: fx.Node, bound: dict[str, Any], keys: Repeated, values: Repeated) -> Skip | None:
    def refuse(reason: str, **given: object) -> Skip:
        return Skip(node.name, f"attention over a cache: {reason}", given)

    query, k, v, y = (tensor_meta(part) for part in (bound["query"], keys.source, values.source, node))
    assert query is not None
    if k is None or v is None or y is None or k.ndim != 4 or v.ndim != 4:
        shapes = {what: tuple(t.shape) for what, t in (("keys", k), ("values", v)) if t is not None}
        return refuse("not of batches of heads", **shapes)
    if (unknown := unknown_to_kernels(bound, (query, k, v))) is not None:
        reason, given = unknown
        return refuse(reason, **given)
    heads, known = k.shape[1] * keys.times, statically_known_true
    if (
        keys.times != values.times
        or not known(heads > 0)
        or not known(query.shape[1] % heads == 0 if bound["enable_gqa"] else query.shape[1] == heads)
        or not same_shape((*query.shape[::3], *k.shape[:2]), (k.shape[0], k.shape[3], *v.shape[:2]))
        or not all(known(t.stride(3) == 1) for t in (k, v))
        or not (query.shape[2] == 1 or same_shape(y.stride(), laid_out(y, (0, 2, 1, 3))))
    ):
        shapes = {"query": tuple(query.shape), "keys": tuple(k.shape), "values": tuple(v.shape)}
        return refuse("heads or strides are not those of a cache", **shapes)
    first = min((*keys.path, *values.path, node))  # of what has read the cache
    if first is not node and writes_between(first, node):
        return refuse("something is written before it reads", keys=keys.source, values=values.source)
    return None
