"""Write new keys and values to a cache in the operator that attends to it.

    keys.index_copy_(2, position, new_keys)
    values.index_copy_(2, position, new_values)
    y = attend_cache(q, keys, values, mask, s)

    y = write_attend(q, keys, values, new_keys, new_values, position, mask, s)

The rows lie far apart, one for each head, and their cache lines are read before they are written: by the attention,
which reads them anyway. Between the two writes and the attention nobody else reads the caches or writes to what is
written. It also lets operators be joined (join_operators.py) across the layers of a decoder.
"""

from __future__ import annotations

import torch
from torch import fx

from fanin_compile.effects import storage_roots, written_args
from fanin_compile.graph import bind_arguments, replace_node, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

_WRITE = torch.ops.aten.index_copy_.default


def fuse_cache_write(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    for node in list(gm.graph.find_nodes(op="call_function", target=torch.ops.fanin.attend_cache.default)):
        bound = bind_arguments(node)
        writes = [bound[name] for name in ("keys", "values")]
        if not all(isinstance(write, fx.Node) and write.target is _WRITE for write in writes):
            continue
        reason = _refusal(node, *writes)
        if reason:
            skipped.append(Skip(node.name, f"attention over a cache: {reason}"))
            continue
        (keys, _, position, new_keys), (values, _, _, new_values) = (write.args for write in writes)
        args = (bound["query"], keys, values, new_keys, new_values, position, bound["mask"], bound["scale"])
        new = replace_node(node, torch.ops.fanin.write_attend.default, args)
        for write in writes:
            gm.graph.erase_node(write)
        rewritten.append(Rewrite(new.name, "cache-write", detail="new rows written by the attention"))
    return PassResult(tuple(rewritten), tuple(skipped))


def _refusal(node: fx.Node, keys: fx.Node, values: fx.Node) -> str:
    """Why the two writes cannot be left to `node`, if so."""
    bound = [bind_arguments(write) for write in (keys, values)]
    if any(list(write.users) != [node] for write in (keys, values)):
        return "others read what is written to it"
    metas = [tensor_meta(b[name]) for b in bound for name in ("self", "index", "source")]
    if any(meta is None for meta in metas) or any(b["dim"] not in (2, -2) for b in bound):
        return "what is written are no rows of it"
    position = tensor_meta(bound[0]["index"])
    if bound[0]["index"] is not bound[1]["index"] or position is None or position.ndim != 1:
        return "keys and values are written at positions of their own"
    caches = [storage_roots(b["self"]) for b in bound]
    given = storage_roots(*(b[name] for b in bound for name in ("index", "source")))
    if not caches[0].isdisjoint(caches[1]) or not given.isdisjoint(caches[0] | caches[1]):
        return "what is written shares memory with it"
    first = min(keys, values)
    between = first.next
    while between is not node:
        if between not in (keys, values):
            read, wrote = storage_roots(*between.all_input_nodes), storage_roots(*written_args(between))
            if not read.isdisjoint(caches[0] | caches[1]) or not wrote.isdisjoint(given):
                return "others read it, or write to what is written, before it is attended to"
        between = between.next
    return ""
