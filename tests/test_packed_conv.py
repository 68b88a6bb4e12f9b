"""A convolution's structure that is not what pack_conv() wrote: refused with its reason, or harmless."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError
from fanin_compile.kernels import build
from fanin_compile.ops_conv import gather_conv, reference_gather_conv
from fanin_compile.packed import Packed
from fanin_compile.packed_conv import ConvHeader, decode_conv, unpack_conv
from fanin_compile.packing_conv import pack_conv
from tests.helpers import assert_close_at_scale

FIELDS = [field.name for field in dataclasses.fields(ConvHeader)]
ONES, NONE = [1, 1], [0, 0]


def packed(kernel: int, channels: int) -> Packed:
    generator = torch.Generator().manual_seed(0)
    shape = (23, channels, kernel, kernel)
    mask = torch.rand(shape, generator=generator) < 0.2
    mask[3:5] = False
    weight = CondensedWeight.from_dense(torch.randn(shape, generator=generator), mask)
    pads = [kernel // 2] * 2
    return pack_conv(weight, stride=ONES, padding=pads, dilation=ONES, groups=1, block_rows=6)


SPATIAL, SIDE_BY_SIDE = packed(3, 50), packed(1, 301)
WEIGHTS = {"spatial": SPATIAL, "side by side": SIDE_BY_SIDE}


def with_field(structure: Tensor, name: str, value: int) -> Tensor:
    structure = structure.clone()
    structure[: 8 * len(FIELDS)].view(torch.int64)[FIELDS.index(name)] = value
    return structure


STRUCTURES = {
    "another version": (with_field(SPATIAL.structure, "version", 1), "is of version 0x1, expected 0x"),
    "cut off": (SPATIAL.structure[:-64], "has .* bytes, expected .*: it was cut off"),
    "cut off in the header": (SPATIAL.structure[:100], "at least 160 bytes"),
    "longer": (torch.cat([SPATIAL.structure] * 2), "has .* bytes, expected .*: it was cut off"),
    "another dtype": (SPATIAL.structure.view(torch.int8), "structure is torch.int8"),
}


@pytest.mark.parametrize("which", STRUCTURES)
def test_refuses_what_is_no_structure(which: str) -> None:
    structure, message = STRUCTURES[which]
    for read in (ConvHeader.read, decode_conv, lambda s: unpack_conv(Packed(SPATIAL.values, s), (3, 3))):
        with pytest.raises(FormatError, match=message):
            read(structure)
    for op in (gather_conv, reference_gather_conv):
        with pytest.raises(ValueError, match="structure"):
            op(torch.randn(1, 50, 7, 7), SPATIAL.values, structure, None, (23, 50, 3, 3), ONES, ONES, ONES, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("out", -1), ("out", 22), ("group_channels", 20), ("groups", 0), ("groups", 2), ("taps", 0), ("taps", 8)),
        *(("nnz", 3), ("chunk", 0), ("chunk", 3), ("chunk", 2**40), ("together", 2), ("together", 4)),
        *(("blocks", 0), ("blocks", 2**40), ("live", 24), ("live", 20), ("entries", 8), ("entries", 2**40)),
        *(("visits", 3), ("visits", 2**40), ("longest", 1), ("longest", 2**40)),
        *(("rows_at", 0), ("stages_at", 161), ("codes_at", 2**62)),
    ],
)  # fmt: skip
def test_refuses_headers_that_contradict_the_rest(name: str, value: int) -> None:
    with pytest.raises(FormatError):
        unpack_conv(Packed(SPATIAL.values, with_field(SPATIAL.structure, name, value)), (3, 3))


def test_refuses_fewer_values_than_entries() -> None:
    entries = ConvHeader.read(SPATIAL.structure).entries
    with pytest.raises(FormatError, match=rf"values has shape \(8,\), expected .*at least {entries}"):
        unpack_conv(Packed(SPATIAL.values[:8], SPATIAL.structure), (3, 3))
    for op in (gather_conv, reference_gather_conv):
        with pytest.raises(ValueError, match=f"at least {entries} elements"):
            op(
                *(torch.randn(1, 50, 7, 7), SPATIAL.values[:8], SPATIAL.structure, None, (23, 50, 3, 3)),
                *(ONES, ONES, ONES, 1),
            )


def test_reads_bytes_from_any_address() -> None:
    shifted = torch.cat([SPATIAL.structure.new_zeros(1), SPATIAL.structure])[1:]
    dense = unpack_conv(SPATIAL, (3, 3)).to_dense()
    assert torch.equal(unpack_conv(Packed(SPATIAL.values, shifted), (3, 3)).to_dense(), dense)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Tensor]:
    """One to three bytes or numbers of the structure changed, in any of its parts."""
    which = draw(st.sampled_from(sorted(WEIGHTS)))
    structure = WEIGHTS[which].structure.clone()
    h = ConvHeader.read(structure)
    begins = [h.rows_at, h.stages_at, h.counts_at, h.order_at, h.codes_at, h.bytes]
    parts = [(0, 8 * len(FIELDS)), *itertools.pairwise(begins)]
    for _ in range(draw(st.integers(1, 3))):
        first, last = draw(st.sampled_from(parts))
        at = draw(st.integers(first, last - 1))
        structure[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from((0, 1, 2, 12, 16, 255))))
    return which, structure


@settings(deadline=None, max_examples=400)
@given(damages())
def test_a_damaged_structure_is_refused_or_is_that_of_another_weight(damage: tuple[str, Tensor]) -> None:
    """What unpack_conv() lets through, kernels compute as it says: they never leave their arrays."""
    which, structure = damage
    values, kernel = WEIGHTS[which].values, (3, 3) if which == "spatial" else (1, 1)
    try:
        weight = unpack_conv(Packed(values, structure), kernel)
    except FormatError:
        return
    groups = ConvHeader.read(structure).groups
    pads = [kernel[0] // 2] * 2
    for batch, size in ((1, 7), (3, 10)):
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, weight.shape[1] * groups, size, size, generator=generator)
        y = gather_conv(x, values, structure, None, weight.shape, ONES, pads, ONES, groups)
        dense = weight.to_dense().double()
        assert_close_at_scale(y, torch.conv2d(x.double(), dense, None, 1, pads, 1, groups))


def test_the_header_is_what_the_kernels_read() -> None:
    """Names and order of the C++ side, from its source."""
    source = (build.SOURCES / "conv.h").read_text()
    body = source[source.index("struct Structure {") :]
    lines = [line.split("//")[0].strip() for line in body[: body.index("const {")].splitlines()]
    declared = [line.removeprefix("int64_t ") for line in lines if line.startswith("int64_t ")]
    names = [name for names in declared for name in re.findall(r"\w+(?:\[\d+\])?(?=[,;])", names)]
    *names, unused = names
    assert names == FIELDS
    assert unused == f"unused[{ConvHeader.SIZE // 8 - len(FIELDS)}]"
