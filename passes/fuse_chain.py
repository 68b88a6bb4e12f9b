"""Compute two linears with an activation between them in one call, so that the hidden layer never leaves the cache.

    h = gather_matmul(x, W, ..., "gelu")
    y = gather_matmul(h, W2, ...)            ->    y = gather_matmul_chain(x, W, ..., "gelu", gated=False, W2, ...)
    (h has no other user)

    g = gather_matmul(x, G, ..., "silu")
    u = gather_matmul(x, U, ...)             ->    y = gather_matmul_chain(x, [G; U], ..., "silu", gated=True, W2, ...)
    y = gather_matmul(g * u, W2, ...)

Operators between them that hand h on (dropout in eval mode, views of the leading dimensions) are no obstacle. A gate
and its partner are stored anew as one weight, the gates first. Chains are two layers long, no more: every tile of the
batch passes over all weights of a chain, and those of more layers would leave the cache on the way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile import ops_chain  # noqa: F401  (it defines the operator called below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.effects import writes
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    CONDENSED,
    add_constant,
    after_inputs,
    bind_arguments,
    layer_label,
    renew_value,
    replace_node,
    size_hint,
    tensor_meta,
)
from fanin_compile.packed import Packed, unpack
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.pointwise import CASTS, POINTWISE, activation_name, keeps_values
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
LINEAR = torch.ops.fanin.gather_matmul.default
CHAIN = torch.ops.fanin.gather_matmul_chain.default
VIEWS = (aten.view.default, aten.reshape.default)
PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor)


@dataclass
class _Trail:
    """What stands between a node and the operator `origin` whose result it is.

    Attributes:
        nodes: from the last one back, without `origin`.
        views: those among them which change leading dimensions, the last one first.
        activation: the one among them, if there is one.
        blocked: why they cannot be part of a chain, if so.
    """

    origin: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    views: list[fx.Node] = field(default_factory=list)
    activation: str = "none"
    blocked: str = ""


def fuse_chain(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    for second in list(gm.graph.find_nodes(op="call_function", target=LINEAR)):
        trail, name = _follow(second), layer_label(second, ctx.names)
        if trail.origin.target is LINEAR:
            firsts = [trail.origin]
            refusal = _refuses(trail, [trail], second)
            activation = trail.activation
        elif trail.origin.target in PRODUCTS and all(isinstance(a, fx.Node) for a in trail.origin.args):
            factors = [_follow(trail.origin, i) for i in (0, 1)]
            if {f.origin.target for f in factors} != {LINEAR} or factors[0].origin is factors[1].origin:
                continue
            factors.sort(key=lambda f: not _is_gate(f))
            firsts = [f.origin for f in factors]
            refusal = _refuses(trail, factors, second) or _refuses_gated(trail, factors, second, evaluate)
            activation = factors[0].activation
            trail.nodes += [trail.origin, *factors[0].nodes, *factors[1].nodes]
        elif trail.origin.target is CHAIN and not trail.blocked:
            skipped.append(Skip(name, "not chained: its input is a chain already"))
            continue
        else:
            continue
        if refusal:
            skipped.append(Skip(name, f"not chained onto {layer_label(firsts[0], ctx.names)}: {refusal}"))
            continue
        names = [layer_label(f, ctx.names) for f in firsts]
        stored, how = _fuse(gm, firsts, second, trail, activation, evaluate, ctx)
        if how:
            rewritten.append(Rewrite(names[0], "tuned", detail=f"with {names[1]}: {how}"))
        into = f"chained into {name}"
        rewritten += [Rewrite(n, "chain", detail=into, stored=s) for n, s in zip(names, stored, strict=True)]
        rewritten.append(Rewrite(name, "chain", detail=f"chained onto {' and '.join(names)}"))
    return PassResult(tuple(rewritten), tuple(skipped))


def _follow(user: fx.Node, argument: int = 0) -> _Trail:
    """Back from an argument of `user` to the first operator that is more than an activation or a view."""
    node = user.args[argument]
    assert isinstance(node, fx.Node)
    trail = _Trail(node)
    after = user
    while True:
        trail.origin = node
        if list(node.users) != [after] and not trail.blocked:
            others = [_describe(u) for u in node.users if u is not after]
            trail.blocked = f"its output is read by {', '.join(others) or 'the same layer'} as well"
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node):
            return trail
        name = activation_name(node)
        if name is not None and trail.activation == "none":
            trail.activation = name
        elif _is_leading_view(node):
            trail.views.append(node)
        elif node.target in POINTWISE:
            trail.blocked = trail.blocked or f"no kernel computes {_describe(node)} between them"
        elif node.target in CASTS and not keeps_values(node):
            trail.blocked = trail.blocked or "its output changes its dtype"
        elif not keeps_values(node):
            return trail
        trail.nodes.append(node)
        after, node = node, before


def _is_gate(factor: _Trail) -> bool:
    return factor.activation != "none" or bind_arguments(factor.origin)["activation"] != "none"


def _is_leading_view(node: fx.Node) -> bool:
    before, after = tensor_meta(node.args[0]) if node.args else None, tensor_meta(node)
    if node.target not in (*VIEWS, aten.flatten.using_ints) or before is None or after is None:
        return False
    return before.ndim > 0 < after.ndim and statically_known_true(before.shape[-1] == after.shape[-1])


def _refuses(trail: _Trail, firsts: list[_Trail], second: fx.Node) -> str:
    """Why the layers at the ends of `firsts` and `second` cannot be one call, if so."""
    if bind_arguments(second)["residual"] is second.args[0]:
        return "its output is a residual as well"
    for first in firsts:
        bound, x = bind_arguments(first.origin), tensor_meta(first.origin.args[0])
        y = tensor_meta(second)
        if reason := first.blocked or trail.blocked:
            return reason
        if bound["residual"] is not None:
            return "a residual is added to its output"
        if bound["activation"] != "none" and first.activation != "none":
            return "two activations stand between them"
        if x is None or y is None or x.dtype != y.dtype or x.device.type != "cpu":
            return "no kernel for their dtypes or device"
        own = {*trail.nodes, *(n for f in firsts for n in f.nodes), *(f.origin for f in firsts), trail.origin}
        node = first.origin.next
        while node is not second:
            if node not in own and writes(node):  # it might write the first layer's input
                return f"{_describe(node)} between them works in place"
            node = node.next
    return ""


def _refuses_gated(product: _Trail, factors: list[_Trail], second: fx.Node, evaluate: Evaluator) -> str:
    gate, up = (bind_arguments(f.origin) for f in factors)
    last = bind_arguments(second)
    if product.activation != "none" or factors[1].activation != "none" or up["activation"] != "none":
        return "the gate alone may have an activation"
    if any(f.views for f in factors):
        return "the gate is reshaped"
    if gate["x"] is not up["x"]:
        return "gate and up projection read different inputs"
    if gate["out_features"] != up["out_features"]:
        return "gate and up projection differ in width"
    for part in ("values", "structure", "bias"):
        both = (gate[part], up[part])
        if any(node is not None and not evaluate.is_constant(node) for node in both):
            return f"the {part} of its gate is no constant"
    if not all(evaluate.is_constant(last[part]) for part in ("values", "structure")):
        return "its own weight is no constant"
    if any(len(b["values"].users) > 1 for b in (gate, up)):
        return "a weight of the gate serves several calls, stacked it would be stored twice"
    dtypes = {getattr(tensor_meta(b["values"]), "dtype", None) for b in (gate, up)}
    return "" if len(dtypes) == 1 else "gate and up projection store different dtypes"


def _fuse(
    gm: fx.GraphModule,
    firsts: list[fx.Node],
    second: fx.Node,
    trail: _Trail,
    activation: str,
    evaluate: Evaluator,
    ctx: Context,
) -> tuple[list[int | None], str]:
    """Returns: for each of `firsts`, its bytes if stored anew; and how they were packed, if that was measured."""
    first, last = bind_arguments(firsts[0]), bind_arguments(second)
    gated = len(firsts) == 2
    values, structure, bias = (first[part] for part in ("values", "structure", "bias"))
    if first["activation"] != "none":
        activation = first["activation"]
    stored: list[int | None] = [None] * len(firsts)
    how = ""
    if gated:
        weights = [_weight(node, bind_arguments(node), evaluate) for node in firsts]
        packed, how = _pack(weights, second, activation, evaluate, ctx)
        values, structure, bias = _stack(gm, firsts, packed, evaluate)
        share = packed.nbytes * weights[0].nnz // max(1, weights[0].nnz + weights[1].nnz)
        stored = [share, packed.nbytes - share]
    x = first["x"]
    for view in reversed(trail.views):
        x = _replay(view, x, second)
    replace_node(
        second,
        CHAIN,
        (
            *(x, values, structure, bias, activation, gated, last["values"], last["structure"], last["bias"]),
            *(first["out_features"], last["out_features"], last["activation"], last["residual"]),
        ),
    )
    for node in (*trail.nodes, *firsts):  # none has another user; what works in place would outlive them
        gm.graph.erase_node(node)
    return stored, how


def _replay(view: fx.Node, x: fx.Node, before: fx.Node) -> fx.Node:
    """The view of h's leading dimensions, of the x which h is computed from."""
    meta = tensor_meta(x)
    assert meta is not None
    args: tuple[Any, ...] = view.args[1:]
    if view.target in VIEWS:
        args = ([*args[0][:-1], int(meta.shape[-1])],)
    target: Any = aten.reshape.default if view.target in VIEWS else view.target
    with view.graph.inserting_before(before):
        node = view.graph.call_function(target, (x, *args))
    renew_value(view.graph, node)
    return node


def _pack(
    weights: list[CondensedWeight], second: fx.Node, activation: str, evaluate: Evaluator, ctx: Context
) -> tuple[Packed, str]:
    """Both weights as one, the first one's neurons before the other's."""
    bound, y = bind_arguments(second), tensor_meta(second)
    values, structure = evaluate(bound["values"]), evaluate(bound["structure"])
    assert values is not None
    assert structure is not None
    assert y is not None
    batch = math.prod(size_hint(s) for s in y.shape[:-1])
    return ctx.pack_gate(CondensedWeight.stack(weights), Packed(values, structure), activation, batch)


def _stack(
    gm: fx.GraphModule, firsts: list[fx.Node], packed: Packed, evaluate: Evaluator
) -> Iterator[fx.Node | None]:
    """Constant values, structure and bias of both layers as one, the first one's neurons before the other's."""
    bounds = [bind_arguments(node) for node in firsts]
    hidden = bounds[0]["out_features"]
    bias = None
    if any(b["bias"] is not None for b in bounds):
        zeros = packed.values.new_zeros(hidden)
        biases = [evaluate(b["bias"]) for b in bounds]
        bias = torch.cat([zeros if b is None else b.to(zeros.dtype) for b in biases])
    start = after_inputs(gm.graph)
    name = f"{firsts[0].name}_gated"
    for part, value in (("values", packed.values), ("structure", packed.structure), ("bias", bias)):
        yield None if value is None else add_constant(gm, start, f"{name}_{part}", value)


def _weight(node: fx.Node, bound: dict[str, Any], evaluate: Evaluator) -> CondensedWeight:
    values, structure = evaluate(bound["values"]), evaluate(bound["structure"])
    assert isinstance(values, Tensor)
    assert isinstance(structure, Tensor)
    known = node.meta.get(CONDENSED)
    return unpack(Packed(values, structure)) if known is None else known.with_dtype(values.dtype)


def _describe(node: fx.Node) -> str:
    return "the graph's output" if node.op == "output" else f"{node.name} ({node.target})"
