"""Facts stored along few axes are moved as the elements of a tensor are."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fanin_compile.axes import Size, Spread, together
from fanin_compile.errors import FormatError

SHAPES: st.SearchStrategy[list[int]] = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


def whole(spread: Spread) -> Tensor:
    """A fact for each element."""
    sizes = [int(size) for group in spread.axes for size in group]
    return spread.data.expand(sizes).reshape([int(size) for size in spread.shape])


@st.composite
def spreads(draw: st.DrawFn, shapes: st.SearchStrategy[list[int]] = SHAPES) -> Spread:
    """Facts that vary along some of the dimensions."""
    shape = draw(shapes)
    facts = [size if draw(st.booleans()) else 1 for size in shape]
    data = torch.arange(math.prod(facts)).reshape(facts)
    axes = tuple(() if size == 1 else (size,) for size in shape)
    return Spread(axes, data.reshape([n for n, size in zip(facts, shape, strict=True) if size != 1]))


@st.composite
def other_shapes(draw: st.DrawFn, size: int) -> list[int]:
    """Of as many elements."""
    shape: list[int] = []
    while size > 1 and len(shape) < 4:
        shape.append(draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0])))
        size //= shape[-1]
    return [*shape, size]


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_chain_of_moves(data: st.DataObject) -> None:
    spread = data.draw(spreads())
    expected = whole(spread)
    for _ in range(4):
        move = data.draw(st.sampled_from(("view", "permute", "take", "broadcast", "merge")))
        dim = data.draw(st.integers(0, expected.ndim - 1)) if expected.ndim else None
        if move == "view":
            shape = data.draw(other_shapes(expected.numel()))
            viewed = spread.view(shape)
            if viewed is None:
                continue  # an axis would be cut across
            spread, expected = viewed, expected.reshape(shape)
        elif move == "permute":
            order = data.draw(st.permutations(range(expected.ndim)))
            spread, expected = spread.permute(order), expected.permute(order)
        elif move == "broadcast":
            shape = [*([2] if expected.ndim < 4 else []), *(3 if s == 1 else s for s in expected.shape)]
            spread, expected = spread.broadcast(shape), expected.expand(shape)
        elif dim is not None and move == "merge":
            merged = spread.merged(dim)
            assert merged is not None
            assert len(merged.axes[dim]) == 1
            assert torch.equal(whole(merged), expected)
        elif dim is not None:
            size = expected.shape[dim]
            start = data.draw(st.integers(0, size - 1))
            indices = range(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 2)))
            taken = spread.taken(dim, indices, len(indices))
            assert taken is not None
            spread, expected = taken, expected.index_select(dim, torch.tensor(list(indices)))
        assert torch.equal(whole(spread), expected)
        facts = spread.by_dim()
        assert facts is not None
        assert torch.equal(facts.expand(expected.shape), expected)


@settings(deadline=None, max_examples=100)
@given(
    spreads(st.just([4, 6])), spreads(st.just([2, 2, 6])), spreads(st.just([4, 2, 3])), spreads(st.just([6]))
)
def test_facts_brought_together_share_axes(a: Spread, b: Spread, c: Spread, d: Spread) -> None:
    views = [a, b.view((4, 6)), c.view((4, 6)), d]
    given = [view for view in views if view is not None]
    assert len(given) == 4
    aligned = together(given, (4, 6))
    assert aligned is not None, "all are made of 2, 2, 2 and 3"
    assert len({spread.axes for spread in aligned}) == 1
    for spread, before in zip(aligned, given, strict=True):
        assert torch.equal(whole(spread), whole(before).expand(4, 6))


def test_what_cannot_share_axes_is_refused() -> None:
    a = Spread.of(torch.arange(6).reshape(2, 3)).view((6,))
    b = Spread.of(torch.arange(6).reshape(3, 2)).view((6,))
    assert a is not None
    assert b is not None
    assert together([a, b], (6,)) is None
    assert a.view((3, 2)) is None


def _sizes(count: int) -> list[Size]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * count)
    return list(mode.from_tensor(torch.empty(*range(5, 5 + count)), symbolic_context=dynamic).shape)


def test_heads_are_found_again_after_they_were_merged_with_a_symbolic_batch() -> None:
    batch, length = _sizes(2)
    spread: Spread | None = Spread.along((length, batch, 64), 2, torch.arange(64))
    for shape in ((length, batch * 4, 16), (length, batch, 4, 16), (length * batch, 64), (length, batch, 64)):
        assert spread is not None
        spread = spread.view(shape)
    assert spread is not None
    alone = spread.alone(2)
    assert alone is not None
    assert torch.equal(alone, torch.arange(64))
    assert not any(isinstance(size, torch.SymInt) for size in spread.axes[2])


def test_sizes_are_never_guessed() -> None:
    batch, length = _sizes(2)
    spread = Spread.along((batch, 6), 1, torch.arange(6))
    assert spread.view((length, 6)) is None  # whether they are equal is not known
    merged = spread.view((batch * 6,))
    assert merged is not None
    assert merged.by_dim() is None
    assert merged.alone(0) is None
    assert merged.merged(0) is None
    assert merged.view((batch * 2, 3)) is not None
    assert merged.view((2, batch * 3)) is None  # which elements are in which half depends on the batch


def test_facts_that_do_not_fit_their_axes_are_refused() -> None:
    with pytest.raises(FormatError, match=r"facts have shape \(3,\), expected 1 or all of axes \[4\]"):
        Spread(((4,),), torch.arange(3))
