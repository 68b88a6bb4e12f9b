"""Find every linear and convolution whose weight is constant and sparse, whatever form the graph gives it.

    w = mul(weight_orig, mask)                       w = <one constant, evaluated>
    y = linear(x, w, b)                       ->     y = linear(x, w, b)          meta: Layer, CondensedWeight
    y = addmm(b, x, w)  |  x @ w  |  mm(x, w) ->     y = linear(x, w.t(), b)      only if w is sparse

A weight counts as sparse when its mask or its zeros leave an input of a neuron out. The mask decides what is active: a
factor of 0s and 1s in the weight's own expression, or one the caller knows of (`ctx.masks`). As the graph must keep its
meaning, whatever is non-zero is active too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fanin_compile.condensed import CondensedWeight
from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    Context,
    PassResult,
    add_constant,
    constant_nodes,
    evaluate,
    replace_node,
    size_hint,
    tensor_meta,
)
from fanin_compile.records import Layer, Rewrite, Skip

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default: "conv1d",
    aten.conv2d.default: "conv2d",
    aten.conv3d.default: "conv3d",
    aten.conv1d.padding: "conv1d",
    aten.conv2d.padding: "conv2d",
    aten.conv3d.padding: "conv3d",
}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class _Site:
    """A use of a weight: `node` computes op(x, weight, bias); the weight node is [in, out] if `transposed`."""

    node: fx.Node
    op: str
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool = False


def find_masked_layers(gm: fx.GraphModule, ctx: Context) -> PassResult:
    constant = constant_nodes(gm.graph)
    memo: dict[fx.Node, object] = {}
    condensed: dict[tuple[fx.Node, bool], CondensedWeight | None] = {}
    folded: dict[tuple[fx.Node, bool], fx.Node] = {}
    found: list[Layer] = []
    skipped: list[Skip] = []
    rewritten: list[Rewrite] = []
    for site in list(_sites(gm.graph)):
        name = _name(site, ctx)
        if site.weight not in constant:
            if _depends_on_constants(site.weight, constant):
                skipped.append(
                    Skip(name, "its weight changes inside the graph", {"weight": site.weight.name})
                )
            continue
        key = (site.weight, site.transposed)
        if key not in condensed:
            condensed[key] = _condense(gm, site, ctx, memo)
        weight = condensed[key]
        meta = tensor_meta(site.node)
        if weight is None or meta is None:
            continue
        layer = _layer(name, site, weight, meta)
        found.append(layer)
        if weight.nnz == math.prod(weight.shape):
            skipped.append(Skip(name, "every weight is active", {"shape": "x".join(map(str, weight.shape))}))
            continue
        if key not in folded:
            folded[key] = site.weight
            if site.transposed or site.weight.op != "get_attr":
                dense = evaluate(gm, site.weight, memo)
                assert isinstance(dense, Tensor)
                dense = dense.t() if site.transposed else dense
                folded[key] = add_constant(gm, _first(gm.graph), f"{site.weight.name}_dense", dense)
                rewritten.append(
                    Rewrite(name, "constant weight", detail=f"{site.weight.name} evaluated once")
                )
                if not site.transposed:
                    site.weight.replace_all_uses_with(
                        folded[key]
                    )  # a pruned weight is a graph output as well
        node = site.node
        if site.op == "linear" and node.target is not aten.linear.default:
            node = replace_node(node, aten.linear.default, (site.x, folded[key], site.bias))
        else:
            node.update_arg(1, folded[key])
        node.meta[LAYER] = layer
        node.meta[CONDENSED] = weight
    return PassResult(tuple(rewritten), tuple(skipped), tuple(found))


def _sites(graph: fx.Graph) -> Iterator[_Site]:
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        args = node.args
        if node.target is aten.linear.default:
            yield _Site(node, "linear", args[0], args[1], args[2] if len(args) > 2 else None)
        elif node.target in CONVOLUTIONS:
            bias = args[2] if len(args) > 2 else None
            yield _Site(node, CONVOLUTIONS[node.target], args[0], args[1], bias)
        elif node.target is aten.addmm.default and not node.kwargs and _rank(args[0]) == 1:
            yield _Site(node, "linear", args[1], args[2], args[0], transposed=True)
        elif node.target in (aten.mm.default, aten.matmul.default) and _rank(args[1]) == 2:
            yield _Site(node, "linear", args[0], args[1], None, transposed=True)


def _rank(value: object) -> int:
    meta = tensor_meta(value)
    return -1 if meta is None else meta.ndim


def _condense(
    gm: fx.GraphModule, site: _Site, ctx: Context, memo: dict[fx.Node, object]
) -> CondensedWeight | None:
    dense = evaluate(gm, site.weight, memo)
    if not isinstance(dense, Tensor) or dense.ndim < 2 or dense.dtype not in FLOATS or dense.is_sparse:
        return None
    active = dense != 0
    for mask in _masks(gm, site.weight, ctx, memo):
        if mask.shape == dense.shape:
            active |= mask
    if site.transposed:
        dense, active = dense.t(), active.t()
    return CondensedWeight.from_dense(dense, active)


def _masks(
    gm: fx.GraphModule, weight: fx.Node, ctx: Context, memo: dict[fx.Node, object]
) -> Iterator[Tensor]:
    """The masks known for a weight: the caller's, else the 0/1 factors of a product which computes it."""
    if weight.op == "get_attr":
        if str(weight.target) in ctx.masks:
            yield ctx.masks[str(weight.target)]
        return
    if weight.target in (aten.mul.Tensor, aten.mul_.Tensor):
        for factor in weight.args[:2]:
            if isinstance(factor, fx.Node):
                value = evaluate(gm, factor, memo)
                if isinstance(value, Tensor) and bool(((value == 0) | (value == 1)).all()):
                    yield value != 0
    elif weight.target is aten.where.self and isinstance(weight.args[0], fx.Node):
        value = evaluate(gm, weight.args[0], memo)
        if isinstance(value, Tensor) and value.dtype is torch.bool:
            yield value
    elif weight.all_input_nodes and weight.target in (
        aten.to.dtype,
        aten.contiguous.default,
        aten.detach.default,
    ):
        yield from _masks(gm, weight.all_input_nodes[0], ctx, memo)


def _layer(name: str, site: _Site, weight: CondensedWeight, out: Tensor) -> Layer:
    counts = weight.row_fan_in()
    batch = math.prod(size_hint(s) for s in out.shape) // max(weight.out_features, 1)
    return Layer(
        name=name,
        op=site.op,
        shape=weight.shape,
        fan_in=(int(counts.min()), int(counts.max())) if len(counts) else (0, 0),
        nnz=weight.nnz,
        ablated=weight.n_ablated,
        dense_bytes=weight.dense_nbytes,
        dense_macs=batch * math.prod(weight.shape),
        batch=batch,
    )


def _name(site: _Site, ctx: Context) -> str:
    stack = [site.weight]
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            return ctx.names.get(str(node.target), str(node.target))
        stack.extend(reversed(node.all_input_nodes))
    return site.node.name


def _depends_on_constants(node: fx.Node, constant: set[fx.Node]) -> bool:
    return any(n.op == "get_attr" or n in constant for n in (node, *node.all_input_nodes))


def _first(graph: fx.Graph) -> fx.Node:
    """The first node which is no placeholder: constants go before it, so that every user comes after."""
    first: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first
