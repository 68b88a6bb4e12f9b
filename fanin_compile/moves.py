"""Where operators that only move elements take them: facts about an input become facts about the output.

Views, permutations, slices, pieces, concatenations, repetitions; and what pools, pads or averages over dimensions
along which the facts do not differ.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile.axes import Spread, together
from fanin_compile.graph import bind_arguments, tensor_meta

aten = torch.ops.aten

DROPOUTS = (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default)
SAME = (
    *DROPOUTS,
    *(aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default),
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default),
)
MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
AVG_POOLS = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
ADAPTIVE_POOLS = tuple(
    getattr(aten, f"adaptive_avg_pool{n}d").default for n in (1, 2, 3)
)  # max ones return indices as well
POOLS = (*MAX_POOLS, *AVG_POOLS, *ADAPTIVE_POOLS)
UPSAMPLES = tuple(
    getattr(aten, name).vec
    for name in (
        *(f"upsample_nearest{n}d" for n in (1, 2, 3)),
        *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
        *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),  # averages of neighbours
    )
)
CATS = (aten.cat.default, aten.stack.default)
REDUCTIONS = (aten.mean.dim, aten.amax.default, aten.amin.default)
PADS = (aten.pad.default, aten.constant_pad_nd.default)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default)
SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
SLICE, NARROW, SELECT = aten.slice.Tensor, aten.narrow.default, aten.select.int
CUTS = (SLICE, NARROW, SELECT)
PIECES = (
    *(aten.chunk.default, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default),
    *(aten.unbind.int, aten.unsafe_chunk.default, aten.unsafe_split.Tensor),
)

Facts = Callable[[object], Spread | None]  # about the tensor of a node
Join = Callable[[list[Tensor]], Tensor]  # of facts about different elements that come to share one


def moved(node: fx.Node, facts: Facts, join: Join) -> Spread | None:
    """The facts about the output of `node`; None if it is no such operator or its input's are unknown or lost."""
    move = _MOVES.get(node.target)
    out = tensor_meta(node)
    return None if move is None or out is None else move(node, out, facts, join)


def is_move(node: fx.Node) -> bool:
    return node.target in _MOVES


def _dims(value: Any, ndim: int) -> list[int]:
    return [int(d) % ndim for d in ([value] if isinstance(value, int) else value)]


def _view(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source = facts(node.args[0])
    return None if source is None else source.view(tuple(out.shape))


def _permute(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source = facts(node.args[0])
    return None if source is None else source.permute(permuted(node, out.ndim))


def permuted(node: fx.Node, ndim: int) -> list[int]:
    """For a transpose, t or permute node: which input dimension each output dimension is."""
    args: Any = node.args
    if node.target is aten.permute.default:
        return _dims(args[1], ndim)
    order = list(range(ndim))
    if node.target is aten.t.default:
        return order[::-1]
    a, b = _dims((-2, -1) if node.target is aten.mT.default else args[1:3], ndim)
    order[a], order[b] = order[b], order[a]
    return order


@dataclass(frozen=True)
class Cut:
    """What a slice, a select or a piece of a split takes.

    Attributes:
        dim: of `source`, the tensor that is cut.
        indices: along it: a range, or the one index of a select; None unless they and the size are numbers.
    """

    source: fx.Node
    dim: int
    indices: range | int | None


def cut_of(node: fx.Node) -> Cut | None:
    """The cut that `node` makes, if it is a slice, a select or the getitem of split, chunk or unbind."""
    piece = node.target is operator.getitem
    call: Any = node.args[0] if piece else node
    if not isinstance(call, fx.Node) or call.target not in (PIECES if piece else CUTS):
        return None
    bound, source, meta = bind_arguments(call), call.args[0], tensor_meta(call.args[0])
    if not isinstance(source, fx.Node) or meta is None:
        return None
    dim = int(bound["dim"]) % meta.ndim
    size = meta.shape[dim]
    if call.target in (SLICE, NARROW):
        bounds = [bound.get(name) for name in ("start", "end", "length", "step")]
        if not all(isinstance(n, int) for n in (size, *(b for b in bounds if b is not None))):
            return Cut(source, dim, None)
        start, end, length, step = bounds
        if start is not None and length is not None:  # of a narrow
            start = start + size if start < 0 else start
            end = start + length
        return Cut(source, dim, range(size)[slice(start, end, step)])
    index: Any = node.args[1] if piece else bound["index"]
    if not isinstance(size, int) or not isinstance(index, int):
        return Cut(source, dim, None)
    if call.target in (SELECT, aten.unbind.int):
        return Cut(source, dim, index % size)
    sizes = [part.shape[dim] for part in call.meta["val"]]
    index %= len(sizes)
    return Cut(source, dim, range(sum(sizes[:index]), sum(sizes[: index + 1])))


def _cut(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    cut = cut_of(node)
    source = None if cut is None else facts(cut.source)
    if cut is None or source is None:
        return None
    if isinstance(cut.indices, int):
        return source.taken(cut.dim, cut.indices, 1)
    if cut.indices is not None:
        return source.taken(cut.dim, cut.indices, out.shape[cut.dim])
    if source.varies(cut.dim):
        return None
    if out.ndim < source.ndim:
        return source.taken(cut.dim, 0, 1)
    return source.resized(tuple(out.shape), (cut.dim,))


def _cat(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    tensors: Any = node.args[0]
    (dim,) = _dims(bind_arguments(node)["dim"], out.ndim)
    spreads = [facts(tensor) for tensor in tensors]
    if node.target is aten.stack.default:
        one = [*out.shape[:dim], 1, *out.shape[dim + 1 :]]
        spreads = [None if spread is None else spread.view(one) for spread in spreads]
    known = [s.merged(dim) for s in spreads if s is not None and s.ndim == out.ndim]
    pieces = [s for s in known if s is not None]
    if len(pieces) < len(spreads):
        return None  # cat also takes an empty vector among tensors of any rank
    across = [piece.taken(dim, range(1), 1) for piece in pieces]
    aligned = together([s for s in across if s is not None], tuple(out.shape))
    if aligned is None or len(aligned[0].axes[dim]) != 1:
        return None
    axes, (at,) = aligned[0].axes, aligned[0].span(dim)
    flat = [size for group in axes for size in group]
    data = []
    for piece in pieces:
        size = piece.axes[dim][0]
        view = piece.view([*flat[:at], size, *flat[at + 1 :]])
        if view is None:
            return None
        data.append(view.data.unsqueeze(at) if isinstance(size, int) and size == 1 else view.data)
    if all(d.shape[at] == 1 for d in data):
        return Spread(axes, join(data))
    if not all(isinstance(piece.axes[dim][0], int) for piece in pieces):
        return None
    others = torch.broadcast_shapes(*(d.narrow(at, 0, 1).shape for d in data))
    full = [
        d.expand([*others[:at], int(piece.axes[dim][0]), *others[at + 1 :]])
        for d, piece in zip(data, pieces, strict=True)
    ]
    return Spread(axes, torch.cat(full, at))


def _expand(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source = facts(node.args[0])
    return None if source is None else source.broadcast(tuple(out.shape))


def _repeat(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    """repeat: each dimension as a whole, so many times."""
    source, times = facts(node.args[0]), node.args[1]
    if source is None or not isinstance(times, list | tuple) or not all(isinstance(t, int) for t in times):
        return None
    whole = source.broadcast((1,) * (out.ndim - source.ndim) + source.shape)
    axes, sizes = [], []
    for dim, count in enumerate(times):
        repeated = () if count == 1 else (count,)
        axes.append((*repeated, *whole.axes[dim]))
        sizes += [1] * len(repeated) + [whole.data.shape[i] for i in whole.span(dim)]
    return Spread(tuple(axes), whole.data.reshape(sizes))


def _flip(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source = facts(node.args[0])
    if source is None:
        return None
    axes = [axis for dim in _dims(node.args[1], out.ndim) for axis in source.span(dim)]
    return source.with_data(source.data.flip(axes))


def _roll(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    """Along dimensions in which facts do not differ."""
    source, dims = facts(node.args[0]), bind_arguments(node)["dims"]
    if source is None or not dims or any(map(source.varies, _dims(dims, out.ndim))):
        return None
    return source


def _pool(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source = facts(node.args[0])
    return None if source is None else source.resized(tuple(out.shape), pooled_dims(node, out.ndim))


def pooled_dims(node: fx.Node, ndim: int) -> range:
    """The dimensions, the last ones, over which a pool pools and an upsampling repeats."""
    dims = re.search(r"(\d)d[._]", str(node.target))
    assert dims is not None
    return range(ndim - int(dims[1]), ndim)


def _pad(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    source, pads = facts(node.args[0]), padded_dims(node, out.ndim)
    return None if source is None or pads is None else source.resized(tuple(out.shape), pads)


def padded_dims(node: fx.Node, ndim: int) -> list[int] | None:
    pads: Any = node.args[1]
    if not all(isinstance(pad, int) for pad in pads):
        return None
    return [ndim - 1 - i // 2 for i, pad in enumerate(pads) if pad != 0]


def _reduce(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    bound, meta = bind_arguments(node), tensor_meta(node.args[0])
    source = facts(node.args[0])
    if source is None or meta is None or not (bound["dim"] or bound["dim"] == 0):
        return None  # over everything
    dims = _dims(bound["dim"], meta.ndim)
    shape = [1 if dim in dims else size for dim, size in enumerate(meta.shape)]
    reduced = source.resized(shape, dims)
    return None if reduced is None else reduced.view(tuple(out.shape))


def _same(node: fx.Node, out: Tensor, facts: Facts, join: Join) -> Spread | None:
    return facts(node.args[0])


_MOVES: dict[object, Callable[[fx.Node, Tensor, Facts, Join], Spread | None]] = {
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys((*VIEWS, *SQUEEZES, aten.flatten.using_ints, aten.unflatten.int), _view),
    aten.unsqueeze.default: _view,
    **dict.fromkeys(PERMUTES, _permute),
    **dict.fromkeys((*CUTS, operator.getitem), _cut),
    **dict.fromkeys(CATS, _cat),
    **dict.fromkeys((aten.expand.default, aten.expand_as.default), _expand),
    aten.repeat.default: _repeat,
    aten.flip.default: _flip,
    aten.roll.default: _roll,
    **dict.fromkeys((*POOLS, *UPSAMPLES), _pool),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(REDUCTIONS, _reduce),
}


def pads_nothing(node: fx.Node) -> bool:
    """Whether `node` pads its first argument by literal zeros on every side: a copy of it, laid out alike."""
    if node.target not in PADS or any(type(n) is not int or n != 0 for n in bind_arguments(node)["pad"]):
        return False
    before, after = tensor_meta(node.args[0]), tensor_meta(node)
    return before is not None and after is not None and laid_out_alike(before, after)


def laid_out_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same strides; as text, as comparing symbolic ones would guard on them."""
    return str(a.stride()) == str(b.stride())
