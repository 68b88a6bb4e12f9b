"""Attention, fused or written out as two products: what its output takes from its values, what its softmax hides, and
whose keys it reads.

scores = q k^T      [..., heads, m, n]: the neurons of queries and keys are summed over
y = softmax(scores) v                   the neurons of the values come through, averaged over positions
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.axes import Size, Spread, together
from fanin_compile.graph import bind_arguments, tensor_meta
from fanin_compile.moves import DROPOUTS, SAME, SLICE, VIEWS

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = (aten.bmm.default, aten.matmul.default)
SOFTMAXES = (aten.softmax.int, aten._softmax.default)
MOST_QUERIES = 8  # of a head, for which our kernels are: more are a product of matrices
_MERGES = (*VIEWS, aten.clone.default, aten.contiguous.default)
_UNSQUEEZE, _EXPAND = aten.unsqueeze.default, aten.expand.default
_RESHAPES = (*VIEWS, aten.unsqueeze.default, aten.slice.Tensor, aten.expand.default, aten.contiguous.default)


def averaged(values: Spread | None, out: Tensor) -> Spread | None:
    """Facts about weights @ values, by those about the values; None if they vary over positions."""
    if values is None or values.ndim != out.ndim or out.ndim < 3:
        return None
    if not statically_known_true(sym_eq(values.shape[:-2], tuple(out.shape[:-2]))):
        return None  # heads or batches are broadcast
    return values.resized(tuple(out.shape), (out.ndim - 2,))


def contracted(
    parts: Sequence[tuple[Spread | None, int]], lead: Sequence[Size], size: Size
) -> list[Tensor] | None:
    """[rows, size]: facts about tensors whose neurons are summed over, a row for each head along which any of them
    vary; None if something varies over positions.

    Args:
        parts: facts and their dimension of positions, -1 or -2; None: nothing is known, NaN.
        lead: the sizes of the dimensions of heads and batches.
        size: of the dimension summed over.
    """
    if not isinstance(size, int):
        return None
    facts = []
    for spread, positions in parts:
        left = (
            Spread.of(torch.tensor(torch.nan, dtype=torch.float64))
            if spread is None
            else spread.without(positions)
        )
        if left is None:
            return None
        facts.append(left)
    aligned = together(facts, (*lead, size))
    if aligned is None:
        return None
    data = torch.broadcast_tensors(*(spread.data for spread in aligned))
    return [s.with_data(d).rows() for s, d in zip(aligned, data, strict=True)]


def sums_to_one(node: fx.Node) -> bool:
    """Whether the weights by which a product or an attention averages its values do, at every position."""
    if node.target is ATTENTION:
        bound = bind_arguments(node)
        if bound["dropout_p"] or bound["enable_gqa"]:
            return False
        return bound["attn_mask"] is None or _hides_nothing(bound["attn_mask"])
    weights: Any = node.args[0]
    while weights.target in SAME and not (weights.target in DROPOUTS and weights.args[2]):
        weights = weights.args[0]
    meta = tensor_meta(weights)
    if weights.target not in SOFTMAXES or meta is None:
        return False
    return bool(weights.args[1] % meta.ndim == meta.ndim - 1)


def _hides_nothing(mask: object) -> bool:
    """Whether a boolean attention mask is True throughout: `arange(n) + a >= b`, a >= b, however shaped."""
    while isinstance(mask, fx.Node) and mask.target in _RESHAPES:
        mask = mask.args[0]
    if not isinstance(mask, fx.Node) or mask.target is not aten.ge.Scalar:
        return False
    least, bound = 0.0, mask.args[1]
    source: Any = mask.args[0]
    while isinstance(source, fx.Node) and source.target is not aten.arange.default:
        if source.target is aten.add.Tensor and not source.kwargs and isinstance(source.args[1], int):
            least += source.args[1]
        elif source.target not in _RESHAPES:
            return False
        source = source.args[0]
    return isinstance(source, fx.Node) and isinstance(bound, int | float) and least >= bound


def feeds_softmax(node: fx.Node) -> bool:
    """Whether all that becomes of `node` is a softmax over its last dimension, after factors and sums at most: what is
    added to all elements of a row alike changes nothing."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in SOFTMAXES:
            meta = tensor_meta(user)
            return meta is not None and bool(user.args[1] % meta.ndim == meta.ndim - 1)  # type: ignore[operator]
        scaled = user.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(user.args[1], int | float)
        summed = user.target is aten.add.Tensor and user.args[0] is not user.args[1]
        if not (scaled or summed):
            return False
        node = user
    return False


class Repeated(NamedTuple):
    """Keys or values on their way to an attention.

    Attributes:
        source: the heads that there are.
        path: from its reader to what the attention reads; they repeat each head `times` times. Empty: once.
    """

    source: Any
    path: tuple[fx.Node, ...]
    times: int


def repeats(node: object, reader: fx.Node) -> Repeated:
    """What `node`, which `reader` reads, repeats the heads of, by nodes that nobody else reads; or `node` itself."""
    found, path = Repeated(node, (), 1), list[fx.Node]()
    while isinstance(node, fx.Node) and node.target in (*_MERGES, SLICE, _UNSQUEEZE, _EXPAND):
        if list(node.users) != [path[0] if path else reader]:
            break
        path.insert(0, node)
        node = node.args[0]
        meta = tensor_meta(node)
        if meta is not None and (times := _times(tuple(meta.shape), path)) is not None:
            found = Repeated(node, tuple(path), times)
    return found


def _times(shape: tuple[Any, ...], path: list[fx.Node]) -> int | None:
    """How often `path` repeats each head of a tensor of `shape`, if it does nothing else:

    [b, h, t, d]  unsqueeze  [b, h, 1, t, d]  expand  [b, h, n, t, d]  reshape  [b, h * n, t, d]
    """
    if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] == 0:
        return None
    b, h, t, d = shape
    n = path[-1].meta["val"].shape[1] // h
    stages = (shape, (b, h, 1, t, d), (b, h, n, t, d), (b, h * n, t, d))
    steps: tuple[tuple[object, ...], ...] = ((_UNSQUEEZE, *_MERGES), (_EXPAND,), _MERGES)
    at = 0
    for node in path:
        found = tuple(node.meta["val"].shape)
        if node.target is not _EXPAND and same_shape(found, stages[at]):  # a slice that takes all, a copy
            continue
        if at == len(steps) or node.target not in steps[at] or not same_shape(found, stages[at + 1]):
            return None
        at += 1
    return {0: 1, len(steps): n}.get(at)


def unknown_to_kernels(
    bound: Mapping[str, Any], tensors: Sequence[Tensor]
) -> tuple[str, dict[str, object]] | None:
    """Why our kernels do not know an attention with these arguments, on `tensors`, and the values that say so."""
    mask = tensor_meta(bound["attn_mask"])
    dtypes = {t.dtype for t in tensors} | ({mask.dtype} if mask is not None else set())
    if dtypes - {torch.bool} != {torch.float32}:
        return "the kernel knows float32 alone", {"dtypes": ", ".join(sorted(map(str, dtypes)))}
    if devices := {t.device.type for t in tensors} - {"cpu"}:
        return "no kernel for this device", {"devices": ", ".join(sorted(devices))}
    if bound["dropout_p"] or bound["is_causal"]:  # causal: the first query sees the first key alone
        return "dropout, or causal", {name: bound[name] for name in ("dropout_p", "is_causal")}
    return None


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes, or strides, are known to be the same."""
    return len(a) == len(b) and statically_known_true(sym_eq(tuple(a), tuple(b)))


def laid_out(x: Tensor, order: tuple[int, ...]) -> tuple[Any, ...]:
    """The strides of a tensor of x's shape whose dimensions are, from the outermost on in memory, in this order."""
    strides: dict[int, Any] = {}
    size: Any = 1
    for dim in reversed(order):
        strides[dim], size = size, size * x.shape[dim]
    return tuple(strides[dim] for dim in range(x.ndim))
