"""CondensedWeight: a sparse weight as the values and columns of its active inputs, row by row.

    dense [4, 5]              values      indices     rows
    [ 0  a  0  0  b ]         [[a, b],    [[1, 4],    [0,
    [ 0  0  0  0  0 ]    <->
    [ c  0  d  0  0 ]          [c, d],     [0, 2],     2,
    [ 0  0  e  f  0 ]          [e, f]]     [2, 3]]     3]

This is the condensed form of constant fan-in sparsity (Lasby et al. 2024, arXiv 2305.02299) with ablated
neurons left out; rows of unequal fan-in are kept end to end, as in CSR.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import FormatError
from .mask import check_mask, fan_in

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False, repr=False)
class CondensedWeight:
    """The active inputs of every active neuron; to_dense() and mask() undo from_dense() exactly.

    Attributes:
        values: [n, k] at constant fan-in k, or [nnz] with the rows end to end (ragged).
        indices: columns in the flattened dense fan-in, shape of values, ascending in each row; uint8, uint16
            or int32 by index_dtype.
        row_ptr: int32 [n + 1] if ragged: row i is values[row_ptr[i] : row_ptr[i + 1]]; None at constant
            fan-in.
        rows: int32 [n], the output row of each condensed row, ascending; None if no neuron is ablated.
        shape: of the dense weight, (out, in/groups, *kernel).

    Raises:
        FormatError: parts that do not fit together. Every index is checked, so that kernels need not.
    """

    values: Tensor
    indices: Tensor
    row_ptr: Tensor | None
    rows: Tensor | None
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def from_dense(
        cls, weight: Tensor, mask: Tensor | None = None, *, values_dtype: torch.dtype | None = None
    ) -> CondensedWeight:
        """Condense a dense weight [out, in/groups, *kernel]; ragged only if active neurons differ in fan-in.

        Args:
            weight: any dtype and strides; read inside the mask only, and copied.
            mask: same shape, see check_mask. Without one, non-zeros (and NaN) are active.
            values_dtype: of the stored values, the weight's by default.

        Raises:
            MaskError: see check_mask.
            FormatError: fewer than 2 dimensions, or more entries than int32 can count.
        """
        if weight.ndim < 2:
            raise FormatError(
                f"weight has shape {tuple(weight.shape)}, expected at least 2 dimensions [out, in, ...]"
            )
        weight = weight.detach()
        active = weight != 0 if mask is None else check_mask(mask, weight)
        dense_fan_in = math.prod(weight.shape[1:])

        counts = fan_in(active)  # [out]
        rows = counts.nonzero().flatten()  # [n]
        counts = counts[rows]
        where = active.flatten().nonzero().flatten()  # [nnz], ascending: row by row, columns ascending
        if max(len(where), dense_fan_in) > _INT32_MAX:
            raise FormatError(
                f"weight has {len(where)} active entries, rows of {dense_fan_in}; expected below 2**31"
            )
        values = weight.flatten()[where].to(values_dtype or weight.dtype)
        columns = where - (rows * dense_fan_in).repeat_interleave(counts, output_size=len(where))
        indices = columns.to(index_dtype(dense_fan_in))

        return cls.of_rows(values, indices, counts, rows, tuple(weight.shape))

    @classmethod
    def stack(cls, weights: Sequence[CondensedWeight]) -> CondensedWeight:
        """The neurons of several weights that read the same inputs, one weight's after another's.

        Raises:
            FormatError: no weight, or they differ in dtype or in their inputs.
        """
        kinds = {(w.shape[1:], w.values.dtype) for w in weights}
        if len(kinds) != 1:
            raise FormatError(f"weights have inputs and dtypes {kinds}, expected one kind of each")
        counts = torch.cat([w.row_fan_in() for w in weights])
        values = torch.cat([w.values.flatten() for w in weights])
        indices = torch.cat([w.indices.flatten() for w in weights])
        shape = (sum(w.out_features for w in weights), *weights[0].shape[1:])
        before = itertools.accumulate((w.out_features for w in weights), initial=0)
        rows = torch.cat([w._rows() + start for w, start in zip(weights, before, strict=False)])
        return cls.of_rows(values, indices, counts, rows, shape)

    @classmethod
    def of_rows(
        cls, values: Tensor, indices: Tensor, counts: Tensor, rows: Tensor, shape: tuple[int, ...]
    ) -> CondensedWeight:
        """Rows end to end, none of them empty: [nnz] values and columns, [n] fan-ins and output rows."""
        n, row_ptr = len(rows), None
        if n == 0 or bool((counts == counts[0]).all()):
            k = len(values) // max(n, 1)
            values, indices = values.view(n, k), indices.view(n, k)
        else:
            row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return cls(values, indices, row_ptr, None if n == shape[0] else rows.to(torch.int32), shape)

    @classmethod
    def at(cls, values: Tensor, index: Tensor, shape: tuple[int, ...]) -> CondensedWeight:
        """Values [nnz] that stand at `index`, int64 [nnz] ascending, in the flattened dense weight of `shape`."""
        dense_fan_in = math.prod(shape[1:])
        columns = (index % max(dense_fan_in, 1)).to(index_dtype(dense_fan_in))
        counts = torch.bincount(index // max(dense_fan_in, 1), minlength=shape[0])
        active = counts.nonzero().flatten()
        return cls.of_rows(values, columns, counts[active], active, shape)

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight of `shape`, 0 outside the mask; values keep their bits (-0.0, NaN)."""
        dense = self.values.new_zeros(math.prod(self.shape), dtype=dtype or self.values.dtype)
        dense[self.dense_index()] = self.values.flatten().to(dense.dtype)
        return dense.view(self.shape)

    def mask(self) -> Tensor:
        """bool of `shape`, True = active; active weights that are 0 included."""
        mask = self.values.new_zeros(math.prod(self.shape), dtype=torch.bool)
        mask[self.dense_index()] = True
        return mask.view(self.shape)

    def with_dtype(self, dtype: torch.dtype | None) -> CondensedWeight:
        """The same weight with its values stored as `dtype`; None keeps theirs."""
        return self if dtype in (None, self.values.dtype) else replace(self, values=self.values.to(dtype))

    def scaled(self, factors: Tensor) -> CondensedWeight:
        """Each row times its factor [out], in float64, rounded once; the structure is untouched, so a factor of 0
        keeps its row."""
        rows = factors if self.rows is None else factors[self.rows.long()]
        each = rows.repeat_interleave(self.row_fan_in(), output_size=self.nnz).view_as(self.values)
        return replace(self, values=(self.values.double() * each).to(self.values.dtype))

    def dense_index(self) -> Tensor:
        """int64 [nnz]: where each value stands in the flattened dense weight, ascending.

        `weight.flatten()[c.dense_index()].view_as(c.values)` packs new values into the same structure.
        """
        rows = self._rows().repeat_interleave(self.row_fan_in(), output_size=self.nnz)
        return rows * self.dense_fan_in + self.indices.flatten().to(torch.int64)

    def row_fan_in(self) -> Tensor:
        """Active inputs of each active neuron, int64 [n]."""
        if self.row_ptr is None:
            return torch.full((self.n_active,), self.values.shape[1], device=self.values.device)
        return self.row_ptr.to(torch.int64).diff()

    def _rows(self) -> Tensor:
        if self.rows is None:
            return torch.arange(self.out_features, device=self.values.device)
        return self.rows.to(torch.int64)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def dense_fan_in(self) -> int:
        """Inputs of a neuron before sparsity: in/groups times the kernel's size."""
        return math.prod(self.shape[1:])

    @property
    def n_active(self) -> int:
        return self.out_features if self.rows is None else len(self.rows)

    @property
    def n_ablated(self) -> int:
        """Neurons without a single active input."""
        return self.out_features - self.n_active

    @property
    def is_constant(self) -> bool:
        """All active neurons have the same fan-in, and values is [n, k]."""
        return self.row_ptr is None

    @property
    def fan_in(self) -> int | None:
        """k at constant fan-in (0 if every neuron is ablated), None if ragged."""
        return self.values.shape[1] if self.is_constant else None

    @property
    def max_fan_in(self) -> int:
        k = self.fan_in
        return int(self.row_fan_in().max()) if k is None else k

    @property
    def nnz(self) -> int:
        """Active entries, whether or not their value is 0."""
        return self.values.numel()

    @property
    def sparsity(self) -> float:
        """Share of inactive entries, 0 to 1; 0 for a weight without entries."""
        entries = math.prod(self.shape)
        return 1 - self.nnz / entries if entries else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all parts: values, indices, row_ptr, rows."""
        return sum(t.nbytes for t in (self.values, self.indices, self.row_ptr, self.rows) if t is not None)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight in the dtype of the values."""
        return math.prod(self.shape) * self.values.element_size()

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, for safetensors too; row_ptr and rows only where they exist, shape as int64."""
        parts = {"values": self.values, "indices": self.indices, "row_ptr": self.row_ptr, "rows": self.rows}
        state = {name: t for name, t in parts.items() if t is not None}
        return state | {"shape": torch.tensor(self.shape, dtype=torch.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> CondensedWeight:
        """The inverse of state(); checks everything, so a damaged or hostile file is a FormatError."""
        required, optional = {"values", "indices", "shape"}, {"row_ptr", "rows"}
        if missing := required - state.keys():
            raise FormatError(f"state lacks {sorted(missing)}, it has {sorted(state)}")
        if unknown := state.keys() - required - optional:
            raise FormatError(
                f"state has unknown entries {sorted(unknown)}, expected {sorted(required | optional)}"
            )
        shape = tuple(int(d) for d in state["shape"].flatten().tolist())
        return cls(state["values"], state["indices"], state.get("row_ptr"), state.get("rows"), shape)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        k = self.fan_in
        fan = (
            f"fan-in {k}" if k is not None else f"fan-in {int(self.row_fan_in().min())} to {self.max_fan_in}"
        )
        ablated = f", {self.n_ablated} ablated" if self.n_ablated else ""
        size = f"{_bytes(self.nbytes)} of {_bytes(self.dense_nbytes)}"
        return f"CondensedWeight({shape}, {fan}, {100 * self.sparsity:.1f} % sparse{ablated}, {size})"


def index_dtype(dense_fan_in: int) -> torch.dtype:
    """The smallest dtype that holds every column below `dense_fan_in`: uint8, uint16 or int32."""
    if dense_fan_in <= 2**8:
        return torch.uint8
    return torch.uint16 if dense_fan_in <= 2**16 else torch.int32


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def _check(c: CondensedWeight) -> None:
    if len(c.shape) < 2 or min(c.shape) < 0:
        raise FormatError(f"shape is {c.shape}, expected (out, in/groups, *kernel), none negative")
    n = c.n_active
    _expect("indices.dtype", c.indices.dtype, index_dtype(c.dense_fan_in))
    _expect("indices.shape", tuple(c.indices.shape), tuple(c.values.shape))
    _expect("values.ndim", c.values.ndim, 2 if c.row_ptr is None else 1)
    for name, part in (
        ("values", c.values),
        ("indices", c.indices),
        ("row_ptr", c.row_ptr),
        ("rows", c.rows),
    ):
        if part is not None:
            _expect(f"{name}.is_contiguous()", part.is_contiguous(), True)
            _expect(f"{name}.device", part.device, c.values.device)
    if c.rows is not None:
        _expect("rows.dtype", c.rows.dtype, torch.int32)
        _expect("rows.ndim", c.rows.ndim, 1)
        if n >= c.out_features:
            raise FormatError(
                f"rows has {n} entries of {c.out_features} rows, expected fewer, or None for all of them"
            )
        _ascending("rows", c.rows.to(torch.int64), c.out_features)
    if c.row_ptr is None:
        _expect("len(values)", len(c.values), n)
        if n and c.values.shape[1] == 0:
            raise FormatError(
                f"fan-in is 0 for {n} active rows, expected at least 1: ablated rows are left out"
            )
    else:
        _expect("row_ptr.dtype", c.row_ptr.dtype, torch.int32)
        _expect("row_ptr.shape", tuple(c.row_ptr.shape), (n + 1,))
        _expect("row_ptr[0]", int(c.row_ptr[0]), 0)
        _expect("row_ptr[-1]", int(c.row_ptr[-1]), c.nnz)
        if not bool((c.row_fan_in() > 0).all()):
            raise FormatError(
                f"row_ptr has a row of fan-in {int(c.row_fan_in().min())}, expected at least 1 everywhere"
            )
    columns = c.indices.flatten().to(torch.int32)
    if c.nnz and (int(columns.min()) < 0 or int(columns.max()) >= c.dense_fan_in):
        raise FormatError(
            f"indices run from {int(columns.min())} to {int(columns.max())}, "
            f"expected within 0 to {c.dense_fan_in - 1}"
        )
    # Rows ascend and columns are in range, so positions ascend if and only if columns do within each row.
    _ascending("indices (as positions in the dense weight)", c.dense_index(), math.prod(c.shape))


def _expect(what: str, value: object, expected: object) -> None:
    if value != expected:
        raise FormatError(f"{what} is {value}, expected {expected}")


def _ascending(what: str, t: Tensor, end: int) -> None:
    """int64 [m], each greater than the one before, all in [0, end)."""
    if len(t) and not (int(t[0]) >= 0 and int(t[-1]) < end):
        raise FormatError(f"{what} runs from {int(t[0])} to {int(t[-1])}, expected within 0 to {end - 1}")
    falls = (t.diff() <= 0).nonzero().flatten()
    if len(falls):
        i = int(falls[0])
        raise FormatError(f"{what} has {int(t[i])} before {int(t[i + 1])} at {i}, expected them to ascend")
