"""Run dense layers of few rows, whose weight comes from memory, by our own kernel.

    y = linear(x, weight, bias)    ->    y = fanin.skinny_linear(x, weight, bias)
    (x has at most 16 rows, at the example inputs' sizes; the weight is large)

The head of a decoder is one: its weight is read whole for every token, and torch's product with one row reads it at a
third of what memory gives. Called with more rows, the operator is torch's own product. Layers with a mask are left as
they are: what became of them is in the report.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from fanin_compile.graph import LAYER, bind_arguments, has_condensed, replace_node, size_hint, tensor_meta
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

MOST_ROWS = 16  # kFew in kernels/skinny.h
LEAST_BYTES = 1 << 20  # of a weight: what is smaller stays in the caches and takes a few us


def lower_skinny_linear(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    if not has_condensed(gm.graph):
        return PassResult()
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if LAYER in node.meta:
            continue
        bound = bind_arguments(node)
        x, weight, bias = (tensor_meta(bound[name]) for name in ("input", "weight", "bias"))
        if x is None or weight is None or weight.ndim != 2 or not _is_large(weight):
            continue
        rows = math.prod(size_hint(n) for n in x.shape[:-1])
        if not 1 <= rows <= MOST_ROWS:
            continue
        refusal = _refusal(node.name, x, weight, bias)
        if refusal is not None:
            skipped.append(refusal)
            continue
        args = (bound["input"], bound["weight"], bound["bias"])
        new = replace_node(node, torch.ops.fanin.skinny_linear.default, args)
        rewritten.append(Rewrite(new.name, "skinny-linear", detail=f"{rows} rows, streaming kernel"))
    return PassResult(tuple(rewritten), tuple(skipped))


def _is_large(weight: Tensor) -> bool:
    symbolic = any(isinstance(n, torch.SymInt) for n in weight.shape)
    return not symbolic and weight.numel() * weight.element_size() >= LEAST_BYTES


def _refusal(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Skip | None:
    """Why a large layer of few rows stays torch's own."""
    tensors = [t for t in (x, weight, bias) if t is not None]
    if any(t.dtype != torch.float32 for t in tensors):
        dtypes = [t.dtype for t in tensors]
        return Skip(name, "skinny linear: the kernel knows float32 alone", {"dtypes": dtypes})
    devices = {t.device.type for t in tensors}
    if devices != {"cpu"}:
        return Skip(name, "skinny linear: no kernel for this device", {"devices": sorted(devices)})
    return None
