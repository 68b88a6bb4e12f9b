"""Find every linear and convolution whose weight is constant and sparse, whatever form the graph gives it.

    w = mul(weight_orig, mask)                       w = <one constant, evaluated>
    y = linear(x, w, b)                       ->     y = linear(x, w, b)          meta: Layer, CondensedWeight
    y = addmm(b, x, w)  |  x @ w  |  mm(x, w) ->     y = linear(x, w.t(), b)      only if w is sparse
    y = einsum("...i,oi->...o", x, w)         ->     y = linear(x, w)             only if w is sparse

A weight counts as sparse when its mask or its zeros leave an input of a neuron out. The mask decides what is active: a
factor of 0s and 1s in the weight's own expression, or one the caller knows of (`ctx.masks`). As the graph must keep its
meaning, whatever is non-zero is active too, unless the caller says that masks decide (`ctx.masks_decide`).
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.condensed import CondensedWeight
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    CONDENSED,
    CONVOLUTIONS,
    LAYER,
    add_constant,
    after_inputs,
    bind_arguments,
    constant_name,
    replace_node,
    size_hint,
    tensor_meta,
)
from fanin_compile.moves import PERMUTES, VIEWS
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Layer, Rewrite, Skip

aten = torch.ops.aten
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
# operators which hold whole layers, with all their weights as arguments
OPAQUE = (aten._native_multi_head_attention.default,)
PASSING = (aten.to.dtype, aten.contiguous.default, aten.detach.default)
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
    evaluate = Evaluator(gm)
    condensed: dict[tuple[fx.Node, bool], CondensedWeight | None] = {}
    folded: dict[tuple[fx.Node, bool], fx.Node] = {}
    found: list[Layer] = []
    skipped: list[Skip] = []
    rewritten: list[Rewrite] = []
    uses: Counter[str] = Counter()
    weights_counted: set[tuple[fx.Node, bool]] = set()
    for site in list(_sites(gm.graph)):
        name = _name(site, ctx)
        if not evaluate.is_constant(site.weight):
            if any(n.op == "get_attr" for n in (site.weight, *site.weight.all_input_nodes)):
                skipped.append(
                    Skip(name, "its weight changes inside the graph", {"weight": site.weight.name})
                )
            continue
        key = (site.weight, site.transposed)
        if key not in condensed:
            condensed[key] = _condense(site, ctx, evaluate)
        weight = condensed[key]
        meta = tensor_meta(site.node)
        if weight is None or meta is None:
            continue
        uses[name] += 1
        name = name if uses[name] == 1 else f"{name} (use {uses[name]})"
        layer = _layer(name, site, weight, meta, counted=key in weights_counted)
        weights_counted.add(key)
        found.append(layer)
        if weight.nnz == math.prod(weight.shape):
            skipped.append(Skip(name, "every weight is active", {"shape": "x".join(map(str, weight.shape))}))
            continue
        if key not in folded:
            folded[key] = site.weight
            if site.transposed or site.weight.op != "get_attr":
                dense = evaluate(site.weight)
                assert dense is not None
                dense = dense.t() if site.transposed else dense
                folded[key] = add_constant(gm, after_inputs(gm.graph), f"{site.weight.name}_dense", dense)
                rewritten.append(
                    Rewrite(name, "constant weight", detail=f"{site.weight.name} evaluated once")
                )
                if not site.transposed:
                    # everywhere: a pruned weight is an output of the graph as well
                    site.weight.replace_all_uses_with(folded[key])
        node = site.node
        if site.op == "linear" and node.target is not aten.linear.default:
            node = replace_node(node, aten.linear.default, (site.x, folded[key], site.bias))
        else:
            node.update_arg(1, folded[key])
        node.meta[LAYER] = layer
        node.meta[CONDENSED] = weight
    skipped += _hidden(gm.graph, evaluate, ctx)
    skipped += _transposed(gm.graph, evaluate, ctx)
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
            yield _Site(node, f"conv{CONVOLUTIONS[node.target]}d", args[0], args[1], bias)
        elif node.target is aten.addmm.default and not node.kwargs and _rank(args[0]) == 1:
            yield _Site(node, "linear", args[1], args[2], args[0], transposed=True)
        elif node.target in (aten.mm.default, aten.matmul.default) and _rank(args[1]) == 2:
            yield _Site(node, "linear", args[0], args[1], None, transposed=True)
        elif node.target is aten.einsum.default and len(args[1]) == 2:
            for x, weight in ((0, 1), (1, 0)):
                order = _einsum_weight(args[0], x, weight)
                if order is not None and _contracts(args[1][x], args[1][weight], order.index("i")):
                    yield _Site(node, "linear", args[1][x], args[1][weight], None, transposed=order == "io")


def _einsum_weight(equation: str, x: int, weight: int) -> str | None:
    """ "oi" or "io", the order of the weight's dimensions, if the equation is that of a linear layer's."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    lead, i, o = terms[x][:-1], terms[x][-1:], out[-1:]
    letters = lead.removeprefix("...") + i + o
    if not arrow or not letters.isalpha() or len(set(letters)) != len(letters) or out != lead + o:
        return None
    return {o + i: "oi", i + o: "io"}.get(terms[weight])


def _contracts(x: fx.Node, weight: fx.Node, dim: int) -> bool:
    """Whether the last dimension of x is as long as `dim` of the weight: einsum broadcasts one of size 1."""
    x_shape, shape = _shape(x), _shape(weight)
    return bool(x_shape and shape) and statically_known_true(x_shape[-1] == shape[dim])  # type: ignore[index]


def _shape(value: object) -> tuple[object, ...] | None:
    meta = tensor_meta(value)
    return None if meta is None else tuple(meta.shape)


def _rank(value: object) -> int:
    shape = _shape(value)
    return -1 if shape is None else len(shape)


def _condense(site: _Site, ctx: Context, evaluate: Evaluator) -> CondensedWeight | None:
    dense = evaluate(site.weight)
    if dense is None or dense.ndim < 2 or dense.dtype not in FLOATS or dense.is_sparse:
        return None
    active = dense != 0
    if (mask := _mask(site.weight, ctx, evaluate)) is not None and mask.shape == dense.shape:
        active = mask if ctx.masks_decide else active | mask
    if site.transposed:
        dense, active = dense.t(), active.t()
    return CondensedWeight.from_dense(dense, active)


def _mask(weight: fx.Node, ctx: Context, evaluate: Evaluator) -> Tensor | None:
    """The mask known for a weight: the caller's, and the 0/1 factors of a product which computes it; all must agree."""
    if weight.op == "get_attr":
        return ctx.masks.get(str(weight.target))
    if weight.target in (aten.mul.Tensor, aten.mul_.Tensor):
        factors = [f for f in weight.args[:2] if isinstance(f, fx.Node)]
        known = [_factor_mask(f, ctx, evaluate) for f in factors if _shape(f) == _shape(weight)]
        masks = [mask for mask in known if mask is not None]
        return functools.reduce(torch.logical_and, masks) if masks else None
    if weight.target is aten.masked_fill.Scalar and weight.args[2] == 0:
        hidden = evaluate(weight.args[1])
        return None if hidden is None else ~hidden
    if weight.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        condition = evaluate(weight.args[0])
        if condition is None:
            return None
        if _is_zero(weight.args[2], evaluate):
            return condition
        return ~condition if _is_zero(weight.args[1], evaluate) else None
    if weight.target in (*VIEWS, *PERMUTES):
        mask = _mask(weight.args[0], ctx, evaluate)  # type: ignore[arg-type]
        if mask is None or tuple(mask.shape) != _shape(weight.args[0]):
            return None
        moved: Tensor = (aten.reshape.default if weight.target in VIEWS else weight.target)(
            mask, *weight.args[1:]
        )
        return moved
    if weight.all_input_nodes and weight.target in PASSING:
        return _mask(weight.all_input_nodes[0], ctx, evaluate)
    return None


def _is_zero(value: object, evaluate: Evaluator) -> bool:
    """Whether a number, or the tensor of a constant node, is 0 throughout."""
    if isinstance(value, fx.Node):
        tensor = evaluate(value)
        return tensor is not None and bool((tensor == 0).all())
    return value == 0


def _factor_mask(factor: fx.Node, ctx: Context, evaluate: Evaluator) -> Tensor | None:
    value = evaluate(factor)
    if value is not None and bool(((value == 0) | (value == 1)).all()):
        return value != 0
    return _mask(factor, ctx, evaluate)


def _hidden(graph: fx.Graph, evaluate: Evaluator, ctx: Context) -> Iterator[Skip]:
    """A Skip for every sparse weight within a fused operator."""
    for node in graph.nodes:
        for weight in node.all_input_nodes if node.target in OPAQUE else ():
            value = evaluate(weight) if _rank(weight) == 2 else None
            if value is not None and not bool((value != 0).all()):
                values = {"op": node.target, "opened by": "torch.backends.mha.set_fastpath_enabled(False)"}
                yield Skip(
                    constant_name(weight, ctx.names) or weight.name, "hidden in a fused operator", values
                )


def _transposed(graph: fx.Graph, evaluate: Evaluator, ctx: Context) -> Iterator[Skip]:
    """A Skip for every sparse transposed convolution."""
    for node in graph.nodes:
        if node.target not in TRANSPOSED:
            continue
        weight = node.args[1]
        value = evaluate(weight)
        if value is not None and not bool((value != 0).all()):
            values = {"op": node.target, "shape": "x".join(map(str, value.shape))}
            yield Skip(
                constant_name(weight, ctx.names) or weight.name, "transposed convolutions stay dense", values
            )


def _layer(name: str, site: _Site, weight: CondensedWeight, out: Tensor, *, counted: bool) -> Layer:
    counts = weight.row_fan_in()
    batch = math.prod(size_hint(s) for s in out.shape) // max(weight.out_features, 1)
    return Layer(
        name=name,
        op=site.op,
        shape=weight.shape,
        fan_in=(int(counts.min()), int(counts.max())) if len(counts) else (0, 0),
        nnz=weight.nnz,
        ablated=weight.n_ablated,
        dense_bytes=0 if counted else weight.dense_nbytes,
        dense_macs=batch * math.prod(weight.shape),
        batch=batch,
        groups=1 if site.op == "linear" else bind_arguments(site.node)["groups"],
    )


def _name(site: _Site, ctx: Context) -> str:
    name = constant_name(site.weight, ctx.names)
    return site.node.name if name is None else name
