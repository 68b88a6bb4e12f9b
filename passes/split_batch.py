"""Run stretches of convolutions on large images a few images at a time.

    h = gather_conv(x, ...)                   h0 = gather_conv(x[0:1], ...);  y0 = depthwise_conv(h0, ...)
    y = depthwise_conv(h, ...)           ->   h1 = gather_conv(x[1:2], ...);  y1 = depthwise_conv(h1, ...)
                                              y = cat([y0, y1])

A tensor of a whole batch beyond the size of a cache is written to memory and read from there by the next layer; memory
that large comes fresh from the operating system at each call, a page fault every 4 KiB. A few images at a time reuse
what is still in the cache. Every operator in a stretch works on each image alone, so that no value changes. Graphs
without a convolution of ours, and images of symbolic sizes, are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, fx

from fanin_compile.effects import writes
from fanin_compile.graph import CONVOLUTIONS, LAYER, PLANAR, bind_arguments, renew_value, tensor_meta
from fanin_compile.moves import PADS
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.planar import has_planar
from fanin_compile.pointwise import activation_name
from fanin_compile.records import Rewrite

aten = torch.ops.aten

# of one tensor in a stretch: what is written and read next should stay in a last-level cache
MOST_BYTES = 8 << 20
MOST_PARTS = 16  # of a batch: each repeats the stretch's operators in the graph


def split_batch(gm: fx.GraphModule, ctx: Context) -> PassResult:
    if not has_planar(gm.graph):
        return PassResult()
    rewritten = [
        what for stretch in list(_stretches(gm.graph)) if (what := _split(gm.graph, stretch)) is not None
    ]
    return PassResult(tuple(rewritten))


def _stretches(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Maximal runs of consecutive operators on images of one batch, from the first large one to the last."""
    run: list[fx.Node] = []
    for node in [*graph.nodes]:
        if node.op in ("get_attr", "placeholder"):
            continue
        batch = _batch(node)
        if run and batch != _batch(run[0]):
            yield from _trimmed(run)
            run = []
        if batch:
            run.append(node)


def _trimmed(run: list[fx.Node]) -> Iterator[list[fx.Node]]:
    large = [i for i, node in enumerate(run) if max(map(_nbytes, [node, *_batched(node)])) > MOST_BYTES]
    stretch = run[large[0] : large[-1] + 1] if large else []
    # putting the parts together is a copy, which pays if a large tensor is written and read within the stretch
    if any(_nbytes(node) > MOST_BYTES and any(user in stretch for user in node.users) for node in stretch):
        yield stretch


def _batch(node: fx.Node) -> int:
    """The number of images that `node` maps to as many, each by itself; 0 if it is no such operator."""
    metas = [tensor_meta(value) for value in (node, *_batched(node))]
    if len(metas) == 1 or writes(node):
        return 0
    if any(meta is None or meta.ndim < 3 or not _is_static(meta) for meta in metas):
        return 0
    sizes = {meta.shape[0] for meta in metas if meta is not None}
    return int(sizes.pop()) if len(sizes) == 1 and 1 not in sizes else 0


def _is_static(meta: Tensor) -> bool:
    return all(isinstance(size, int) for size in meta.shape)


def _batched(node: fx.Node) -> list[fx.Node]:
    """The arguments of `node` that hold images of the batch; none if it is not known to work on each alone."""
    if node.target in PLANAR or node.target in CONVOLUTIONS:
        bound = bind_arguments(node)
        dims = CONVOLUTIONS.get(node.target) or len(bound["stride"])
        found = [node.args[0], *([bound["residual"]] if bound.get("residual") is not None else [])]
        if any(meta is None or meta.ndim != dims + 2 for meta in map(tensor_meta, found)):
            return []
    elif node.target in PADS:
        meta, pads = tensor_meta(node.args[0]), node.args[1]
        assert isinstance(pads, list | tuple)
        found = [node.args[0]] if meta is not None and len(pads) < 2 * meta.ndim else []
    elif node.target is aten.add.Tensor and not node.kwargs:
        metas = [tensor_meta(value) for value in (node, *node.args)]
        shapes = {tuple(meta.shape) if meta is not None and _is_static(meta) else None for meta in metas}
        found = list(node.args) if len(shapes) == 1 else []
    else:
        found = [node.args[0]] if activation_name(node) is not None else []
    return [value for value in found if isinstance(value, fx.Node)]


def _nbytes(node: fx.Node) -> int:
    meta = tensor_meta(node)
    return 0 if meta is None else meta.element_size() * int(meta.numel())


def _split(graph: fx.Graph, stretch: list[fx.Node]) -> Rewrite | None:
    inside, batch = set(stretch), _batch(stretch[0])
    largest = max(_nbytes(value) for node in stretch for value in (node, *_batched(node)))
    images = max(1, MOST_BYTES * batch // largest)
    parts = min(batch, MOST_PARTS, -(-batch // images))
    if parts < 2:
        return None
    given = dict.fromkeys(v for node in stretch for v in _batched(node) if v not in inside)
    taken = [node for node in stretch if any(user not in inside for user in node.users)]
    results: dict[fx.Node, list[fx.Node]] = {node: [] for node in taken}
    end = stretch[-1].next
    for part in range(parts):
        first, last = batch * part // parts, batch * (part + 1) // parts
        copies: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(end):
            for value in given:
                copies[value] = _call(graph, aten.slice.Tensor, (value, 0, first, last))
            for node in stretch:
                copies[node] = graph.node_copy(node, partial(_replaced, copies))
                renew_value(graph, copies[node])
        for node in taken:
            results[node].append(copies[node])
    for node in taken:
        with graph.inserting_before(end):
            whole = _call(graph, aten.cat.default, (results[node], 0))
        node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)
    for node in reversed(stretch):
        graph.erase_node(node)
    names = [node.meta[LAYER].name for node in stretch if LAYER in node.meta]
    detail = f"{len(stretch)} operators in {parts} parts of {batch} images"
    return Rewrite(names[0] if names else stretch[0].name, "split", detail=detail)


def _replaced(by: Mapping[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    return by.get(node, node)


def _call(graph: fx.Graph, target: torch._ops.OpOverload, args: tuple[object, ...]) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]  # nodes, numbers and lists of them
    renew_value(graph, node)
    return node
