"""Compute the norm of a layer's input where the layer packs it.

    n = layer_norm(x, [in], weight, bias, eps)
    y = gather_matmul(n, W, ...)                       ->    y = gather_matmul(x, W, ..., norm=constants)
    z = gather_matmul_chain(n, V, ...)                       z = gather_matmul_chain(x, V, ..., norm=constants)
    (n has no other reader)

Root-mean-square norms as well, as one operator or as the five that transformers' models write. Every layer that reads a
norm computes it anew, on rows which are in cache: a hundredth of the work of a layer 768 -> 3072. A norm that anybody
else reads stays: there it would be computed once more, not once less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fanin_compile import ops_chain  # noqa: F401  (it defines an operator named below)
from fanin_compile.effects import writes_between
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    KERNEL_DTYPES,
    add_constant,
    after_inputs,
    bind_arguments,
    layer_label,
    tensor_meta,
)
from fanin_compile.norm import pack_norm
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
LAYERS = (torch.ops.fanin.gather_matmul.default, torch.ops.fanin.gather_matmul_chain.default)


@dataclass(frozen=True)
class _Norm:
    """A norm as found: of x, over its last dimension.

    Attributes:
        nodes: all of it, in the order of the graph; the last one is what layers read.
        size: of the last dimension.
    """

    kind: str
    x: fx.Node
    nodes: tuple[fx.Node, ...]
    size: int
    weight: object
    bias: object
    eps: float


def fuse_norm(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    for node in list(gm.graph.nodes):
        layers = [user for user in node.users if user.target in LAYERS and user.args[0] is node]
        norm = _find(node) if layers else None
        if norm is None:
            continue
        names = [layer_label(layer, ctx.names) for layer in layers]
        if refusal := _refuses(norm, layers, evaluate):
            skipped += [Skip(name, f"norm of its input not fused: {refusal}") for name in names]
            continue
        _fuse(gm, norm, layers, evaluate)
        rewritten += [Rewrite(name, "norm", detail=norm.kind) for name in names]
    return PassResult(tuple(rewritten), tuple(skipped))


def _find(node: fx.Node) -> _Norm | None:
    """The norm whose result `node` is."""
    if node.target in (aten.layer_norm.default, aten.rms_norm.default):
        bound = bind_arguments(node)
        x, shape, eps = bound["input"], bound["normalized_shape"], bound["eps"]
        if len(shape) != 1 or not isinstance(shape[0], int) or eps is None:
            return None
        kind = "layer norm" if node.target is aten.layer_norm.default else "rms norm"
        return _Norm(kind, x, (node,), shape[0], bound["weight"], bound.get("bias"), eps)
    return _find_spelled_rms(node)


def _find_spelled_rms(node: fx.Node) -> _Norm | None:
    """weight * (x * rsqrt(mean(x^2) + eps)), the weight on either side."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    for weight, scaled in (node.all_input_nodes, node.all_input_nodes[::-1]):
        if scaled.target is not aten.mul.Tensor or len(scaled.all_input_nodes) != 2:
            continue
        for x, rsqrt in (scaled.all_input_nodes, scaled.all_input_nodes[::-1]):
            nodes = _mean_square(x, rsqrt)
            meta, factor = tensor_meta(x), tensor_meta(weight)
            if nodes is None or meta is None or factor is None or not isinstance(meta.shape[-1], int):
                continue
            add = bind_arguments(nodes[2])
            if not isinstance(add["other"], int | float) or add["alpha"] != 1:
                continue
            if tuple(factor.shape) == (meta.shape[-1],):
                every = (*nodes, scaled, node)
                return _Norm("rms norm", x, every, meta.shape[-1], weight, None, float(add["other"]))
    return None


def _mean_square(x: fx.Node, rsqrt: fx.Node) -> tuple[fx.Node, ...] | None:
    """The nodes of rsqrt(mean(x^2) + eps), if that is what `rsqrt` is."""
    chain = [rsqrt]
    for target in (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim):
        before = chain[0].args[0] if chain[0].target is target else None
        if not isinstance(before, fx.Node):
            return None
        chain.insert(0, before)
    square, mean = chain[0], bind_arguments(chain[1])
    squares = square.target is aten.pow.Tensor_Scalar and square.args == (x, 2)
    if not squares or list(mean["dim"] or ()) != [-1] or not mean["keepdim"] or mean["dtype"] is not None:
        return None
    return tuple(chain)


def _refuses(norm: _Norm, layers: list[fx.Node], evaluate: Evaluator) -> str:
    """Why `layers` cannot take the norm of their inputs over, if so."""
    last = norm.nodes[-1]
    if others := [user for user in last.users if user not in layers]:
        names = ", ".join("the graph's output" if n.op == "output" else n.name for n in others)
        return f"it is read by {names} as well"
    if any(_reads_twice(layer, last) for layer in layers):
        return "it is a residual as well"
    if any(user not in norm.nodes for node in norm.nodes[:-1] for user in node.users):
        return "what it computes on the way is read elsewhere"
    metas = [tensor_meta(norm.x), *map(tensor_meta, norm.nodes)]
    if any(meta is None or meta.dtype not in KERNEL_DTYPES or meta.device.type != "cpu" for meta in metas):
        return "no kernel for its dtype or device"
    if len({meta.dtype for meta in metas if meta is not None}) != 1:
        return "it changes the dtype"
    if any(part is not None and not evaluate.is_constant(part) for part in (norm.weight, norm.bias)):
        return "its weight or bias is not constant"
    if any(bind_arguments(layer)["norm"] is not None for layer in layers):
        return "the layer has one already"
    if any(writes_between(norm.nodes[0], layer) for layer in layers):
        return "something between them works in place"
    return ""


def _reads_twice(layer: fx.Node, node: fx.Node) -> bool:
    return any(value is node for name, value in bind_arguments(layer).items() if name != "x")


def _fuse(gm: fx.GraphModule, norm: _Norm, layers: list[fx.Node], evaluate: Evaluator) -> None:
    x = tensor_meta(norm.x)
    assert isinstance(x, Tensor)
    packed = pack_norm(
        *(norm.size, evaluate(norm.weight), evaluate(norm.bias), norm.eps),
        centred=norm.kind == "layer norm",
        dtype=x.dtype,
    )
    constants = add_constant(gm, after_inputs(gm.graph), f"{norm.nodes[-1].name}_norm", packed)
    for layer in layers:
        layer.args = tuple((bind_arguments(layer) | {"x": norm.x, "norm": constants}).values())
        layer.kwargs = {}
    for node in reversed(norm.nodes):
        gm.graph.erase_node(node)
