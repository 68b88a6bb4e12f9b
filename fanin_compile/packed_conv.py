"""The packed form of a condensed convolution's weight: what its kernel reads, from beginning to end.

A non-zero is a code of 16 bits, its channel inside a chunk and its tap, next to its value. Output channels that have
any are cut into blocks, input channels into chunks; a (block, chunk) is a *stage*, and what a row has in one chunk is a
*run*. In a stage come runs that are whole rows, then those that begin a row, go on with it, end it (their sums start at
zero or not, and leave or not), each kind by count:

    block 0, chunk 0:   whole rows | first runs | middle runs | last runs     rows, counts, codes, values
    block 0, chunk 1:   ...

A *visit* is one run, or four of different rows side by side (pointwise layers with enough non-zeros), whose entries
alternate; shorter ones are filled up with values of 0 that read the zeros behind a chunk. The format does not know the
size of an image: kernels turn codes into addresses, `channel << bits | tap` by a table, those of runs side by side,
`12 * channel`, as they are. The C++ view is `Structure` in kernels/conv.h.
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
from .packed import Packed, begins
from .structure import Numbers, expect_sound

TOGETHER = 4  # runs of a visit, where it has more than one
CHANNEL_BYTES = 12  # their codes count the bytes that a channel takes for each lane: three vectors of floats
KINDS = 4  # of runs: whole rows, first, middle, last
CODE_BYTES = 2
MAX_CODE = 65535
MAX_TAPS = (MAX_CODE + 1) // 2
MAX_HEIGHT = 65535  # rows of a block


@dataclass(frozen=True)
class ConvHeader(Numbers):
    """The numbers of a convolution's structure, by the names of kernels/conv.h."""

    VERSION: ClassVar[int] = 0x0FA1C001
    SIZE: ClassVar[int] = 160
    ALIGNMENT: ClassVar[int] = 8

    out: int
    group_channels: int
    groups: int
    taps: int
    nnz: int
    chunk: int
    together: int
    blocks: int
    live: int
    entries: int
    visits: int
    longest: int
    rows_at: int
    stages_at: int
    counts_at: int
    order_at: int
    codes_at: int

    @property
    def channels(self) -> int:
        return self.group_channels * self.groups

    @property
    def chunks(self) -> int:
        return max(1, math.ceil(self.channels / self.chunk))

    @property
    def stages(self) -> int:
        return self.blocks * self.chunks

    @property
    def step(self) -> int:
        """From one channel's codes to the next one's."""
        return code_step(self.taps, self.together)

    @property
    def fan_in(self) -> int:
        """Dense inputs of an output channel."""
        return self.group_channels * self.taps

    @property
    def size(self) -> str:
        return f"{self.out} x {self.group_channels} channels, {self.taps} taps"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it is the structure of a dense weight of that shape."""
        out, group_channels, *kernel = shape
        return (out, group_channels, math.prod(kernel)) == (self.out, self.group_channels, self.taps)

    def first_row(self, block: Tensor) -> Tensor:
        return block * self.live // self.blocks

    def sound(self) -> bool:
        return (
            min(self.out, self.group_channels, self.nnz, self.entries, self.visits, self.longest) >= 0
            and min(self.groups, self.taps, self.chunk, self.blocks) >= 1
            and 0 <= self.live <= self.out
            and self.out % self.groups == 0
            and self.together in (1, TOGETHER)
            and (self.together == 1 or self.taps == 1)  # fillers have no tap of their own
            and (self.chunk + 1) * self.step - 1 <= MAX_CODE
            and self.channels <= MAX_CODE * MAX_CODE  # none of the products below overflows
            and -(-self.live // self.blocks) <= MAX_HEIGHT
        )


LEAST_CONV_BYTES = ConvHeader.SIZE + 5 * ConvHeader.ALIGNMENT  # of a structure with anything in it


def code_step(taps: int, together: int) -> int:
    """From one channel's codes to the next one's: room for the taps, a power of two."""
    return CHANNEL_BYTES if together > 1 else 1 << (taps - 1).bit_length()


def unpack_conv(packed: Packed, kernel: Sequence[int]) -> CondensedWeight:
    """The condensed weight that was packed, bit for bit, on its device.

    Args:
        kernel: sizes of the taps, as in the weight's shape [out, in/groups, *kernel].

    Raises:
        FormatError: a structure of another version, damaged, of other taps, or of more entries than there are values.
            All that kernels take on trust is checked.
    """
    parts = _Parts.read(packed.structure)
    parts.check()
    h = parts.header
    if math.prod(kernel) != h.taps:
        raise FormatError(f"kernel is {tuple(kernel)}, expected {h.taps} taps")
    if packed.values.ndim != 1 or len(packed.values) < h.entries:
        raise FormatError(
            f"values has shape {tuple(packed.values.shape)}, expected one dimension of at least {h.entries}"
        )
    index, entry = parts.non_zeros()
    return CondensedWeight.at(packed.values[entry], index, (h.out, h.group_channels, *kernel))


def decode_conv(structure: Tensor) -> tuple[ConvHeader, Tensor, Tensor]:
    """What a structure says in plain tensors, on its device.

    Returns: the header; int64 [nnz], where each non-zero stands in the flattened dense weight, ascending; int64 [nnz],
        its entry in `values`.
    """
    parts = _Parts.read(structure)
    return (parts.header, *parts.non_zeros())


@dataclass(frozen=True, eq=False)
class _Parts:
    """The arrays of a structure, all int64.

    Attributes:
        rows: [out], output channels: the live ones block by block, then the others.
        stages: [stages + 1, 1 + KINDS], first entry, and first visit of each kind.
        counts: [visits], entries of each of its runs.
        order: [visits, together], rows inside the block.
        codes: [entries].
    """

    header: ConvHeader
    rows: Tensor
    stages: Tensor
    counts: Tensor
    order: Tensor
    codes: Tensor

    @classmethod
    def read(cls, structure: Tensor) -> _Parts:
        h = ConvHeader.read(structure)
        part = partial(h.part, structure)
        return cls(
            h,
            part("rows", h.rows_at, h.out, torch.int32),
            part("stages", h.stages_at, (h.stages + 1) * (1 + KINDS), torch.int32).view(-1, 1 + KINDS),
            part("counts", h.counts_at, h.visits, torch.uint16),
            part("order", h.order_at, h.visits * h.together, torch.uint16).view(-1, h.together),
            part("codes", h.codes_at, h.entries, torch.uint16),
        )

    def check(self) -> None:
        """FormatError unless kernels that follow it stay inside their arrays and finish every live row."""
        h, visit = self.header, self.stages[:, 1:]
        channels = torch.arange(h.out, device=self.rows.device)
        ascending = bool((self.rows[: h.live].diff() > 0).all())
        expect_sound("rows", ascending and torch.equal(self.rows.sort().values, channels))
        firsts = torch.cat([visit[:-1].flatten(), visit[-1, :1]])
        ordered = bool((firsts.diff() >= 0).all()) and bool((visit[-1] == h.visits).all())
        expect_sound("stages", ordered and int(firsts[0]) == 0)
        ends = h.together * torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])  # [visits + 1]
        entries = self.stages[:, 0]
        expect_sound("entries", torch.equal(ends[visit[:, 0]], entries) and int(entries[-1]) == h.entries)
        expect_sound("longest", int(entries.diff().max()) == h.longest)  # scratch of that size
        channel, tap, real = self._places()
        expect_sound("codes", bool((tap < h.taps).all()) and bool((channel[real] < h.channels).all()))
        # beyond a chunk there are zeros only for runs side by side, and one channel of them
        most = h.chunk if h.together > 1 else h.chunk - 1
        expect_sound("codes", bool((self.codes // h.step <= most).all()))
        self._check_order(firsts.diff(), ends, real)

    def _check_order(self, in_cell: Tensor, ends: Tensor, real: Tensor) -> None:
        """Every live row has one run for all of it, or a first, any number in the middle and a last."""
        h = self.header
        block = self._stage_of_visit() // h.chunks
        height = h.first_row(block + 1) - h.first_row(block)
        expect_sound("order", bool((self.order < height[:, None]).all()))
        # of two runs of one row side by side, the first is no run at all: what is stored last counts
        ghost = torch.zeros_like(self.order, dtype=torch.bool)
        for i in range(h.together):
            ghost[:, i] = (self.order[:, i : i + 1] == self.order[:, i + 1 :]).any(1)
        number = torch.arange(h.entries, device=real.device)
        of_entry = self._visit_of_entry()
        expect_sound(
            "order", not bool((ghost[of_entry, (number - ends[of_entry]) % h.together] & real).any())
        )

        kind = torch.repeat_interleave(in_cell, output_size=h.visits) % KINDS
        row = (h.first_row(block)[:, None] + self.order)[~ghost]
        kinds = kind[:, None].expand_as(self.order)[~ghost]
        row, by_row = row.sort(stable=True)  # in the order of the visits
        kinds = kinds[by_row]
        edge = torch.ones(1, dtype=torch.bool, device=row.device)
        first, last = torch.cat([edge, row.diff() > 0]), torch.cat([row.diff() > 0, edge])
        if len(row) == 0:
            first = last = first[:0]
        # kinds: 0 begins and ends a row, 1 begins one, 3 ends one
        fits = torch.equal(kinds <= 1, first) and torch.equal((kinds == 0) | (kinds == 3), last)
        expect_sound("order", fits and int(first.sum()) == h.live)

    def _stage_of_visit(self) -> Tensor:
        return torch.repeat_interleave(self.stages[:, 1].diff(), output_size=self.header.visits)

    def _visit_of_entry(self) -> Tensor:
        return torch.repeat_interleave(self.counts * self.header.together, output_size=self.header.entries)

    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each entry: int64 input channel, int64 tap, whether it is a non-zero and no filler."""
        h, stage = self.header, self._stage_of_visit()
        inside = self.codes // h.step
        channel = stage[self._visit_of_entry()] % h.chunks * h.chunk + inside
        return channel, self.codes % h.step, inside < h.chunk

    def non_zeros(self) -> tuple[Tensor, Tensor]:
        """See decode_conv. FormatError if they do not stand where those of their row would."""
        h = self.header
        channel, tap, real = self._places()
        entry = real.nonzero().flatten()
        visit = self._visit_of_entry()[entry]
        begin = h.together * begins(self.counts)[visit]
        block = self._stage_of_visit()[visit] // h.chunks
        live = h.first_row(block) + self.order[visit, (entry - begin) % h.together]
        expect_sound("order", bool((live < h.live).all()))
        row = self.rows[live]
        column = (channel[entry] - row // max(h.out // h.groups, 1) * h.group_channels) * h.taps + tap[entry]
        expect_sound("codes", bool(((column >= 0) & (column < h.fan_in)).all()))
        index, order = (row * h.fan_in + column).sort()
        expect_sound("codes", len(index) == h.nnz and bool((index.diff() > 0).all()))
        return index, entry[order]
