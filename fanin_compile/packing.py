"""pack(): put the non-zeros of a condensed weight into the order of the linear kernels. The format: packed.py.

Runs (a row's non-zeros in one chunk of columns) are counted, grouped four at a time, and each non-zero is sent to the
place its run has in its group. Work by non-zeros is a few passes over int32 or int64 arrays; the rest is by runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .condensed import CondensedWeight
from .errors import FormatError, OptionError
from .packed import GROUP_ROWS, NARROW, PAIR, WIDEST, Header, Packed, begins
from .structure import capacity, write

BLOCK_ROWS = 384  # sums of 24 lanes of a block: 36 KiB
_MAX_BLOCK_ROWS = 2**15  # a block may be half as tall again, below packed.MAX_HEIGHT
_WIDTHS = (NARROW, 1023, 4095, 16383, WIDEST)
_WORTHWHILE = 6  # non-zeros of a row in a chunk, on average, below which a wider chunk pays
MAX_TILE = 3
_INT32_MAX = 2**31 - 1


def default_width(n: int, in_features: int, nnz: int) -> int:
    """Columns of a chunk: 255, or more where a row would have too few non-zeros in one.

    Args:
        n: rows with non-zeros.
    """
    for width in _WIDTHS:
        if nnz >= _WORTHWHILE * n * math.ceil(in_features / width) or width >= in_features:
            return width
    return WIDEST


def pack(
    weight: CondensedWeight, *, width: int | None = None, block_rows: int = BLOCK_ROWS, tile: int = MAX_TILE
) -> Packed:
    """Put a condensed weight [out, in] into the order of the kernels. unpack() undoes it exactly.

    Args:
        weight: of a linear layer, with any fan-in; neurons that are ablated cost nothing but their bias.
        width: columns of a chunk, 1 to 65535; one byte a column up to 255. By default, see default_width.
        block_rows: about so many rows are a block, what threads share of one batch row; 1 to 32768.
        tile: at most so many vectors of batch rows are computed together, 1 to 3.

    Returns: values and structure on the device of the weight's values.

    Raises:
        FormatError: the weight is not two-dimensional, or more than int32 can count.
        OptionError: a number outside its range.
    """
    if len(weight.shape) != 2:
        raise FormatError(f"weight has shape {weight.shape}, expected [out, in]")
    if width is None:
        width = default_width(max(weight.n_active, 1), weight.dense_fan_in, weight.nnz)
    _within("width", width, WIDEST)
    _within("block_rows", block_rows, _MAX_BLOCK_ROWS)
    _within("tile", tile, MAX_TILE)
    grid = _Grid.over(*weight.shape, width, block_rows)
    position, counts = _runs(weight, grid)
    groups = _group(counts, grid)
    if groups.entries > _INT32_MAX:
        raise FormatError(f"weight has {groups.entries} entries when packed, expected below 2**31")

    entry = _entries(groups, counts)
    room = capacity(groups.entries, weight.nnz, 64)
    device = weight.values.device
    values = weight.values.new_zeros(room)
    values.scatter_(0, entry.to(device), weight.values.flatten())
    columns = torch.full((room,), width, dtype=torch.int32)  # fillers read the zero behind a chunk
    columns.scatter_(0, entry, position)
    column_dtype = torch.uint8 if width <= NARROW else torch.uint16
    structure = _write(grid, groups, columns.to(column_dtype), weight.nnz, tile)
    return Packed(values, structure.to(device))


def gate_rows(gate: CondensedWeight, block_rows: int = BLOCK_ROWS) -> int:
    """pack()'s block_rows such that no block has rows of gates and of their partners.

    It makes an even number of blocks, but a single one of a weight lower than half of a block.
    """
    return max(1, min(block_rows, gate.shape[0] // 2))


def _within(name: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise OptionError(f"{name} is {value}, expected 1 to {most}")


@dataclass(frozen=True, eq=False)
class _Grid:
    """Rows cut into blocks, columns into chunks: a segment is a (block, chunk), a run a (row, chunk), row by row.

    Attributes:
        first: int64 [blocks + 1], first row of each block, and out.
        block: int64 [out], of each row.
    """

    out: int
    in_features: int
    width: int
    chunks: int
    blocks: int
    first: Tensor
    block: Tensor

    @classmethod
    def over(cls, out: int, in_features: int, width: int, block_rows: int) -> _Grid:
        # even, so that none holds rows of both halves of a gated layer
        blocks = max(1, 2 * round(out / block_rows / 2))
        first = torch.arange(blocks + 1) * out // blocks
        block = torch.arange(blocks).repeat_interleave(first.diff())
        return cls(out, in_features, width, max(1, math.ceil(in_features / width)), blocks, first, block)

    @property
    def segments(self) -> int:
        return self.blocks * self.chunks

    def segment_of_run(self) -> Tensor:
        return (self.block[:, None] * self.chunks + torch.arange(self.chunks)).flatten()

    def row_in_block_of_run(self) -> Tensor:
        return (torch.arange(self.out) - self.first[self.block]).repeat_interleave(self.chunks)


def _runs(weight: CondensedWeight, grid: _Grid) -> tuple[Tensor, Tensor]:
    """int32 [nnz], the column of each non-zero inside its chunk; int64 [runs], the non-zeros of each run."""
    index = weight.dense_index().cpu()  # ascending: a run begins where its first column would stand
    starts = torch.arange(grid.chunks) * grid.width  # [chunks]
    bounds = (torch.arange(grid.out)[:, None] * grid.in_features + starts).flatten()  # [runs]
    begin = torch.searchsorted(index, bounds)
    counts = torch.cat([begin, begin.new_tensor([len(index)])]).diff()
    column = weight.indices.flatten().cpu().to(torch.int32)
    start = starts.to(torch.int32).repeat(grid.out)
    return column - _spread(start, counts), counts


def _spread(of_run: Tensor, counts: Tensor) -> Tensor:
    """What each run has, at each of its non-zeros."""
    return of_run.index_select(0, torch.repeat_interleave(counts))


@dataclass(frozen=True, eq=False)
class _Groups:
    """Runs of one segment, in the order of their counts and four at a time.

    Attributes:
        table: int64 [groups, 5], rows inside the block and pairs of steps; groups of empty runs included.
        in_segment: int64 [segments], groups of each segment.
        first_entry: int64 [runs], where the first non-zero of each run stands.
        entries: of all groups.
    """

    table: Tensor
    in_segment: Tensor
    first_entry: Tensor
    entries: int


def _group(counts: Tensor, grid: _Grid) -> _Groups:
    segment = grid.segment_of_run()
    order = ((segment << 17) + counts).argsort(stable=True)  # a count is at most 65535
    segment = segment[order]
    runs_in = torch.bincount(segment, minlength=grid.segments)
    in_segment = -(-runs_in // GROUP_ROWS)  # the last one of a segment may have fewer than four
    place = torch.arange(len(order)) - begins(runs_in)[segment]  # of each run in its segment
    group, lane = begins(in_segment)[segment] + place // GROUP_ROWS, place % GROUP_ROWS

    longest = torch.zeros(int(in_segment.sum()), dtype=torch.int64)
    longest.scatter_reduce_(0, group, counts[order], "amax")
    pairs = -(-longest // 2)
    height = grid.first.diff().repeat_interleave(grid.chunks).repeat_interleave(in_segment)
    rows = height[:, None].repeat(1, GROUP_ROWS)  # where there is no fourth: one past the block's last
    rows[group, lane] = grid.row_in_block_of_run()[order]
    first_entry = torch.empty_like(counts)
    first_entry[order] = PAIR * begins(pairs)[group] + lane
    return _Groups(torch.cat([rows, pairs[:, None]], 1), in_segment, first_entry, PAIR * int(pairs.sum()))


def _entries(groups: _Groups, counts: Tensor) -> Tensor:
    """int64 [nnz], where each non-zero goes: a step further for each one before it in its run."""
    steps = torch.arange(int(counts.sum())).mul_(GROUP_ROWS)
    return steps.add_(_spread(groups.first_entry - GROUP_ROWS * begins(counts), counts))


def _write(grid: _Grid, groups: _Groups, columns: Tensor, nnz: int, tile: int) -> Tensor:
    """The structure: header, segments, groups, columns."""
    pairs = groups.table[:, -1]
    kept = pairs > 0  # empty runs need no visit
    segment = torch.arange(grid.segments).repeat_interleave(groups.in_segment)  # of each group
    bounds = torch.zeros(grid.segments + 1, 2, dtype=torch.int64)  # of each segment: group and entry
    bounds[1:].index_add_(0, segment, torch.stack([kept.long(), PAIR * pairs], 1))
    # room for all groups, so that the size depends on shapes, and little on the mask
    table = torch.zeros(groups.table.shape, dtype=torch.uint16)
    table[: int(kept.sum())] = groups.table[kept].to(torch.uint16)

    def header(segments_at: int, groups_at: int, columns_at: int, *, bytes: int) -> Header:
        return Header(
            version=Header.VERSION,
            bytes=bytes,
            out=grid.out,
            in_=grid.in_features,
            nnz=nnz,
            width=grid.width,
            column_bytes=columns.itemsize,
            blocks=grid.blocks,
            chunks=grid.chunks,
            entries=groups.entries,
            segments_at=segments_at,
            groups_at=groups_at,
            columns_at=columns_at,
            tile=tile,
        )

    return write(Header, [bounds.cumsum(0).to(torch.int32), table, columns], header)
