"""pack_conv(): put a condensed convolution's non-zeros into the order of its kernel. The format: packed_conv.py."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .condensed import CondensedWeight
from .errors import FormatError, OptionError
from .packed import Packed, begins
from .packed_conv import KINDS, MAX_CODE, MAX_TAPS, TOGETHER, ConvHeader, code_step
from .structure import capacity, write

BLOCK_ROWS = (
    256  # their sums in 14 vectors: 112 KiB of L2, and blocks for every thread where images are small
)
_VECTOR = 32  # bytes; a chunk is x of one tile in slightly more than L1: longer runs are worth some misses
_CHUNK_BYTES = 36 << 10
_STRIDED_MORE = 8 << 10  # than L1, of strided layers: they read more for a product, runs would be too short
_NARROW_BYTES = 24 << 10  # where runs go side by side
_WIDE, _NARROW = 14, 3  # vectors of a tile
_SHORT_ROW = 12  # non-zeros of a row, on average, below which runs side by side do not pay
_INT32_MAX = 2**31 - 1


def pack_conv(
    weight: CondensedWeight,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block_rows: int = BLOCK_ROWS,
) -> Packed:
    """Put a condensed weight [out, in/groups, *kernel] into the order of the kernel. unpack_conv() undoes it exactly.

    Args:
        weight: of 1 to 3 kernel dimensions, with any fan-in; ablated output channels cost nothing but their bias.
        stride, padding, dilation: one number for each dimension. They decide how many channels are read together;
            a weight packed for others gives the same result more slowly, but for pointwise ones: see gather_conv.
        block_rows: about so many output channels are a block, what threads share of a small image; 1 to 65535.

    Returns: values and structure on the device of the weight's values.

    Raises:
        FormatError: other dimensions, groups that do not divide the output channels, a kernel of more than 32768
            taps, or more entries than int32 can count.
        OptionError: block_rows outside its range.
    """
    shape = weight.shape
    if not 3 <= len(shape) <= 5:
        raise FormatError(
            f"weight has shape {shape}, expected [out, in/groups, *kernel] of 1 to 3 dimensions"
        )
    if groups < 1 or shape[0] % groups:
        raise FormatError(f"groups is {groups}, expected a divisor of the {shape[0]} output channels")
    if not 1 <= block_rows <= MAX_CODE:
        raise OptionError(f"block_rows is {block_rows}, expected 1 to {MAX_CODE}")
    taps = math.prod(shape[2:])
    if not 1 <= taps <= MAX_TAPS:
        raise FormatError(f"kernel is {shape[2:]}, expected 1 to {MAX_TAPS} taps")
    pointwise = taps == 1 and not any(padding)
    together = TOGETHER if pointwise and weight.nnz >= _SHORT_ROW * max(weight.n_active, 1) else 1
    if pointwise:
        floats, most = (_NARROW, _NARROW_BYTES) if together > 1 else (_WIDE, _CHUNK_BYTES)
        chunk = most // (floats * _VECTOR)
    else:
        # vectors of 64 bytes read twice as much of a chunk: for them a longer run is no longer worth the misses
        longer = max(stride) > 1 and torch.backends.cpu.get_cpu_capability() != "AVX512"
        most = _l1_bytes() + _STRIDED_MORE if longer else _CHUNK_BYTES
        chunk = most // (_VECTOR * _footprint(shape[2:], stride, padding, dilation))
    channels = max(shape[1] * groups, 1)
    chunk = max(1, min(chunk, channels, MAX_CODE // code_step(taps, together) - 1))
    chunk = math.ceil(channels / math.ceil(channels / chunk))  # as even as can be
    return _Packing.of(weight, groups, chunk, together, block_rows).write()


@functools.cache
def _l1_bytes() -> int:
    """Of a core's first-level data cache, as the system tells; 32 KiB where it does not."""
    try:
        told = os.sysconf("SC_LEVEL1_DCACHE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        told = 0
    return told if told > 0 else 32 << 10


def _footprint(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> int:
    """Vectors of one input channel that a tile of outputs reads: two rows of seven, or one of fourteen in 1d."""
    tile = [1] * (len(kernel) - 2) + [2, _WIDE // 2] if len(kernel) > 1 else [_WIDE]
    vectors = 1
    for k, s, p, d, outputs in zip(kernel, stride, padding, dilation, tile, strict=True):
        # tap i at distance i * d - p from its output is `shift` outputs away, in one of the phases of the stride
        shifts: dict[int, list[int]] = {}
        for i in range(k):
            shifts.setdefault((i * d - p) % s, []).append((i * d - p) // s)
        vectors *= sum(max(of_phase) - min(of_phase) + outputs for of_phase in shifts.values())
    return vectors


@dataclass(frozen=True, eq=False)
class _Packing:
    """Runs and visits of a weight; tables are int64 on the CPU.

    Attributes:
        blocks: of live rows: block b is rows [live * b // blocks, live * (b + 1) // blocks).
        live: [n], output channels with non-zeros, ascending.
        visits: [visits], entries of each run; in `cell` order.
        order: [visits, together], rows inside the block.
        in_cell: [stages * KINDS], visits of each kind of run.
        entry: [nnz], where each non-zero goes.
        code: [nnz].
    """

    weight: CondensedWeight
    groups: int
    chunk: int
    together: int
    blocks: int
    live: Tensor
    visits: Tensor
    order: Tensor
    in_cell: Tensor
    entry: Tensor
    code: Tensor

    @classmethod
    def of(cls, weight: CondensedWeight, groups: int, chunk: int, together: int, block_rows: int) -> _Packing:
        out, group_channels = weight.shape[:2]
        taps, fan_in = math.prod(weight.shape[2:]), max(weight.dense_fan_in, 1)
        index = weight.dense_index().cpu()
        row, column = index // fan_in, index % fan_in
        channel = row // max(out // groups, 1) * group_channels + column // taps
        code = channel % chunk * code_step(taps, together) + column % taps
        chunks = max(1, math.ceil(group_channels * groups / chunk))

        live, place = row.unique_consecutive(return_inverse=True)
        # even, so that two threads get as much; a low weight is one block
        n = len(live)
        blocks = max(1, 2 * round(n / block_rows / 2))
        first = torch.arange(blocks + 1) * n // blocks
        block = torch.arange(blocks).repeat_interleave(first.diff())

        # a run: what one row has in one chunk
        key = place * chunks + channel // chunk
        key, counts = key.unique_consecutive(return_counts=True)
        of_row, stage = key // chunks, block[key // chunks] * chunks + key % chunks
        begins_row = torch.ones(len(key), dtype=torch.bool)
        begins_row[1:] = of_row.diff() > 0
        ends_row = torch.ones(len(key), dtype=torch.bool)
        ends_row[:-1] = begins_row[1:]
        kind = torch.where(begins_row, torch.where(ends_row, 0, 1), torch.where(ends_row, 3, 2))
        cell = stage * KINDS + kind
        by_count = ((cell << 17) + counts).argsort(stable=True)  # a count is below 65536
        cell = cell[by_count]

        runs_in = torch.bincount(cell, minlength=blocks * chunks * KINDS)
        in_cell = -(-runs_in // together)
        missing = in_cell * together - runs_in
        at = torch.arange(len(cell)) - begins(runs_in)[cell]  # of each run in its cell
        # in a cell's last visit, missing runs stand before the others
        at += torch.where(at // together == in_cell[cell] - 1, missing[cell], 0)
        visit, lane = begins(in_cell)[cell] + at // together, at % together

        number = int(in_cell.sum())
        visits = torch.zeros(number, dtype=torch.int64)
        visits.scatter_reduce_(0, visit, counts[by_count], "amax")
        order = torch.full((number, together), -1)
        order[visit, lane] = (of_row - first[block[of_row]])[by_count]
        for i in reversed(
            range(together - 1)
        ):  # a missing run repeats the row of the first: what is stored last counts
            order[:, i] = torch.where(order[:, i] < 0, order[:, i + 1], order[:, i])

        first_entry = torch.empty_like(counts)
        first_entry[by_count] = together * begins(visits)[visit] + lane
        run = torch.repeat_interleave(counts)
        entry = first_entry[run] + together * (torch.arange(len(code)) - begins(counts)[run])
        return cls(weight, groups, chunk, together, blocks, live, visits, order, in_cell, entry, code)

    def write(self) -> Packed:
        weight, together = self.weight, self.together
        out, group_channels = weight.shape[:2]
        entries = together * int(self.visits.sum())
        if entries > _INT32_MAX:
            raise FormatError(f"weight has {entries} entries when packed, expected below 2**31")
        stages = len(self.in_cell) // KINDS
        cells = torch.repeat_interleave(self.in_cell)  # of each visit
        of_stage = torch.zeros(stages + 1, dtype=torch.int64)
        of_stage[1:].index_add_(0, cells // KINDS, together * self.visits)
        table = torch.empty(stages + 1, 1 + KINDS, dtype=torch.int32)
        table[:, 0] = of_stage.cumsum(0)
        table[:-1, 1:] = begins(self.in_cell).view(-1, KINDS)
        table[-1, 1:] = len(self.visits)

        # room by shapes and numbers of non-zeros alone, so that most changes of a mask leave sizes as they are
        chunks = stages // self.blocks
        spread = min(chunks, max(0, group_channels - 2) // self.chunk + 2, max(1, weight.max_fan_in))
        runs = len(self.live) * spread
        most = runs if together == 1 else -(-runs // together) + KINDS * stages
        room = capacity(entries, weight.nnz, 8)
        counts = torch.zeros(max(most, len(self.visits)), dtype=torch.uint16)
        counts[: len(self.visits)] = self.visits.to(torch.uint16)
        order = torch.zeros(len(counts), together, dtype=torch.uint16)
        order[: len(self.visits)] = self.order.to(torch.uint16)
        fillers = (
            self.chunk * code_step(1, together) if together > 1 else 0
        )  # they read the zeros behind a chunk
        codes = torch.full((room,), fillers, dtype=torch.int32)
        codes[self.entry] = self.code.to(torch.int32)
        dead = torch.ones(out, dtype=torch.bool)
        dead[self.live] = False
        rows = torch.cat([self.live, dead.nonzero().flatten()]).to(torch.int32)

        device = weight.values.device
        values = weight.values.new_zeros(room)
        values.scatter_(0, self.entry.to(device), weight.values.flatten())

        def header(
            rows_at: int, stages_at: int, counts_at: int, order_at: int, codes_at: int, *, bytes: int
        ) -> ConvHeader:
            return ConvHeader(
                version=ConvHeader.VERSION,
                bytes=bytes,
                out=out,
                group_channels=group_channels,
                groups=self.groups,
                taps=math.prod(weight.shape[2:]),
                nnz=weight.nnz,
                chunk=self.chunk,
                together=together,
                blocks=self.blocks,
                live=len(self.live),
                entries=entries,
                visits=len(self.visits),
                longest=int(of_stage.max()),
                rows_at=rows_at,
                stages_at=stages_at,
                counts_at=counts_at,
                order_at=order_at,
                codes_at=codes_at,
            )

        structure = write(ConvHeader, [rows, table, counts, order, codes.to(torch.uint16)], header)
        return Packed(values, structure.to(device))
