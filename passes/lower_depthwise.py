"""Run dense depthwise convolutions beside condensed ones by our own kernel, padding included.

    h = gather_conv(x, ...)
    p = pad(h, (0, 1, 0, 1))             ->   h = gather_conv(x, ...)
    y = conv2d(p, w, b, 2, groups=c)          y = fanin.depthwise_conv(h, w, b, (2, 2), (0, 1, 0, 1), ...)
    (p has no other user)

Condensed convolutions read and write planar images. Dense ones from oneDNN are fastest channels_last, and inductor
copies between the two on either side; a padding of its own (as TensorFlow's "same", uneven) is a further pass over
memory. Graphs without a condensed convolution are left as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fanin_compile.effects import writes_between
from fanin_compile.graph import CONVOLUTIONS, NAME, bind_arguments, replace_node, spread, tensor_meta
from fanin_compile.moves import PADS
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.planar import channels_last_instead, has_planar, is_beside_planar
from fanin_compile.records import Rewrite, Skip


def lower_depthwise(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    if not has_planar(gm.graph):
        return PassResult()
    for node in list(gm.graph.nodes):
        if node.target not in CONVOLUTIONS:
            continue
        bound, dims = bind_arguments(node), CONVOLUTIONS[node.target]
        x, weight, bias = bound["input"], bound["weight"], bound["bias"]
        shape = None if (meta := tensor_meta(weight)) is None else meta.shape
        if shape is None or bound["groups"] == 1 or shape[1] != 1:
            continue
        name = node.meta.get(NAME) or ctx.names.get(str(weight.target), str(weight.target))
        refusal = _refusal(name, node, x, weight, bias)
        if refusal is not None:
            skipped.append(refusal)
            continue
        dilation = spread(bound["dilation"], dims)
        padding = _padding(bound["padding"], list(shape[2:]), dilation)
        folded = _folded_pad(x, node, dims)
        if folded is not None:
            x, padding = x.args[0], [a + b for a, b in zip(padding, folded, strict=True)]
        new = replace_node(
            node,
            torch.ops.fanin.depthwise_conv.default,
            (x, weight, bias, spread(bound["stride"], dims), padding, dilation),
        )
        new.meta[NAME] = name
        detail = "planar kernel" if folded is None else f"planar kernel, padding {folded} folded"
        rewritten.append(Rewrite(name, "depthwise-conv", detail=detail))
    return PassResult(tuple(rewritten), tuple(skipped))


def _refusal(name: str, node: fx.Node, x: object, weight: object, bias: object) -> Skip | None:
    given = {"input": x, "weight": weight, "bias": bias, "output": node}
    metas: dict[str, Any] = {what: tensor_meta(value) for what, value in given.items() if value is not None}
    dtypes = {what: None if meta is None else meta.dtype for what, meta in metas.items()}
    if set(dtypes.values()) != {torch.float32}:
        return Skip(name, "depthwise: the planar kernel knows float32 alone", dtypes)
    devices = {meta.device.type for meta in metas.values() if meta is not None}
    if devices != {"cpu"}:
        return Skip(name, "depthwise: no kernel for this device", {"device": ", ".join(sorted(devices))})
    last = channels_last_instead(metas["input"], metas["weight"], metas["output"])
    if last is not None:
        return Skip(name, "depthwise: the planar kernel goes by its input, its weight is", {"format": last})
    if not is_beside_planar(x, node):
        return Skip(name, "depthwise: beside no condensed convolution", {"input": x})
    return None


def _folded_pad(pad: fx.Node, conv: fx.Node, dims: int) -> list[int] | None:
    """What `pad` adds before and behind each spatial dimension, outermost first, if the convolution can do so."""
    if pad.target not in PADS or list(pad.users) != [conv] or writes_between(pad, conv):
        return None
    bound = bind_arguments(pad)
    if bound.get("mode", "constant") != "constant" or (bound["value"] or 0) != 0:
        return None
    numbers: list[Any] = list(bound["pad"])  # innermost dimension first
    numbers += [0] * (2 * dims - len(numbers))
    if len(numbers) != 2 * dims or not all(isinstance(n, int) and n >= 0 for n in numbers):
        return None
    return [n for d in range(dims) for n in numbers[2 * (dims - 1 - d) :][:2]]


def _padding(padding: str | int | list[int], kernel: list[int], dilation: list[int]) -> list[int]:
    """Before and behind each dimension; "same" puts the odd one behind, as aten does."""
    if padding == "valid":
        return [0] * 2 * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [n for total in totals for n in (total // 2, total - total // 2)]
    assert not isinstance(padding, str)
    return [n for n in spread(padding, len(kernel)) for _ in range(2)]
