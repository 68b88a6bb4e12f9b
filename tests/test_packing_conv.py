"""pack_conv(): the order of the kernel by eye, exact round trips, sizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin_compile import packing_conv
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError, OptionError
from fanin_compile.packed import Packed
from fanin_compile.packed_conv import ConvHeader, decode_conv, unpack_conv
from fanin_compile.packing_conv import pack_conv
from tests.strategies import masks, seeds

KERNELS = ((1,), (3,), (17,), (1, 1), (3, 3), (1, 5), (2, 1, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def geometry(dims: int, *, stride: int = 1, padding: int = 0, groups: int = 1) -> dict[str, Any]:
    return {"stride": [stride] * dims, "padding": [padding] * dims, "dilation": [1] * dims, "groups": groups}


def assert_same_weight(a: CondensedWeight, b: CondensedWeight) -> None:
    """Bit for bit, NaN and -0.0 too."""
    assert a.shape == b.shape
    for part in ("values", "indices", "row_ptr", "rows"):
        mine, other = getattr(a, part), getattr(b, part)
        assert (mine is None) == (other is None), part
        if mine is not None:
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), part
            assert torch.equal(mine.flatten().view(torch.uint8), other.flatten().view(torch.uint8)), part


@st.composite
def weights(draw: st.DrawFn) -> tuple[CondensedWeight, int]:
    """A condensed weight and its groups."""
    kernel, groups = draw(st.sampled_from(KERNELS)), draw(st.sampled_from((1, 1, 2, 7)))
    out = groups * draw(st.sampled_from((1, 2, 9, 40)))
    shape = (out, draw(st.sampled_from((1, 2, 7, 63, 300))), *kernel)
    mask = draw(masks(shape, draw(st.sampled_from(("constant", "ragged")))))
    generator = torch.Generator().manual_seed(draw(seeds()))
    weight = torch.randn(shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
    weight[torch.rand(shape, generator=generator) < 0.1] = -0.0
    return CondensedWeight.from_dense(weight, mask), groups


@settings(deadline=None, max_examples=150)
@given(weights(), st.integers(1, 3), st.sampled_from((0, 2)), st.sampled_from((1, 5, 256, 65535)))
def test_unpacking_is_exact(
    weight_groups: tuple[CondensedWeight, int], stride: int, padding: int, block_rows: int
) -> None:
    weight, groups = weight_groups
    dims = len(weight.shape) - 2
    packed = pack_conv(
        weight, **geometry(dims, stride=stride, padding=padding, groups=groups), block_rows=block_rows
    )
    assert_same_weight(unpack_conv(packed, weight.shape[2:]), weight)
    header, index, entry = decode_conv(packed.structure)
    assert torch.equal(index, weight.dense_index())
    filler = torch.ones(len(packed.values), dtype=torch.bool)
    filler[entry] = False
    assert not packed.values[filler].any()
    assert header.together == 1 or (padding == 0 and set(weight.shape[2:]) == {1})


def part(packed: Packed, at: int, count: int, dtype: torch.dtype) -> list[int]:
    end = at + count * dtype.itemsize
    numbers: list[int] = packed.structure[at:end].view(dtype).tolist()
    return numbers


def test_by_eye() -> None:
    """Two chunks of one channel: row 0 in both, row 1 ablated, rows 2 and 3 in one each."""
    weight = torch.zeros(4, 2, 30000)
    weight[0, 0, 5], weight[0, 1, 0], weight[0, 1, 7], weight[2, 1, 1], weight[3, 0, 2] = 1, 2, 3, 4, 5
    packed = pack_conv(CondensedWeight.from_dense(weight), **geometry(1))
    h = ConvHeader.read(packed.structure)
    assert (h.out, h.group_channels, h.groups, h.taps, h.nnz, h.chunk) == (4, 2, 1, 30000, 5, 1)
    assert (h.together, h.blocks, h.live, h.entries, h.visits, h.longest) == (1, 1, 3, 5, 4, 3)
    assert part(packed, h.rows_at, 4, torch.int32) == [0, 2, 3, 1]
    # first entry; first visits of whole rows, first, middle and last runs
    assert part(packed, h.stages_at, 15, torch.int32) == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 5, 4, 4, 4, 4]
    assert part(packed, h.counts_at, 4, torch.uint16) == [1, 1, 1, 2]
    assert part(packed, h.order_at, 4, torch.uint16) == [2, 0, 1, 0]
    assert part(packed, h.codes_at, 5, torch.uint16) == [2, 5, 1, 0, 7]
    assert packed.values[:5].tolist() == [5, 1, 4, 2, 3]


def test_rows_side_by_side_by_eye() -> None:
    """Rows of 11, 12 and 13: they share one visit, a missing fourth repeats the first, fillers read channel 16."""
    weight = torch.zeros(3, 16, 1)
    for row, k in enumerate((13, 11, 12)):
        weight[row, :k] = row + 1
    packed = pack_conv(CondensedWeight.from_dense(weight), **geometry(1))
    h = ConvHeader.read(packed.structure)
    assert (h.together, h.chunk, h.visits, h.entries) == (4, 16, 1, 52)
    assert part(packed, h.counts_at, 1, torch.uint16) == [13]
    assert part(packed, h.order_at, 4, torch.uint16) == [1, 1, 2, 0]
    codes = torch.tensor(part(packed, h.codes_at, 52, torch.uint16)).view(13, 4)
    assert (codes[:, 0] == 12 * 16).all()
    assert codes[:, 1].tolist() == [12 * c for c in range(11)] + [12 * 16] * 2
    assert codes[:, 3].tolist() == [12 * c for c in range(13)]
    assert packed.values[:52].view(13, 4)[12].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", [(0, 0, 3), (0, 5, 1), (4, 0, 1), (4, 5, 3), (1000, 3, 1)])
def test_weights_without_a_single_active_entry(shape: tuple[int, ...]) -> None:
    weight = CondensedWeight.from_dense(torch.zeros(shape))
    packed = pack_conv(weight, **geometry(1))
    assert (ConvHeader.read(packed.structure).entries, packed.values.shape) == (0, (0,))
    assert_same_weight(unpack_conv(packed, shape[2:]), weight)


def fan_in_weight(shape: tuple[int, ...], k: int, seed: int = 0) -> CondensedWeight:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(shape, generator=generator).flatten(1)
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True).view(shape)
    return CondensedWeight.from_dense(torch.randn(shape, generator=generator), mask)


@pytest.mark.parametrize(
    ("shape", "stride", "most"),
    [
        ((256, 256, 3, 3), 1, 0.165),
        ((512, 512, 3, 3), 2, 0.165),
        ((512, 2048, 1, 1), 1, 0.165),
        ((256, 64, 1, 1), 1, 0.185),
    ],
)
def test_bytes_at_90_percent(shape: tuple[int, ...], stride: int, most: float) -> None:
    weight = fan_in_weight(shape, round(0.1 * shape[1] * shape[2] * shape[3]))
    packed = pack_conv(weight, **geometry(2, stride=stride, padding=shape[2] // 2))
    assert packed.nbytes <= most * weight.dense_nbytes


@pytest.mark.parametrize("shape", [(128, 128, 3, 3), (256, 512, 1, 1), (64, 64, 1, 1)])
def test_most_changes_of_a_mask_leave_sizes_alone(shape: tuple[int, ...]) -> None:
    """So that a graph that holds the tensors can take new contents in place."""
    sizes: Counter[tuple[torch.Size, torch.Size]] = Counter()
    for seed in range(30):
        weight = fan_in_weight(shape, shape[1] * shape[2] * shape[3] // 10, seed)
        packed = pack_conv(weight, **geometry(2, padding=shape[2] // 2))
        sizes[packed.values.shape, packed.structure.shape] += 1
    assert sizes.most_common(1)[0][1] >= 27, sizes


def test_refuses_what_has_no_packed_form() -> None:
    ones = CondensedWeight.from_dense(torch.ones(4, 2, 3))
    with pytest.raises(FormatError, match=r"shape \(4, 2\), expected \[out, in/groups, \*kernel\]"):
        pack_conv(CondensedWeight.from_dense(torch.ones(4, 2)), **geometry(0))
    with pytest.raises(FormatError, match="groups is 3, expected a divisor of the 4 output channels"):
        pack_conv(ones, **geometry(1, groups=3))
    with pytest.raises(FormatError, match=r"kernel is \(32769,\), expected 1 to 32768 taps"):
        pack_conv(CondensedWeight.from_dense(torch.ones(1, 1, 32769)), **geometry(1))
    with pytest.raises(OptionError, match="block_rows is 0, expected 1 to 65535"):
        pack_conv(ones, **geometry(1), block_rows=0)


def test_unpacking_wants_the_taps_that_were_packed() -> None:
    packed = pack_conv(CondensedWeight.from_dense(torch.ones(4, 2, 3, 2)), **geometry(2))
    assert unpack_conv(packed, (2, 3)).shape == (4, 2, 2, 3)
    with pytest.raises(FormatError, match=r"kernel is \(3, 3\), expected 6 taps"):
        unpack_conv(packed, (3, 3))


def test_strided_layers_read_more_channels_at_a_time_where_l1_is_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """75 vectors of 32 bytes are what a tile of a 3x3 layer of stride 2 reads of a channel; chunks come out even."""
    weight = CondensedWeight.from_dense(torch.ones(4, 128, 3, 3), torch.ones(4, 128, 3, 3, dtype=torch.bool))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for l1, chunk in ((32 << 10, 16), (48 << 10, 22)):
        monkeypatch.setattr(packing_conv, "_l1_bytes", lambda l1=l1: l1)
        packed = pack_conv(weight, **geometry(2, stride=2, padding=1))
        assert ConvHeader.read(packed.structure).chunk == chunk
        assert_same_weight(unpack_conv(packed, weight.shape[2:]), weight)
