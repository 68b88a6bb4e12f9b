"""A structure that is not what pack() wrote: refused with its reason, or harmless."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError
from fanin_compile.kernels import build
from fanin_compile.packed import Header, Packed, decode, unpack
from fanin_compile.packing import pack
from tests.compile_support import sparse_weight

PACKED = pack(CondensedWeight.from_dense(sparse_weight(37, 90, 9, ablated=3)), width=40, block_rows=10)
FIELDS = [field.name for field in dataclasses.fields(Header)]


def with_field(name: str, value: int) -> Tensor:
    structure = PACKED.structure.clone()
    structure[: 8 * len(FIELDS)].view(torch.int64)[FIELDS.index(name)] = value
    return structure


STRUCTURES = {
    "another version": (with_field("version", 1), "is of version 0x1, expected 0x"),
    "cut off": (PACKED.structure[:-64], "has .* bytes, expected .*: it was cut off"),
    "cut off in the header": (PACKED.structure[:100], "at least 128 bytes"),
    "empty": (PACKED.structure[:0], "at least 128 bytes"),
    "longer": (torch.cat([PACKED.structure, PACKED.structure]), "has .* bytes, expected .*: it was cut off"),
    "another dtype": (PACKED.structure.view(torch.int8), "structure is torch.int8"),
    "two dimensions": (PACKED.structure[None], r"structure is torch.uint8 \(1, "),
}


@pytest.mark.parametrize("which", STRUCTURES)
def test_refuses_what_is_no_structure(which: str) -> None:
    structure, message = STRUCTURES[which]
    for read in (Header.read, decode, lambda s: unpack(Packed(PACKED.values, s))):
        with pytest.raises(FormatError, match=message):
            read(structure)


@pytest.mark.parametrize("which", [name for name in STRUCTURES if name != "two dimensions"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_operator_refuses_it_too(which: str, batch: int) -> None:
    structure, _ = STRUCTURES[which]
    for op in (ops.gather_matmul, ops.reference_gather_matmul):
        with pytest.raises(ValueError, match="structure"):
            op(torch.randn(batch, 90), PACKED.values, structure, None, 37)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out", -1),
        ("in_", 200),
        ("nnz", 3),
        ("width", 0),
        ("width", 256),
        ("column_bytes", 4),
        ("blocks", 0),
        ("blocks", 2**40),
        ("chunks", 2),
        ("entries", 8),
        ("entries", 2**40),
        ("segments_at", 0),
        ("segments_at", 129),
        ("groups_at", -64),
        ("columns_at", 2**62),
    ],
)
def test_refuses_headers_that_contradict_the_rest(name: str, value: int) -> None:
    with pytest.raises(FormatError):
        unpack(Packed(PACKED.values, with_field(name, value)))


def test_refuses_fewer_values_than_entries() -> None:
    header = Header.read(PACKED.structure)
    message = rf"values has shape \(8,\), expected .*at least {header.entries}"
    with pytest.raises(FormatError, match=message):
        unpack(Packed(PACKED.values[:8], PACKED.structure))
    for op in (ops.gather_matmul, ops.reference_gather_matmul):
        with pytest.raises(ValueError, match=f"at least {header.entries} elements"):
            op(torch.randn(2, 90), PACKED.values[:8], PACKED.structure, None, 37)


def test_a_group_that_names_a_row_twice_is_refused() -> None:
    header, structure = Header.read(PACKED.structure), PACKED.structure.clone()
    rows = structure[header.groups_at :][:8].view(torch.uint16)
    rows[0] = rows[1]
    with pytest.raises(FormatError, match="groups of the structure do not fit"):
        unpack(Packed(PACKED.values, structure))


def test_reads_bytes_from_any_address() -> None:
    shifted = torch.cat([PACKED.structure.new_zeros(1), PACKED.structure])[1:]
    assert torch.equal(unpack(Packed(PACKED.values, shifted)).to_dense(), unpack(PACKED).to_dense())


@st.composite
def damages(draw: st.DrawFn) -> Tensor:
    """One to three bytes or numbers of the structure changed, in any of its parts."""
    header, structure = Header.read(PACKED.structure), PACKED.structure.clone()
    parts = [(0, 8 * len(FIELDS)), (header.segments_at, header.groups_at)]
    parts += [(header.groups_at, header.columns_at), (header.columns_at, header.columns_at + header.entries)]
    for _ in range(draw(st.integers(1, 3))):
        first, last = draw(st.sampled_from(parts))
        at = draw(st.integers(first, last - 1))
        structure[at] = draw(st.one_of(st.integers(0, 255), st.sampled_from((0, 1, 39, 40, 41, 255))))
    return structure


@settings(deadline=None, max_examples=400)
@given(damages())
def test_a_damaged_structure_is_refused_or_is_that_of_another_weight(structure: Tensor) -> None:
    """What unpack() lets through, kernels compute as it says: they never leave their arrays."""
    try:
        weight = unpack(Packed(PACKED.values, structure))
    except FormatError:
        return
    out, in_features = weight.shape
    dense = weight.to_dense().double()
    for batch in (1, 3, 40):
        x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(batch))
        y = ops.gather_matmul(x, PACKED.values, structure, None, out)
        torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=1e-4, atol=1e-4)


def test_the_header_is_what_the_kernels_read() -> None:
    """Names and order of the C++ side, from its source."""
    source = (build.SOURCES / "linear.h").read_text()
    body = source[source.index("struct Structure {") :]
    lines = [line.split("//")[0].strip() for line in body[: body.index("const {")].splitlines()]
    declared = [line.removeprefix("int64_t ") for line in lines if line.startswith("int64_t ")]
    names = [name for names in declared for name in re.findall(r"\w+(?:\[\d+\])?(?=[,;])", names)]
    *names, unused = names
    assert names == [name.rstrip("_") for name in FIELDS]
    assert unused == f"unused[{Header.SIZE // 8 - len(FIELDS)}]"
