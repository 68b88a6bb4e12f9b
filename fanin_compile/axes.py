"""Spread: facts about the elements of a tensor, stored along the few axes where they vary.

    linear's output [batch, 64]          axes ((batch,), (64,))            data [1, 64]: one fact a neuron
    view(batch, 4, 16)                   axes ((batch,), (4,), (16,))      data [1, 4, 16]
    transpose, reshape(batch * 4, 16)    axes ((batch, 4), (16,))          data [1, 4, 16]

A dimension may be made of several axes, so that it can merge a symbolic size with a varying one and be split again.
Facts are moved by the tensor's own operators: what a view or a permutation does to elements it does to their facts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.errors import FormatError

Size = int | torch.SymInt


@dataclass(frozen=True, eq=False)
class Spread:
    """A fact for each element of a tensor.

    Attributes:
        axes: for each dimension, the sizes of the axes it is made of, outermost first; those of size 1 are left out.
        data: one dimension an axis, in order, of the axis's size or 1: the same all along it.
    """

    axes: tuple[tuple[Size, ...], ...]
    data: Tensor

    def __post_init__(self) -> None:
        sizes = list(itertools.chain(*self.axes))
        if len(sizes) != self.data.ndim or any(
            n != 1 and not _is(size, n) for n, size in zip(self.data.shape, sizes, strict=True)
        ):
            raise FormatError(f"facts have shape {tuple(self.data.shape)}, expected 1 or all of axes {sizes}")

    @classmethod
    def along(cls, shape: Sequence[Size], dim: int, values: Tensor) -> Spread:
        """One fact for each index of one dimension, values [shape[dim]], of a tensor of `shape`."""
        axes = tuple(() if _is(size, 1) else (size,) for size in shape)
        sizes = [len(values) if i == dim else 1 for i, group in enumerate(axes) if group]
        return cls(axes, values.reshape(sizes))

    @classmethod
    def of(cls, facts: Tensor) -> Spread:
        """A fact for each element, of a tensor of fixed shape."""
        return cls(tuple(() if size == 1 else (size,) for size in facts.shape), facts.squeeze())

    @property
    def ndim(self) -> int:
        return len(self.axes)

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(math.prod(group) for group in self.axes)

    def span(self, dim: int) -> range:
        """The dimensions of `data` which are axes of dimension `dim`."""
        start = sum(len(group) for group in self.axes[:dim])
        return range(start, start + len(self.axes[dim]))

    def varies(self, dim: int) -> bool:
        return any(self.data.shape[i] != 1 for i in self.span(dim))

    @property
    def varying(self) -> list[int]:
        """The axes along which facts differ, outermost first: dimensions of `data`."""
        return [i for i, size in enumerate(self.data.shape) if size != 1]

    def dim_of(self, axis: int) -> int:
        return next(dim for dim in range(self.ndim) if axis in self.span(dim))

    def with_data(self, data: Tensor) -> Spread:
        return Spread(self.axes, data)

    def by_dim(self) -> Tensor | None:
        """The facts with one dimension for each of the tensor's, of size 1 where they do not vary; None if a dimension
        along which they vary has a symbolic size."""
        data, sizes = self.data, []
        full = list(data.shape)
        for dim, group in enumerate(self.axes):
            if not self.varies(dim):
                sizes.append(1)
                continue
            if not all(isinstance(size, int) for size in group):
                return None
            for i, size in zip(self.span(dim), group, strict=True):
                full[i] = int(size)
            sizes.append(math.prod(int(size) for size in group))
        return data.expand(full).reshape(sizes)

    def alone(self, dim: int) -> Tensor | None:
        """The facts along one dimension [shape[dim]], if they vary along no other and its size is fixed."""
        group = self.axes[dim]
        if any(self.varies(d) for d in range(self.ndim) if d != dim) or not all(
            isinstance(size, int) for size in group
        ):
            return None
        facts = self.data.reshape([self.data.shape[i] for i in self.span(dim)])
        return facts.expand([int(size) for size in group]).reshape(-1)

    def rows(self) -> Tensor:
        """The facts [rows, size of the last dimension], one row for each index of the other axes along which they vary;
        the last dimension's size is fixed."""
        last = [int(size) for size in self.axes[-1]]
        rows = self.data.expand([*self.data.shape[: self.data.ndim - len(last)], *last])
        return rows.reshape(-1, math.prod(last))

    def without(self, dim: int) -> Spread | None:
        """The facts about any one slice along `dim`; None if they vary there."""
        dim %= self.ndim
        return None if self.varies(dim) else self.taken(dim, 0, 1)

    def view(self, shape: Sequence[Size]) -> Spread | None:
        """The facts of the same elements in the same order, as a tensor of `shape`; None where an axis would be cut
        across, as by 2 x 3 -> 3 x 2."""
        flat = list(itertools.chain(*self.axes))
        sizes = [n for size, n in zip(flat, self.data.shape, strict=True) if not _is(size, 1)]
        axes = [size for size in flat if not _is(size, 1)]
        groups: list[tuple[Size, ...]] = []
        i = 0
        for wanted in shape:
            left, start = wanted, i
            while not _is(left, 1):
                if i == len(axes):
                    return None
                if (quotient := _divided(left, axes[i])) is not None:
                    left, i = quotient, i + 1
                elif (quotient := _divided(axes[i], left)) is not None:
                    axes[i : i + 1] = [left, quotient]
                    sizes[i : i + 1] = [1, 1] if sizes[i] == 1 else [int(left), int(quotient)]
                elif i + 1 < len(axes) and sizes[i] == sizes[i + 1] == 1:
                    axes[i : i + 2] = [axes[i] * axes[i + 1]]
                    del sizes[i]
                else:
                    return None
            groups.append(tuple(axes[start:i]))
        if i != len(axes):
            return None
        return Spread(tuple(groups), self.data.reshape(sizes))

    def broadcast(self, shape: Sequence[Size]) -> Spread:
        """As a tensor of `shape`, to which this one can be expanded."""
        axes: list[tuple[Size, ...]] = []
        sizes: list[int] = []
        missing = len(shape) - self.ndim
        for dim, size in enumerate(shape):
            group = self.axes[dim - missing] if dim >= missing else ()
            if group:
                sizes += [self.data.shape[i] for i in self.span(dim - missing)]
            elif not _is(size, 1):
                group = (size,)
                sizes.append(1)
            axes.append(group)
        return Spread(tuple(axes), self.data.reshape(sizes))

    def permute(self, order: Sequence[int]) -> Spread:
        """Dimension i of the result is dimension order[i]."""
        axes = [i for dim in order for i in self.span(dim)]
        return Spread(tuple(self.axes[dim] for dim in order), self.data.permute(axes))

    def resized(self, shape: Sequence[Size], dims: Sequence[int]) -> Spread | None:
        """With these dimensions of another size, as pools and convolutions give them; None if facts vary there."""
        if any(self.varies(dim) for dim in dims):
            return None
        axes, sizes = [], []
        for dim, group in enumerate(self.axes):
            new = group if dim not in dims else () if _is(shape[dim], 1) else (shape[dim],)
            axes.append(new)
            sizes += [1] * len(new) if dim in dims else [self.data.shape[i] for i in self.span(dim)]
        return Spread(tuple(axes), self.data.reshape(sizes))

    def merged(self, dim: int) -> Spread | None:
        """With dimension `dim` as one axis; None if facts vary along it and its size is symbolic."""
        group, span = self.axes[dim], self.span(dim)
        if len(group) == 1:
            return self
        sizes, full = list(self.data.shape), list(self.data.shape)
        size: Size = math.prod(group)
        if self.varies(dim):
            if not isinstance(size, int):
                return None
            full[span.start : span.stop] = [int(s) for s in group]
            sizes[span.start : span.stop] = [size]
        else:
            sizes[span.start : span.stop] = [1]
        axes = (*self.axes[:dim], (size,), *self.axes[dim + 1 :])
        return Spread(axes, self.data.expand(full).reshape(sizes))

    def taken(self, dim: int, indices: range | int, size: Size) -> Spread | None:
        """A slice along `dim`, which leaves `size` of it, or the one index without the dimension."""
        one = self.merged(dim)
        if one is None or _is(size, 0):
            return None
        (axis,) = one.span(dim)
        data = one.data
        if data.shape[axis] != 1:
            index = torch.tensor([indices] if isinstance(indices, int) else list(indices))
            data = data.index_select(axis, index)
        axes = list(one.axes)
        if isinstance(indices, int):
            del axes[dim]
            return Spread(tuple(axes), data.squeeze(axis))
        axes[dim] = () if _is(size, 1) else (size,)
        return Spread(tuple(axes), data.squeeze(axis) if _is(size, 1) else data)


def together(spreads: Sequence[Spread], shape: Sequence[Size]) -> list[Spread] | None:
    """Facts about tensors that are broadcast to `shape`, along the same axes; None where those do not fit."""
    aligned = [_coarse(spread.broadcast(shape)) for spread in spreads]
    axes: list[tuple[Size, ...]] = []
    for dim, size in enumerate(shape):
        group: tuple[Size, ...] | None = () if _is(size, 1) else (size,)
        for spread in aligned:
            if spread.varies(dim) and group is not None:
                group = _refined(group, spread.axes[dim])
        if group is None:
            return None
        axes.append(group)
    flat = list(itertools.chain(*axes))
    views = [spread.view(flat) for spread in aligned]
    fitting = [Spread(tuple(axes), v.data) for v in views if v is not None and v.data.ndim == len(flat)]
    return fitting if len(fitting) == len(spreads) else None


def _coarse(spread: Spread) -> Spread:
    """With dimensions along which facts do not vary made of one axis."""
    for dim, group in enumerate(spread.axes):
        if len(group) > 1 and not spread.varies(dim):
            spread = spread.merged(dim) or spread
    return spread


def _refined(a: tuple[Size, ...], b: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """The coarsest axes of which both are made: (64,) and (4, 16) -> (4, 16)."""
    left, right, common = list(a), list(b), []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if (quotient := _divided(x, y)) is not None:
            common.append(y)
            left[:0] = [] if _is(quotient, 1) else [quotient]
        elif (quotient := _divided(y, x)) is not None:
            common.append(x)
            right[:0] = [quotient]
        else:
            return None
    return None if left or right else tuple(common)


def _is(size: Size, number: int) -> bool:
    return isinstance(size, int) and size == number


def _divided(size: Size, by: Size) -> Size | None:
    """size / by if that is known to be whole, whatever symbolic sizes are."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size and size % by == 0 else None
    if statically_known_true(size == by):
        return 1
    if isinstance(size, int):
        return None
    quotient: Any = size // by
    if not statically_known_true(quotient * by == size):
        return None
    number: int | None = quotient.node.maybe_as_int()  # 4 * n / n
    return quotient if number is None else number
