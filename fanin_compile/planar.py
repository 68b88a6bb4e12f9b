"""Which operators stand beside planar images: between condensed convolutions, through what keeps a memory format."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fanin_compile.graph import PLANAR
from fanin_compile.moves import MAX_POOLS, PADS
from fanin_compile.ops_conv import memory_format_by_input, output_format
from fanin_compile.pointwise import activation_name, keeps_values

aten = torch.ops.aten

_SUMS = (aten.add.Tensor, aten.add_.Tensor)


def has_planar(graph: fx.Graph) -> bool:
    """Whether an operator of ours keeps images planar there."""
    return any(node.target in PLANAR for node in graph.nodes)


def is_beside_planar(x: object, y: fx.Node) -> bool:
    """Whether an operator of ours computes `x` or reads `y`, the input and the output of a layer."""
    return _comes_from_planar(x) or _goes_to_planar(y)


def channels_last_instead(x: Tensor, weight: Tensor, y: Tensor) -> torch.memory_format | None:
    """What torch's convolution y gives where ours, by x alone, would give planar images; None if both agree."""
    if memory_format_by_input(x, weight.ndim - 2) != torch.contiguous_format:
        return None
    format = output_format(x, weight)
    return None if format == torch.contiguous_format or y.is_contiguous() else format


def _passes_on(node: fx.Node) -> bool:
    """Whether `node` leaves the memory format of a planar image as it is."""
    same = node.target in (*PADS, *MAX_POOLS, *_SUMS)
    return same or activation_name(node) is not None or keeps_values(node)


def _comes_from_planar(x: object) -> bool:
    seen: set[fx.Node] = set()
    nodes = [x]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        if node.target in PLANAR:
            return True
        seen.add(node)
        if _passes_on(node):
            nodes += node.args[: 2 if node.target in _SUMS else 1]
    return False


def _goes_to_planar(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    nodes = [node]
    while nodes:
        for user in nodes.pop().users:
            if user.target in PLANAR:
                return True
            if user not in seen and _passes_on(user):
                nodes.append(user)
            seen.add(user)
    return False
