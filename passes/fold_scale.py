"""Fold a constant factor behind a masked layer into its weight and bias.

    h = linear(x, w, b)                        h = linear(x, w * s, b * s)
    y = r + permute(h) * s        ->           y = r + permute(h)
    (nobody else reads h)

The factor is a number (`h * 0.5`, `h / 8`, `add(r, h, alpha=2)`), or a constant tensor with one element or one for each
neuron, as the layer scale of ConvNeXt. What remains, such as the residual add, is an epilogue. A row's factor does not
touch its mask: where it is 0, the weights stay active. Computed in float64, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile.channels import channel_dim
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import CONDENSED, LAYER, bind_arguments, same_shape, set_layer_weight, tensor_meta
from fanin_compile.moves import PERMUTES, VIEWS, permuted
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
PRODUCTS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar)
QUOTIENTS = (aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar)
SUMS = (aten.add.Tensor, aten.add_.Tensor)


def fold_scale(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    for node in list(gm.graph.nodes):
        for scaled, factor in _scalings(node):
            trail = _trail(scaled, node)
            value = factor if isinstance(factor, int | float) else evaluate(factor)
            if not trail or value is None:
                continue
            layer: fx.Node = trail[0]
            name = layer.meta[LAYER].name
            refusal = _fold(gm, node, trail, value, evaluate)
            if refusal is not None:
                skipped.append(Skip(name, *refusal))
                break
            if node.target in SUMS:
                node.kwargs = {}
            else:
                node.replace_all_uses_with(scaled)
                gm.graph.erase_node(node)
            rewritten.append(Rewrite(name, "folded", detail="scale folded"))
            break
    return PassResult(tuple(rewritten), tuple(skipped))


def _scalings(node: fx.Node) -> list[tuple[fx.Node, Any]]:
    """Each operand of `node` that another may be the factor of; that of a sum is the factor, too, of a division."""
    args: Any = node.args
    pairs: list[tuple[Any, Any]] = []
    if node.target in PRODUCTS:
        # an operator in place may only write to the layer's own output
        pairs = [args] if node.target is aten.mul_.Tensor else [args, args[::-1]]
    elif node.target in QUOTIENTS:
        pairs = [args]
    elif node.target in SUMS and node.kwargs.keys() == {"alpha"} and args[0] is not args[1]:
        pairs = [(args[1], node.kwargs["alpha"])]
    return [(scaled, factor) for scaled, factor in pairs if isinstance(scaled, fx.Node)]


def _trail(scaled: fx.Node, user: fx.Node) -> list[fx.Node]:
    """The masked layer, then the views and permutations of it up to `scaled`, which nobody but `user` sees."""
    trail = [scaled]
    while list(trail[0].users) == [user]:
        if CONDENSED in trail[0].meta:
            return trail
        if trail[0].target not in (*VIEWS, *PERMUTES):
            return []
        user, before = trail[0], trail[0].args[0]
        assert isinstance(before, fx.Node)
        trail.insert(0, before)
    return []


def _fold(
    gm: fx.GraphModule, node: fx.Node, trail: list[fx.Node], factor: float | Tensor, evaluate: Evaluator
) -> tuple[str, dict[str, object]] | None:
    """Scale the layer at the head of `trail`, or say why not."""
    layer = trail[0]
    weight, bound = layer.meta[CONDENSED], bind_arguments(layer)
    before, after = tensor_meta(trail[-1]), tensor_meta(node)
    dtypes = [None if meta is None else meta.dtype for meta in (before, after)]
    given = factor.dtype if isinstance(factor, Tensor) else before.dtype if before is not None else None
    if before is None or after is None or {*dtypes, given} != {before.dtype}:
        return "its factor has another dtype", {"output": dtypes[0], "factor": given, "scaled": dtypes[1]}
    values = torch.as_tensor(factor).double()
    # what the sum adds may be broadcast, and its factor is a number
    if node.target not in SUMS and not same_shape(before, after):
        return "its factor broadcasts it", {"output": tuple(before.shape), "factor": tuple(values.shape)}
    dim = _neurons(trail)
    if values.numel() != 1:
        shape = (1,) * (before.ndim - values.ndim) + tuple(values.shape)
        if dim is None or any(size != 1 for d, size in enumerate(shape) if d != dim):
            return "its factor differs within a neuron", {"factor": tuple(values.shape)}
    scale = values.flatten().expand(weight.out_features)
    if node.target in QUOTIENTS:
        scale = scale.reciprocal()
    if not bool(scale.isfinite().all()):
        return "its factor is not finite", {"neurons": int((~scale.isfinite()).sum())}
    bias = None if bound["bias"] is None else evaluate(bound["bias"])
    if bias is None and bound["bias"] is not None:
        return "its factor stays: its bias is not constant", {"bias": bound["bias"].name}
    if len(bound["weight"].users) > 1:
        return "its factor stays: its weight is used elsewhere", {"users": len(bound["weight"].users)}
    exact = weight.with_dtype(torch.float64).scaled(scale)
    new = exact.with_dtype(weight.values.dtype)
    new_bias = None if bias is None else (bias.double() * scale).to(bias.dtype)
    if not _rounded(exact.values, new.values) or (
        bias is not None and new_bias is not None and not _rounded(bias.double() * scale, new_bias)
    ):
        sizes: dict[str, object] = {"least": float(scale.abs().min()), "largest": float(scale.abs().max())}
        return "its factor takes its weights out of their dtype's range", sizes
    set_layer_weight(gm, layer, new, new_bias)
    return None


def _neurons(trail: list[fx.Node]) -> int | None:
    """The dimension that counts the layer's neurons at the end of `trail`; None if a view is on the way."""
    layer, *moves = trail
    dim = channel_dim(layer)
    for move in moves:
        meta = tensor_meta(move)
        if dim is None or meta is None or move.target not in PERMUTES:
            return None
        dim = permuted(move, meta.ndim).index(dim)
    return dim


def _rounded(exact: Tensor, values: Tensor) -> bool:
    """Whether `values` are those of `exact` but for the rounding of their dtype: none overflowed or lost its digits."""
    return bool(((values.double() - exact).abs() <= torch.finfo(values.dtype).eps * exact.abs()).all())
