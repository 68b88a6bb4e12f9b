"""The native attention kernel against softmax(q k^T) v in fp64, over sizes, strides, masks and threads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops
from fanin_compile.ops_attention import append_attend, attend_appended, attend_cache, write_attend

from .helpers import assert_close_fp64
from .strategies import seeds
from .test_kernels_depthwise import poison


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


class Case(NamedTuple):
    query: Tensor
    past_keys: Tensor
    keys: Tensor
    past_values: Tensor
    values: Tensor
    mask: Tensor | None = None
    scale: float | None = None


def check(case: Case) -> Tensor:
    """The kernel's y, after comparing each of its elements with fp64, and the appended rows to the bit."""
    query, *parts, mask, scale = case
    past_keys, keys, past_values, values = parts
    all_keys, all_values = torch.cat([past_keys, keys], -2), torch.cat([past_values, values], -2)
    poison()
    y, appended_keys, appended_values = append_attend(*case)
    assert torch.equal(appended_keys, all_keys)
    assert torch.equal(appended_values, all_values)
    assert appended_keys.is_contiguous()
    assert appended_values.is_contiguous()
    assert y.transpose(1, 2).is_contiguous()
    assert torch.equal(attend_appended(*case), y)

    q, k, v = query.double(), all_keys.double(), all_values.double()
    group = q.shape[1] // max(1, k.shape[1])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    factor = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores, sizes = factor * q @ k.mT, abs(factor) * q.abs() @ k.abs().mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
        sizes = sizes + mask.double().nan_to_num(neginf=0.0).abs()
    weights = scores.softmax(-1).masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    # a score is off by (dim + 2) eps of its terms, by so much a weight relative to itself, and to their sum once more
    most = float(sizes.max()) if sizes.numel() else 0.0
    terms = k.shape[2] + 20 + math.ceil(2 * (q.shape[3] + 3) * most)
    assert_close_fp64(y, weights @ v, weights @ v.abs(), k=terms)
    return y


def tensor(shape: tuple[int, int, int, int], generator: torch.Generator, layout: int) -> Tensor:
    """Of this shape: contiguous; part of something packed, transposed; with gaps; with columns apart, to be copied."""
    b, h, n, d = shape
    if layout == 0:
        return torch.randn(shape, generator=generator)
    if layout == 1:
        part = torch.randn(b, n, 3 * h * d, generator=generator)[..., h * d : 2 * h * d]
        return part.view(b, n, h, d).transpose(1, 2)
    if layout == 2:
        return torch.randn(b, h, n + 2, d + 3, generator=generator)[:, :, 1 : n + 1, 1 : d + 1]
    return torch.randn(b, h, d, n, generator=generator).mT


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any sizes, among them ones around vector widths and tiles; masks of every broadcast, some of which hide all."""
    generator = torch.Generator().manual_seed(draw(seeds()))
    batch, heads = draw(st.sampled_from((1, 2, 0))), draw(st.sampled_from((1, 3)))
    group, queries = draw(st.sampled_from((1, 1, 2, 7))), draw(st.sampled_from((1, 1, 1, 4)))
    past, new = draw(st.sampled_from((0, 1, 7, 16, 63, 100))), draw(st.sampled_from((1, 1, 1, 2, 21)))
    dim, width = draw(st.sampled_from((1, 7, 16, 63, 64, 100))), draw(st.sampled_from((0, 0, 1, 7, 64)))
    width = width or dim

    def rows(heads: int, length: int, dim: int) -> Tensor:
        return tensor((batch, heads, length, dim), generator, draw(st.sampled_from((0, 1, 2, 3))))

    mask = None
    if kind := draw(st.sampled_from(("", "bool", "float", "hides all"))):
        full = (batch, group * heads, queries, past + new)
        shape = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 3)) :]
        mask = torch.rand(shape, generator=generator) < (0.0 if kind == "hides all" else 0.7)
        if kind == "float":
            mask = (4 * torch.randn(shape, generator=generator)).masked_fill(~mask, -math.inf)
        if mask.ndim > 1 and draw(st.booleans()):
            mask = mask.mT.contiguous().mT
    first = past if draw(st.booleans()) else draw(st.integers(0, past + new))
    values = rows(heads, first, width), rows(heads, past + new - first, width)
    keys = rows(heads, past, dim), rows(heads, new, dim)
    scale = draw(st.sampled_from((None, 0.3, -1.0)))
    return Case(rows(group * heads, queries, dim), *keys, *values, mask, scale)


@settings(deadline=None, max_examples=300)
@given(case=cases())
def test_any_case(case: Case) -> None:
    check(case)


def simple(*shape: int, new: int = 1, group: int = 1, seed: int = 0) -> Case:
    """Of shape [batch, heads, past, dim], one query."""
    b, h, past, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((b, group * h, 1, dim), *((b, h, n, dim) for n in (past, new) * 2))
    query, *rest = (torch.randn(size, generator=generator) for size in sizes)
    return Case(query, rest[0], rest[1], rest[2], rest[3])


@pytest.mark.parametrize("dim", [1, 5, 8, 13, 64, 96])
def test_every_length(dim: int) -> None:
    for past in range(40):
        check(simple(1, 2, past, dim))


def test_scores_far_apart_and_beyond_exps_range() -> None:
    for factor in (30.0, 1e4, 1e18):
        case = simple(1, 2, 37, 16)
        query = factor * case.query
        y = attend_appended(query, *case[1:])
        k, v = torch.cat(case[1:3], -2).double(), torch.cat(case[3:5], -2).double()
        scores = query.double() @ k.mT / 4
        assert y.isfinite().all()
        if factor > 1e3:  # one key has all the weight
            best = scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 16)
            assert torch.equal(y, v.gather(2, best).float())
        else:
            assert_close_fp64(
                y, scores.softmax(-1) @ v, scores.softmax(-1) @ v.abs(), k=math.ceil(scores.abs().max() * 40)
            )


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_that_may_see_nothing_gets_what_torch_gives_it(kind: str) -> None:
    case = simple(2, 3, 20, 16)
    mask = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    mask[1] = False
    given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill_(~mask, -math.inf)
    y = attend_appended(*case[:5], given)
    expected = F.scaled_dot_product_attention(
        case.query, torch.cat(case[1:3], -2), torch.cat(case[3:5], -2), attn_mask=given
    )
    assert torch.equal(y[1], expected[1])
    assert y[1].count_nonzero() == 0
    assert y[0].isfinite().all()


def test_what_is_hidden_does_not_count() -> None:
    case = simple(1, 2, 40, 16)
    mask = torch.arange(41) % 3 != 0
    y = check(case._replace(mask=mask))
    seen = mask[:40]
    cut = [rows[:, :, seen] for rows in (case.past_keys, case.past_values)]
    fewer = attend_appended(case.query, cut[0], case.keys, cut[1], case.values)
    torch.testing.assert_close(y, fewer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4])
def test_a_nan_reaches_the_head_that_reads_it_and_no_other(where: int) -> None:
    """Of any bits: those of a NaN may not become a number on the way."""
    for bits in (0x7FC00000, -0x400000, 0x7F800001, 0x7FC001FF):
        case = simple(2, 2, 19, 16, new=2)
        case[where][1, 0, -1, 3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)  # type: ignore[index]
        y, all_keys, all_values = append_attend(*case)
        expected = torch.ones(2, 2, 1, 16, dtype=torch.bool)
        expected[1, 0] = False
        if where >= 3:  # one column of the values
            expected[1, 0, :, [i for i in range(16) if i != 3]] = True
        assert torch.equal(y.isfinite(), expected)
        assert int(all_keys.isnan().sum()) == (where in (1, 2))
        assert int(all_values.isnan().sum()) == (where in (3, 4))


def test_a_group_of_queries_sees_what_each_alone_does() -> None:
    case = simple(2, 3, 50, 24, group=4)
    y = check(case)
    pk, k, pv, v = (rows.repeat_interleave(4, 1) for rows in case[1:5])
    assert torch.equal(y, attend_appended(case.query, pk, k, pv, v))


@pytest.mark.parametrize("shape", [(1, 12, 127, 64), (3, 5, 300, 40)])
def test_the_same_bits_for_any_thread_count_and_batch(shape: tuple[int, ...]) -> None:
    case, before = simple(*shape), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(check(case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    q, pk, k, pv, v = (rows[:1] for rows in case[:5])
    assert torch.equal(results[0][:1], attend_appended(q, pk, k, pv, v))


@pytest.mark.parametrize("seen", [(0, 100), (0, 17), (16, 48), (21, 22), (3, 99), (99, 100), (0, 0)])
@pytest.mark.parametrize("masks", ["one", "of each image", "of each query"])
def test_a_cache_is_read_where_a_query_may_see_it(seen: tuple[int, int], masks: str) -> None:
    case = simple(2, 3, 99, 24, group=2)
    query = torch.randn(2, 6, 3, 24, generator=torch.Generator().manual_seed(1))
    keys, values = torch.cat(case[1:3], -2), torch.cat(case[3:5], -2)
    shape = {"one": (1, 1, 1, 100), "of each image": (2, 1, 1, 100), "of each query": (2, 6, 3, 100)}[masks]
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[..., seen[0] : seen[1]] = True
    if masks != "one":
        mask[1, ..., seen[0] : seen[0] + 1] = False
    if masks == "of each query":
        mask[0, 1] = False  # of that head only
    poison()
    y = attend_cache(query, keys, values, mask, 0.4)
    assert y.transpose(1, 2).is_contiguous()
    none = keys[:, :, :0], values[:, :, :0]
    check(Case(query, keys, none[0], values, none[1], mask, 0.4))
    assert torch.equal(y, append_attend(query, keys, none[0], values, none[1], mask, 0.4)[0])  # the same sums
    before, behind = seen[0] - seen[0] % 16, seen[1]
    for rows in (keys, values):
        rows[:, :, :before] = rows[:, :, behind:] = torch.nan
    assert torch.equal(attend_cache(query, keys, values, mask, 0.4), y)


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_a_cache_without_rows_or_images(shape: tuple[int, int]) -> None:
    batch, length = shape
    keys = torch.randn(batch, 2, length, 8)
    y = attend_cache(torch.randn(batch, 2, 1, 8), keys, keys, torch.ones(1, 1, 1, length, dtype=torch.bool))
    assert y.shape == (batch, 2, 1, 8)
    assert y.count_nonzero() == 0


@settings(deadline=None, max_examples=100)
@given(case=cases(), data=st.data())
def test_new_rows_are_written_where_they_belong_and_attended_to(case: Case, data: st.DataObject) -> None:
    query, past_keys, keys, past_values, values, mask, scale = case
    if past_keys.shape[2] != past_values.shape[2]:
        return
    old_keys, old_values = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
    places = st.lists(st.integers(0, old_keys.shape[2] - 1), min_size=keys.shape[2], max_size=keys.shape[2])
    position = torch.tensor(data.draw(places))
    if data.draw(st.booleans()):  # a view of a larger cache
        old_keys, old_values = (
            torch.cat([old, old], 3)[..., : old.shape[3]] for old in (old_keys, old_values)
        )
    expected = [old.clone() for old in (old_keys, old_values)]
    for row, at in enumerate(position.tolist()):  # one after the other: of one named twice, the last counts
        expected[0][:, :, at], expected[1][:, :, at] = keys[:, :, row], values[:, :, row]
    versions = old_keys._version, old_values._version
    poison()
    y = write_attend(query, old_keys, old_values, keys, values, position, mask, scale)
    assert torch.equal(old_keys, expected[0])
    assert torch.equal(old_values, expected[1])
    assert (old_keys._version, old_values._version) == (versions[0] + 1, versions[1] + 1)
    assert torch.equal(y, attend_cache(query, expected[0], expected[1], mask, scale))


def test_a_cache_that_cannot_be_written_so_is_refused_or_left_to_torch() -> None:
    case = simple(2, 3, 10, 8)
    query, keys, new_keys, values, new_values, *_ = case
    at = torch.tensor([4])
    columns_apart = keys.mT.contiguous().mT
    y = write_attend(query, columns_apart, values.clone(), new_keys, new_values, at)
    assert torch.equal(columns_apart[:, :, 4], new_keys[:, :, 0])
    torch.testing.assert_close(y, write_attend(query, keys, values, new_keys, new_values, at))
    before = keys.clone()
    wrong: dict[str, tuple[type[Exception], Any]] = {
        "position 10 is not in a cache of length 10": (
            IndexError,
            (keys, values, new_keys, new_values, at + 6),
        ),
        "position -1 is not": (IndexError, (keys, values, new_keys, new_values, at - 5)),
        "position must be int64 of one dimension, got Int": (
            ValueError,
            (keys, values, new_keys, new_values, at.int()),
        ),
        r"there are 2 positions for new rows \[2, 3, 1, 8\]": (
            ValueError,
            (keys, values, new_keys, new_values, torch.tensor([1, 2])),
        ),
        "new keys must differ in length alone": (ValueError, (keys, values, new_keys[:1], new_values, at)),
        "more than one element of the written-to tensor refers to a single memory location": (
            RuntimeError,
            (keys[:1].expand(2, 3, 10, 8), values, new_keys, new_values, at),
        ),
    }
    for message, (kind, arguments) in wrong.items():
        with pytest.raises(kind, match=message):
            write_attend(query, *arguments)
    assert torch.equal(keys, before.index_copy(2, at, new_keys))


def test_what_does_not_fit_is_refused_by_name() -> None:
    case = simple(2, 3, 10, 8)
    query, past_keys, keys, past_values, values, *_ = case
    wrong: dict[str, Case] = {
        r"must be \[batch, heads, length, dim\], got": case._replace(keys=keys[0]),
        "past and new keys must differ in length alone": case._replace(past_keys=past_keys[..., :7]),
        "past and new values must differ in length alone": case._replace(values=values[:1]),
        "there are 11 keys and 10 values": case._replace(past_values=past_values[:, :, :9]),
        "must have the same batch and heads": case._replace(
            past_values=past_values[:, :1], values=values[:, :1]
        ),
        "must have the batch and the dim of keys": case._replace(query=query[..., :7]),
        "the 4 heads of the query must be a multiple of the keys' 3": case._replace(
            query=torch.randn(2, 4, 1, 8)
        ),
        r"the mask's shape \[2, 3, 1, 10\] does not broadcast": case._replace(mask=torch.randn(2, 3, 1, 10)),
        r"the mask's shape \[1, 2, 3, 1, 11\]": case._replace(mask=torch.randn(1, 2, 3, 1, 11)),
    }
    for message, arguments in wrong.items():
        for op in (attend_appended, append_attend):
            with pytest.raises(ValueError, match=message):
                op(*arguments)
    with pytest.raises(ValueError, match=r"must be \[batch, heads, length, dim\], got \[3, 1, 8\]"):
        attend_cache(query, keys[0], values)
    with pytest.raises(ValueError, match="there are 1 keys and 10 values"):
        attend_cache(query, keys, past_values)
