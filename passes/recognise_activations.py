"""Write an activation that is spelled out in elementary operators as the one operator it is.

    y = 0.5 * x * (1 + tanh(0.79788 * (x + 0.044715 * x ** 3)))    ->    y = gelu(x, approximate="tanh")
    y = x * 0.5 * (1 + erf(x / 1.41421))                           ->    y = gelu(x)
    y = x * sigmoid(x)                                             ->    y = silu(x)

GPT-2, T5 and much hand-written code do so, which hides the activation from the layer before it. No list of spellings:
an expression of one tensor, made of analytic functions and constants alone, is evaluated in float64 over the whole
range and compared. Where it agrees far beyond the rounding of float32, it is that function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from fanin_compile.effects import writes_between
from fanin_compile.graph import LAYER, replace_node, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite

aten = torch.ops.aten
# Analytic, so that two expressions which agree on many points agree between them as well.
_FUNCTIONS: dict[object, Callable[..., Any]] = {
    aten.mul.Tensor: operator.mul,
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.div.Tensor: operator.truediv,
    aten.rsub.Scalar: lambda a, b: b - a,
    aten.neg.default: operator.neg,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.square.default: torch.square,
    aten.reciprocal.default: torch.reciprocal,
    aten.tanh.default: torch.tanh,
    aten.erf.default: torch.erf,
    aten.exp.default: torch.exp,
    aten.sigmoid.default: torch.sigmoid,
}
_KNOWN: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "gelu": (aten.gelu.default, {}, F.gelu),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}, lambda z: F.gelu(z, approximate="tanh")),
    "silu": (aten.silu.default, {}, F.silu),
}
_MOST = 16  # operators of the longest spelling that is tried
_TOLERANCE = 2.0**-27  # an eighth of float32's rounding: constants are often written with ten digits
_SIZES = torch.logspace(-6, 2, 400, dtype=torch.float64)
_POINTS = torch.cat([-_SIZES, torch.zeros(1, dtype=torch.float64), _SIZES])


def recognise_activations(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    gone: set[fx.Node] = set()
    for root in reversed(list(gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor))):
        if root in gone:  # within a longer expression
            continue
        for x, nodes in _expressions(root):
            first = next(node for node in gm.graph.nodes if node in nodes)
            known = LAYER in x.meta and not writes_between(first, root)  # of x
            name = _recognise(root, x, nodes) if known else None
            if name is not None:
                target, kwargs, _ = _KNOWN[name]
                replace_node(root, target, (x,)).kwargs = kwargs
                gone |= nodes
                layer = x.meta[LAYER].name
                rewritten.append(Rewrite(layer, "activation", detail=f"its activation recognised as {name}"))
                break
    return PassResult(tuple(rewritten))


def _expressions(root: fx.Node) -> Iterator[tuple[fx.Node, set[fx.Node]]]:
    """Every node which `root` is an expression of alone, and the operators between, whose results nobody else reads."""
    meta = tensor_meta(root)
    nodes: set[fx.Node] = set()
    frontier = [root]
    while meta is not None and len(nodes) < _MOST:
        # a node goes inside once all its users are, so what everything else is computed from comes last
        inner = next((n for n in frontier if n is root or (_inner(n) and nodes.issuperset(n.users))), None)
        if inner is None or not _alike(inner, meta):
            return
        nodes.add(inner)
        seen = dict.fromkeys([*frontier, *inner.all_input_nodes])
        frontier = [n for n in seen if n not in nodes]
        if len(frontier) == 1 and _alike(frontier[0], meta):
            yield frontier[0], set(nodes)


def _inner(node: fx.Node) -> bool:
    return node.target in _FUNCTIONS and not node.kwargs


def _alike(node: fx.Node, meta: Tensor) -> bool:
    """Whether `node` is a floating tensor of the same shape and dtype: nothing is cast or broadcast."""
    own = tensor_meta(node)
    return own is not None and own.dtype == meta.dtype and own.is_floating_point() and own.shape == meta.shape


def _recognise(root: fx.Node, x: fx.Node, nodes: set[fx.Node]) -> str | None:
    """The name of the activation that `root` is of x, by its values at _POINTS."""
    values: dict[fx.Node, Any] = {x: _POINTS}
    for node in root.graph.nodes:
        if node in nodes:
            values[node] = _FUNCTIONS[node.target](*map_arg(node.args, values.__getitem__))
    bound = _TOLERANCE * _POINTS.abs()
    for name, (_, _, function) in _KNOWN.items():
        if bool(((values[root] - function(_POINTS)).abs() <= bound).all()):
            return name
    return None
