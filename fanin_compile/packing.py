"""The packed form of a condensed weight: what the linear kernels read, from beginning to end, without jumping.

    CondensedWeight           row by row: values[n, k], indices[n, k]                     6 bytes a non-zero (fp32, uint16)
    Packed                    in the order in which the kernels visit non-zeros           5.3 bytes a non-zero

Rows are cut into blocks, columns into chunks of at most 255, so that a column is one byte. Within a (block, chunk) rows are
sorted by the count of their non-zeros there and taken four at a time: a *group*. A group's entries stand step by step, one
of each of its four rows; rows with fewer get entries of value 0 which read the zero behind the chunk's x, so that nothing
(a NaN, say) can leak in. Steps come in pairs: eight entries are what one load of columns brings.

    block 0, chunk 0:   group 0: r0 r1 r2 r3 | r0 r1 r2 r3 | ...    group 1: ...
    block 0, chunk 1:   ...

Layers with few non-zeros in a chunk get wider chunks and columns of two bytes. The C++ view is `Structure` in
kernels/linear.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .condensed import CondensedWeight, index_dtype
from .errors import FormatError

VERSION = 0x0FA10003
_GROUP_ROWS = 4
_PAIR = 2 * _GROUP_ROWS  # entries of a pair of steps
_BLOCK_ROWS = 384  # sums of 24 lanes of a block: 36 KiB
_NARROW = 255  # columns of a chunk whose columns are one byte
_WIDE = (1023, 4095, 16383, 65535)
_WORTHWHILE = 6  # non-zeros of a row in a chunk, on average, below which a wider chunk pays
_SLACK = 32  # sizes are rounded up by nnz / _SLACK at most, so that most changes of a mask leave them alone
_MAX_TILE = 3
_FIELDS = (
    *("version", "bytes", "out", "in_", "nnz", "width", "column_bytes", "blocks", "chunks", "entries"),
    *("segments_at", "groups_at", "columns_at", "tile"),
)
_HEADER_BYTES = 128


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [out, in].

    Attributes:
        values: [capacity], of the condensed values' dtype; those that fill up groups, and those behind the last group, 0.
        structure: uint8, everything else; see the module's docstring.
    """

    values: Tensor
    structure: Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.structure.nbytes


@dataclass(frozen=True)
class Header:
    """The numbers at the beginning of a structure, by the names they have in kernels/linear.h."""

    version: int
    bytes: int
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

    @classmethod
    def read(cls, structure: Tensor) -> Header:
        """FormatError if `structure` is no structure of this version."""
        if structure.dtype == torch.uint8 and structure.ndim == 1 and len(structure) >= _HEADER_BYTES:
            numbers = structure[:_HEADER_BYTES].view(torch.int64).tolist()
            header = cls(*numbers[: len(_FIELDS)])
            if header.version == VERSION and header.bytes == len(structure):
                return header
        raise FormatError(
            f"structure is {structure.dtype} {tuple(structure.shape)}, expected a packed weight's of version {VERSION:#x}: "
            "pack it anew from the condensed weight"
        )


def default_width(n: int, in_features: int, nnz: int) -> int:
    """Columns of a chunk: 255, or more where a row would have too few non-zeros in one."""
    for width in (_NARROW, *_WIDE):
        if nnz >= _WORTHWHILE * n * math.ceil(in_features / width) or width >= in_features:
            return width
    return _WIDE[-1]


def pack(weight: CondensedWeight, *, width: int | None = None, block_rows: int = _BLOCK_ROWS, tile: int = _MAX_TILE) -> Packed:
    """Put a condensed weight [out, in] into the order of the kernels. unpack() undoes it exactly.

    Args:
        weight: of a linear layer, with any fan-in; neurons that are ablated cost nothing but their bias.
        width: columns of a chunk, 1 to 65535; one byte a column up to 255.
        block_rows: about so many rows are a block, what threads share of one batch row.
        tile: at most so many vectors of batch rows are computed together, 1 to 3.

    Raises:
        FormatError: weight is not two-dimensional.
    """
    if len(weight.shape) != 2:
        raise FormatError(f"weight has shape {weight.shape}, expected [out, in]")
    (out, in_features), nnz = weight.shape, weight.nnz
    index = weight.dense_index().cpu()  # [nnz], ascending
    row, column = index // max(in_features, 1), index % max(in_features, 1)
    if width is None:
        width = default_width(max(weight.n_active, 1), in_features, nnz)
    chunks = max(1, math.ceil(in_features / width))
    blocks = max(1, 2 * round(out / block_rows / 2))  # even, so that none holds rows of both halves of a gated layer
    first = torch.arange(blocks + 1) * out // blocks  # [blocks + 1]

    # how many non-zeros each row has in each chunk, a run; runs in the order of the kernels
    chunk = column // width
    run = row * chunks + chunk
    counts = torch.bincount(run, minlength=out * chunks)
    begin = counts.cumsum(0) - counts  # of each run, among the non-zeros
    block_of_row = torch.bucketize(torch.arange(out), first[1:], right=True)
    segment = (block_of_row[:, None] * chunks + torch.arange(chunks)).flatten()  # of each run
    order = ((segment << 17) + counts).argsort(stable=True)

    # a group is the next four runs of a segment; the last one of a segment may have fewer
    in_segment = torch.bincount(segment, minlength=blocks * chunks)
    position = torch.arange(len(order)) - (in_segment.cumsum(0) - in_segment)[segment[order]]
    groups_in = -(-in_segment // _GROUP_ROWS)
    group = (groups_in.cumsum(0) - groups_in)[segment[order]] + position // _GROUP_ROWS  # of each run in order
    total = int(groups_in.sum())
    longest = torch.zeros(total, dtype=torch.int64).scatter_reduce_(0, group, counts[order], "amax")
    pairs = -(-longest // 2)
    start = _PAIR * (pairs.cumsum(0) - pairs)  # first entry of each group
    entries = _PAIR * int(pairs.sum())

    tall = first.diff()[torch.arange(blocks).repeat_interleave(chunks)]  # rows of each segment's block
    rows = tall.repeat_interleave(groups_in)[:, None].repeat(1, _GROUP_ROWS)
    rows[group, position % _GROUP_ROWS] = (torch.arange(out) - first[block_of_row]).repeat_interleave(chunks)[order]

    where = torch.empty(len(order), dtype=torch.int64)  # of each run: the first entry it fills
    where[order] = start[group] + position % _GROUP_ROWS
    entry = where[run] + _GROUP_ROWS * (torch.arange(nnz) - begin[run])

    kept = pairs > 0  # groups of empty runs need no visit
    kept_in = torch.zeros_like(in_segment).scatter_add_(0, torch.arange(len(in_segment)).repeat_interleave(groups_in), kept.long())
    entries_in = torch.zeros_like(in_segment).scatter_add_(
        0, torch.arange(len(in_segment)).repeat_interleave(groups_in), _PAIR * pairs
    )
    zero = torch.zeros(1, dtype=torch.int64)
    segments = torch.stack([torch.cat([zero, kept_in.cumsum(0)]), torch.cat([zero, entries_in.cumsum(0)])], 1)

    step = max(64, nnz // _SLACK // 64 * 64)
    capacity = -(-entries // step) * step
    column_dtype = torch.uint8 if width <= _NARROW else torch.uint16
    columns = torch.full((capacity,), width, dtype=torch.int32)
    columns[entry] = (column - chunk * width).to(torch.int32)
    values = weight.values.new_zeros(capacity)
    values[entry.to(values.device)] = weight.values.flatten()

    table = torch.cat([rows, pairs[:, None]], 1)[kept].to(torch.uint16)
    spare = table.new_zeros(total - len(table), table.shape[1])  # sizes depend on shapes, and little on the mask
    parts = [segments.to(torch.int32), torch.cat([table, spare]), columns.to(column_dtype)]
    structure, offsets = _join(parts)
    header = Header(
        *(VERSION, len(structure), out, in_features, nnz, width, column_dtype.itemsize, blocks, chunks, entries),
        *offsets,
        tile,
    )
    numbers = [getattr(header, name) for name in _FIELDS]
    structure[: 8 * len(numbers)] = torch.tensor(numbers).view(torch.uint8)
    return Packed(values, structure.to(values.device))


def _join(parts: list[Tensor]) -> tuple[Tensor, list[int]]:
    """The parts behind a header's place, each from a multiple of 64 bytes on, and where each begins."""
    offsets, end = [], _HEADER_BYTES
    for part in parts:
        offsets.append(end)
        end += -(-part.nbytes // 64) * 64
    joined = torch.zeros(end, dtype=torch.uint8)
    for part, offset in zip(parts, offsets, strict=True):
        joined[offset : offset + part.nbytes] = part.flatten().view(torch.uint8)
    return joined, offsets


def unpack(packed: Packed) -> CondensedWeight:
    """The condensed weight that was packed, bit for bit. FormatError if `packed.structure` is of another version."""
    header, index, entry = decode(packed.structure)
    values = packed.values[entry]
    rows = index // max(header.in_, 1)
    counts = torch.bincount(rows, minlength=header.out)
    columns = (index % max(header.in_, 1)).to(index_dtype(header.in_))
    active = counts.nonzero().flatten()
    counts, n = counts[active], len(active)
    row_ptr = None
    if n == 0 or bool((counts == counts[0]).all()):
        k = len(index) // max(n, 1)
        values, columns = values.view(n, k), columns.view(n, k)
    else:
        row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return CondensedWeight(
        values, columns, row_ptr, None if n == header.out else active.to(torch.int32), (header.out, header.in_)
    )


def decode(structure: Tensor) -> tuple[Header, Tensor, Tensor]:
    """What a structure says in plain tensors, on its device.

    Returns: the header; int64 [nnz], where each non-zero stands in the flattened dense weight, ascending; int64 [nnz],
        its entry in `values`.
    """
    header = Header.read(structure)
    count = header.blocks * header.chunks

    def part(at: int, length: int, dtype: torch.dtype) -> Tensor:
        return structure[at : at + length * dtype.itemsize].view(dtype).to(torch.int64)

    segments = part(header.segments_at, 2 * (count + 1), torch.int32).view(-1, 2)
    table = part(header.groups_at, int(segments[-1, 0]) * 5, torch.uint16).view(-1, 5)
    columns = part(header.columns_at, header.entries, torch.uint8 if header.column_bytes == 1 else torch.uint16)
    segment = torch.arange(count, device=structure.device).repeat_interleave(segments[:, 0].diff())  # of each group
    block, chunk = segment // header.chunks, segment % header.chunks
    rows = (block * header.out // header.blocks)[:, None] + table[:, :4]  # [groups, 4]
    group = torch.arange(len(table), device=structure.device).repeat_interleave(_PAIR * table[:, 4])  # of each entry
    used = (columns < header.width).nonzero().flatten()
    index = rows[group[used], used % _GROUP_ROWS] * header.in_ + chunk[group[used]] * header.width + columns[used]
    index, order = index.sort()
    return header, index, used[order]
