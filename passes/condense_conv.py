"""Swap masked convolutions for direct condensed ones.

    y = conv2d(x, w, b, stride, padding, dilation, groups)
        ->  y = fanin.gather_conv(x, values, structure, b, w.shape, stride, padding, dilation, groups)

    torch makes y channels_last where x or w is, our kernel where x is:
    y = conv2d(x, w, ...), w alone channels_last  ->  y = fanin.gather_conv(clone(x, channels_last), ...)

    y = conv2d(x, w, padding="same"), kernel 4    ->    y = fanin.gather_conv(pad(x, [0, 1, 0, 1]), ..., padding 1)

No im2col: each non-zero is one offset into the padded planes of x. Ablated channels come back as their bias.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fanin_compile.graph import (
    CONDENSED,
    CONVOLUTIONS,
    LAYER,
    REFUSAL,
    ConstantNodes,
    bind_arguments,
    kernel_refuses,
    renew_value,
    replace_node,
    spread,
)
from fanin_compile.packed_conv import MAX_TAPS
from fanin_compile.packing_conv import pack_conv
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.planar import channels_last_instead
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten


def condense_conv(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    constants = ConstantNodes(gm)
    for node in list(gm.graph.nodes):
        layer, weight = node.meta.get(LAYER), node.meta.get(CONDENSED)
        if node.target not in CONVOLUTIONS or layer is None or weight is None:
            continue
        x, dense, bias, stride, padding, dilation, groups = _arguments(node, CONVOLUTIONS[node.target])
        kernel = weight.shape[2:]
        pads, uneven = _numeric_padding(padding, kernel, dilation)
        refusal = kernel_refuses(node, layer.name, weight, x, bias) or ctx.gate(layer)
        if (taps := math.prod(kernel)) > MAX_TAPS and refusal is None:
            refusal = Skip(
                layer.name, "its kernel has more taps than codes tell apart", {"taps": taps, "most": MAX_TAPS}
            )
        last = _channels_last_instead(x, dense, node) if refusal is None else None
        if last is not None and x.meta["val"].ndim == len(kernel) + 1:
            refusal = Skip(
                layer.name, "channels_last by its weight, an image without batch", {"format": last}
            )
        if refusal is not None:
            node.meta[REFUSAL] = refusal
            skipped.append(refusal)
            continue
        if any(uneven):
            x = _padded_at_the_end(node, x, uneven)
        if dense not in constants:
            packed = pack_conv(
                weight.with_dtype(ctx.values_dtype),
                stride=stride,
                padding=pads,
                dilation=dilation,
                groups=groups,
            )
            constants.add(dense, values=packed.values, structure=packed.structure)
        if last is not None:
            copy = _copied(gm.graph, x, last, before=node)
            if _channels_last_instead(copy, dense, node) is None:
                x, last = copy, None
            else:  # of one channel or pixel: it is planar in either format
                gm.graph.erase_node(copy)
        new = replace_node(
            node,
            torch.ops.fanin.gather_conv.default,
            (
                *(x, *constants[dense], bias),
                *(list(weight.shape), stride, pads, dilation, groups),
            ),
        )
        if last is not None:
            copy = _copied(gm.graph, new, last, before=new.next)
            new.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)  # type: ignore[misc]
        nbytes = constants.nbytes(dense)
        rewritten.append(Rewrite(layer.name, "gather-conv", bytes=nbytes, macs=layer.sparse_macs))
    return PassResult(tuple(rewritten), tuple(skipped))


def _channels_last_instead(x: fx.Node, weight: fx.Node, y: fx.Node) -> torch.memory_format | None:
    return channels_last_instead(x.meta["val"], weight.meta["val"], y.meta["val"])


def _copied(graph: fx.Graph, node: fx.Node, format: torch.memory_format, *, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        copy = graph.call_function(aten.clone.default, (node,), {"memory_format": format})
    renew_value(graph, copy)
    return copy


def _arguments(node: fx.Node, dims: int) -> tuple[Any, Any, Any, list[int], Any, list[int], int]:
    """x, weight, bias, stride, padding, dilation, groups: defaults filled in, one number spread to all dims."""
    bound = bind_arguments(node)
    x, weight = bound["input"], bound["weight"]
    padding = bound["padding"]
    return (
        *(x, weight, bound["bias"], spread(bound["stride"], dims)),
        padding if isinstance(padding, str) else spread(padding, dims),
        *(spread(bound["dilation"], dims), bound["groups"]),
    )


def _numeric_padding(
    padding: object, kernel: tuple[int, ...], dilation: list[int]
) -> tuple[list[int], list[int]]:
    """The border on both sides of each dimension, and what 'same' of an even kernel adds at the end, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [t // 2 for t in totals], [t % 2 for t in totals]
    if padding == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    assert isinstance(padding, list)
    return padding, [0] * len(kernel)


def _padded_at_the_end(node: fx.Node, x: fx.Node, extra: list[int]) -> fx.Node:
    pads = [n for more in reversed(extra) for n in (0, more)]
    with node.graph.inserting_before(node):
        padded = node.graph.call_function(aten.constant_pad_nd.default, (x, pads))
    padded.meta = {key: value for key, value in node.meta.items() if key not in (LAYER, CONDENSED)}
    renew_value(node.graph, padded)
    return padded
