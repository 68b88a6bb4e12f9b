"""The packed form of a condensed weight: what the linear kernels read, from beginning to end, without jumping.

    CondensedWeight           row by row: values[n, k], indices[n, k]             6 bytes a non-zero (fp32, uint16)
    Packed                    in the order in which the kernels visit non-zeros   5.3 bytes a non-zero

Rows are cut into blocks, columns into chunks of at most 255, so that a column is one byte. Within a (block, chunk)
rows are sorted by the count of their non-zeros there and taken four at a time: a *group*. A group's entries stand step
by step, one of each of its four rows; rows with fewer get entries of value 0 which read the zero behind the chunk's x,
so that nothing (a NaN, say) can leak in. Steps come in pairs: eight entries are what one load of columns brings.

    block 0, chunk 0:   group 0: r0 r1 r2 r3 | r0 r1 r2 r3 | ...    group 1: ...
    block 0, chunk 1:   ...

Layers with few non-zeros in a chunk get wider chunks and columns of two bytes. The C++ view is `Structure` in
kernels/linear.h.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .condensed import CondensedWeight
from .errors import FormatError
from .structure import Numbers, expect_sound

GROUP_ROWS = 4
PAIR = 2 * GROUP_ROWS  # entries of a pair of steps
NARROW, WIDEST = 255, 65535  # most columns of a chunk whose columns are one byte, and two
MAX_HEIGHT = 65534  # rows of a block: the number one past them has 16 bits, too


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [out, in].

    Attributes:
        values: [capacity], of the condensed values' dtype; 0 where they fill up groups, and behind the last group.
        structure: uint8, everything else; see the module's docstring.
    """

    values: Tensor
    structure: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.structure.nbytes


@dataclass(frozen=True)
class Header(Numbers):
    """The numbers of a linear weight's structure, by the names of kernels/linear.h."""

    VERSION: ClassVar[int] = 0x0FA10003
    SIZE: ClassVar[int] = 128
    ALIGNMENT: ClassVar[int] = 64

    out: int
    in_: int
    nnz: int
    width: int
    column_bytes: int
    blocks: int
    chunks: int
    entries: int
    segments_at: int
    groups_at: int
    columns_at: int
    tile: int

    def sound(self) -> bool:
        narrow = self.column_bytes == 1
        return (
            min(self.out, self.in_, self.nnz, self.entries) >= 0
            and 1 <= self.width <= (NARROW if narrow else WIDEST)
            and self.column_bytes in (1, 2)
            and self.chunks == max(1, math.ceil(self.in_ / self.width))
            and self.blocks >= 1
            and self.tallest <= MAX_HEIGHT
        )

    @property
    def tallest(self) -> int:
        """Rows of the largest block."""
        return -(-self.out // self.blocks)

    @property
    def size(self) -> str:
        return f"{self.out} x {self.in_}"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is the structure of a dense weight of that shape."""
        return tuple(shape) == (self.out, self.in_)

    def first_row(self, block: Tensor) -> Tensor:
        return block * self.out // self.blocks


LEAST_BYTES = Header.SIZE + 3 * Header.ALIGNMENT  # of a structure with anything in it


def unpack(packed: Packed) -> CondensedWeight:
    """The condensed weight that was packed, bit for bit, on its device.

    Raises:
        FormatError: a structure of another version, damaged, or of more entries than there are values. All that
            kernels take on trust is checked.
    """
    parts = _Parts.read(packed.structure)
    parts.check()
    header = parts.header
    if packed.values.ndim != 1 or len(packed.values) < header.entries:
        raise FormatError(
            f"values has shape {tuple(packed.values.shape)}, expected one dimension of at least {header.entries}"
        )
    index, entry = parts.non_zeros()
    return CondensedWeight.at(packed.values[entry], index, (header.out, header.in_))


def decode(structure: Tensor) -> tuple[Header, Tensor, Tensor]:
    """What a structure says in plain tensors, on its device.

    Returns: the header; int64 [nnz], where each non-zero stands in the flattened dense weight, ascending; int64 [nnz],
        its entry in `values`.
    """
    parts = _Parts.read(structure)
    return (parts.header, *parts.non_zeros())


@dataclass(frozen=True, eq=False)
class _Parts:
    """The arrays of a structure, all int64: segments [segments + 1, 2], table [groups, 5], columns [entries]."""

    header: Header
    segments: Tensor
    table: Tensor
    columns: Tensor

    @classmethod
    def read(cls, structure: Tensor) -> _Parts:
        header = Header.read(structure)

        part = partial(header.part, structure)
        count = header.blocks * header.chunks
        segments = part("segments", header.segments_at, 2 * (count + 1), torch.int32).view(-1, 2)
        groups = int(segments[-1, 0])
        table = part("groups", header.groups_at, (GROUP_ROWS + 1) * groups, torch.uint16)
        column_dtype = torch.uint8 if header.column_bytes == 1 else torch.uint16
        columns = part("columns", header.columns_at, header.entries, column_dtype)
        return cls(header, segments, table.view(groups, GROUP_ROWS + 1), columns)

    def check(self) -> None:
        """FormatError unless kernels that follow it stay inside their arrays."""
        h, groups, entries = self.header, self.segments[:, 0], self.segments[:, 1]
        expect_sound("segments", int(groups[0]) == 0 and bool((groups.diff() >= 0).all()))
        pairs = self.table[:, GROUP_ROWS]
        ends = PAIR * torch.cat([pairs.new_zeros(1), pairs.cumsum(0)])  # [groups + 1]
        rows = self.table[:, :GROUP_ROWS].sort(1).values
        block = torch.repeat_interleave(groups.diff()) // h.chunks
        height = (h.first_row(block + 1) - h.first_row(block))[:, None]  # what stands for no row
        twice = (rows.diff(dim=1) == 0) & (rows[:, 1:] < height)
        expect_sound(
            "groups", bool((pairs > 0).all()) and bool((rows <= height).all()) and not bool(twice.any())
        )
        expect_sound("entries", int(ends[-1]) == h.entries and torch.equal(ends[groups], entries))
        expect_sound("columns", bool((self.columns <= h.width).all()))

    def non_zeros(self) -> tuple[Tensor, Tensor]:
        """See decode. FormatError if entries do not stand where those of their row would."""
        h, rows, pairs = self.header, self.table[:, :GROUP_ROWS], self.table[:, GROUP_ROWS]
        segment = torch.repeat_interleave(self.segments[:, 0].diff())
        block, chunk = segment // h.chunks, segment % h.chunks  # of each group
        run_of_lane = (h.first_row(block)[:, None] + rows) * h.chunks + chunk[:, None]  # [groups, 4]

        entry = (self.columns < h.width).nonzero().flatten()
        group = torch.repeat_interleave(pairs)[entry // PAIR]
        run = run_of_lane[group, entry % GROUP_ROWS]
        step = (entry - PAIR * begins(pairs)[group]) // GROUP_ROWS
        counts = torch.bincount(run, minlength=h.out * h.chunks)
        expect_sound("rows", len(counts) == h.out * h.chunks and bool((step < counts[run]).all()))

        # a run's entries ascend by column, and runs follow each other in a row: no need to sort
        order = torch.zeros_like(entry)
        order[begins(counts)[run] + step] = torch.arange(len(entry), device=entry.device)
        entry, run = entry[order], run[order]
        column = run % h.chunks * h.width + self.columns[entry]
        expect_sound("columns", len(column) == h.nnz and bool((column < h.in_).all()))
        return run // h.chunks * h.in_ + column, entry


def begins(lengths: Tensor) -> Tensor:
    """Where each of several pieces begins that stand end to end."""
    return lengths.cumsum(0) - lengths
