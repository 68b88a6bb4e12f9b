"""pack(): the order of the kernels by eye, exact round trips, sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError, OptionError
from fanin_compile.packed import Header, Packed, decode, unpack
from fanin_compile.packing import default_width, pack
from tests.compile_support import sparse_weight
from tests.strategies import Masked, masked_weights

WIDTHS = (None, 1, 7, 127, 255, 256, 1023, 65535)
BLOCK_ROWS = (1, 5, 96, 384)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def packings() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "width": st.sampled_from(WIDTHS),
            "block_rows": st.sampled_from(BLOCK_ROWS),
            "tile": st.integers(1, 3),
        }
    )


def columns_of(packed: Packed) -> Tensor:
    header = Header.read(packed.structure)
    columns = packed.structure[header.columns_at :].view(
        torch.uint8 if header.column_bytes == 1 else torch.uint16
    )
    return columns[: header.entries].to(torch.int64)


def assert_same_weight(got: CondensedWeight, want: CondensedWeight) -> None:
    """Equal part by part, values in every bit: -0.0 is not 0.0, and NaN is NaN."""
    assert (got.shape, got.values.dtype) == (want.shape, want.values.dtype)
    bits = BITS[want.values.itemsize]
    assert torch.equal(got.values.view(bits), want.values.view(bits))
    for part in ("indices", "row_ptr", "rows"):
        a, b = getattr(got, part), getattr(want, part)
        if b is None:
            assert a is None, part
        else:
            assert (a.dtype, a.tolist()) == (b.dtype, b.tolist()), part


def test_by_eye() -> None:
    weight = torch.tensor([[1.0, 2, 0, 0],
                           [0.0, 0, 3, 0],
                           [4.0, 0, 5, 6]])  # fmt: skip
    packed = pack(CondensedWeight.from_dense(weight), width=2)
    header = Header.read(packed.structure)
    assert (header.out, header.in_, header.nnz, header.width, header.column_bytes) == (3, 4, 6, 2, 1)
    assert (header.blocks, header.chunks, header.entries, header.tile) == (1, 2, 16, 3)
    segments = packed.structure[header.segments_at :][: 3 * 8].view(torch.int32)
    assert segments.tolist() == [0, 0, 1, 8, 2, 16]  # group and entry where each begins
    groups = packed.structure[header.groups_at :][: 2 * 10].view(torch.uint16)
    # rows by count, row 3 for want of a fourth; one pair of steps each
    assert groups.view(2, 5).tolist() == [[1, 2, 0, 3, 1], [0, 1, 2, 3, 1]]
    assert packed.values[:16].view(4, 4).tolist() == [[0, 4, 1, 0], [0, 0, 2, 0], [0, 3, 5, 0], [0, 0, 6, 0]]
    # column 2 of a chunk of two is the zero behind it
    assert columns_of(packed).view(4, 4).tolist() == [[2, 0, 0, 2], [2, 2, 1, 2], [2, 0, 0, 2], [2, 2, 1, 2]]
    assert len(packed.values) == 64
    assert not packed.values[16:].any()


@settings(deadline=None, max_examples=150)
@given(masked_weights(kernels=((),), dtypes=DTYPES), packings())
def test_unpacking_is_exact(masked: Masked, options: dict[str, Any]) -> None:
    weight = CondensedWeight.from_dense(masked.weight, masked.mask)
    packed = pack(weight, **options)
    assert_same_weight(unpack(packed), weight)
    header = Header.read(packed.structure)
    assert header.tile == options["tile"]
    assert header.width == (options["width"] or default_width(weight.n_active, weight.shape[1], weight.nnz))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0), (4, 5), (1000, 3)])
def test_weights_without_a_single_active_entry(shape: tuple[int, int], width: int | None) -> None:
    weight = CondensedWeight.from_dense(torch.zeros(shape))
    packed = pack(weight, width=width)
    assert (Header.read(packed.structure).entries, packed.values.shape) == (0, (0,))
    assert_same_weight(unpack(packed), weight)


@pytest.mark.parametrize("shape", [(3, 70000), (70000, 3), (1500, 300)])
@pytest.mark.parametrize("width", [None, 65535])
def test_numbers_beyond_16_bits(shape: tuple[int, int], width: int | None) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    weight = CondensedWeight.from_dense(torch.rand(shape) + 1, mask)
    for block_rows in (384, 32768):
        assert_same_weight(unpack(pack(weight, width=width, block_rows=block_rows)), weight)


@settings(deadline=None, max_examples=60)
@given(masked_weights(kernels=((),)), packings())
def test_a_row_is_summed_in_the_order_of_its_columns(masked: Masked, options: dict[str, Any]) -> None:
    """So that its sum has the same bits however the weight is cut into blocks and chunks."""
    _, index, entry = decode(
        pack(CondensedWeight.from_dense(masked.weight, masked.mask), **options).structure
    )
    same_row = (index // masked.mask.shape[1]).diff() == 0
    assert bool((index.diff() > 0).all())
    assert bool((entry.diff()[same_row] > 0).all())


@settings(deadline=None, max_examples=60)
@given(masked_weights(kernels=((),)), packings())
def test_what_fills_up_groups_is_zero_and_reads_zero(masked: Masked, options: dict[str, Any]) -> None:
    packed = pack(CondensedWeight.from_dense(masked.weight.nan_to_num(1.0) + 3, masked.mask), **options)
    header, _, entry = decode(packed.structure)
    filler = torch.ones(len(packed.values), dtype=torch.bool)
    filler[entry] = False
    assert not packed.values[filler].any()
    assert bool((columns_of(packed)[filler[: header.entries]] == header.width).all())
    assert header.entries % 8 == 0
    # a chunk's longest run decides, rounded up to a pair, in every group of four
    assert header.entries <= 8 * (header.nnz + header.out * header.chunks)


@pytest.mark.parametrize("shape", [(768, 3072), (3072, 768)])
@pytest.mark.parametrize("ragged", [False, True])
def test_bytes_at_90_percent(shape: tuple[int, int], ragged: bool) -> None:
    out, fan_in = shape
    dense = sparse_weight(out, fan_in, round(0.1 * fan_in))
    if ragged:
        scores = torch.rand(shape, generator=torch.Generator().manual_seed(0))
        dense = torch.ones(shape) * (scores < 0.1)
    weight = CondensedWeight.from_dense(dense)
    packed = pack(weight)
    assert packed.nbytes <= 0.134 * dense.nbytes
    assert packed.nbytes < weight.nbytes
    assert Header.read(packed.structure).column_bytes == 1


def test_most_changes_of_a_mask_leave_sizes_alone() -> None:
    """So that a graph that holds the tensors can take new contents in place."""
    sizes: Counter[tuple[torch.Size, torch.Size]] = Counter()
    for seed in range(40):
        packed = pack(CondensedWeight.from_dense(sparse_weight(384, 768, 77, seed=seed)))
        sizes[packed.values.shape, packed.structure.shape] += 1
    assert sizes.most_common(1)[0][1] >= 36, sizes


@pytest.mark.parametrize(
    ("shape", "k", "width"),
    [
        ((768, 3072), 307, 255),  # 25 of a row in a chunk
        ((768, 3072), 78, 255),  # 6
        ((768, 3072), 77, 1023),
        ((768, 3072), 6, 4095),
        ((100, 60000), 3, 65535),
        ((100, 200000), 3, 65535),
        ((768, 200), 1, 255),  # one chunk holds all columns
    ],
)
def test_chunks_widen_where_rows_have_little_in_them(shape: tuple[int, int], k: int, width: int) -> None:
    out, in_features = shape
    assert default_width(out, in_features, out * k) == width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0, expected 1 to 65535"),
        ({"width": 65536}, "width is 65536, expected 1 to 65535"),
        ({"block_rows": 0}, "block_rows is 0, expected 1 to 32768"),
        ({"block_rows": 40000}, "block_rows is 40000, expected 1 to 32768"),
        ({"tile": 4}, "tile is 4, expected 1 to 3"),
    ],
)
def test_refuses_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        pack(CondensedWeight.from_dense(torch.eye(3)), **options)


def test_refuses_convolutions() -> None:
    with pytest.raises(FormatError, match=r"weight has shape \(2, 3, 1\), expected \[out, in\]"):
        pack(CondensedWeight.from_dense(torch.ones(2, 3, 1)))
