"""CondensedWeight: the layout, its exactness, its size, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile.condensed import CondensedWeight, index_dtype
from fanin_compile.errors import FormatError, MaskError
from tests.strategies import Masked, masked_weights

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

#          0    1    2    3    4
DENSE = [[0.0, 1.0, 0.0, 0.0, 2.0],
         [0.0, 0.0, 0.0, 0.0, 0.0],
         [3.0, 0.0, 4.0, 0.0, 0.0],
         [0.0, 0.0, 5.0, 6.0, 0.0]]  # fmt: skip


def condensed(**changes: Any) -> CondensedWeight:
    """DENSE condensed, with some parts replaced."""
    return dataclasses.replace(CondensedWeight.from_dense(torch.tensor(DENSE)), **changes)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Equal in shape, dtype and every bit: -0.0 is not 0.0, and NaN is NaN."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    as_int = BITS[want.element_size()]
    assert torch.equal(got.view(as_int), want.view(as_int))


def test_constant_fan_in_by_eye() -> None:
    c = condensed()
    assert c.values.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert c.indices.tolist() == [[1, 4], [0, 2], [2, 3]]
    assert c.rows is not None
    assert c.rows.tolist() == [0, 2, 3]
    assert c.row_ptr is None
    assert (c.fan_in, c.max_fan_in, c.n_active, c.n_ablated, c.nnz) == (2, 2, 3, 1, 6)
    assert c.sparsity == pytest.approx(14 / 20)
    assert c.dense_index().tolist() == [1, 4, 10, 12, 17, 18]
    assert c.to_dense().tolist() == DENSE


def test_ragged_by_eye() -> None:
    c = CondensedWeight.from_dense(torch.tensor([[7.0, 0.0, 0.0], [0.0, 0.0, 0.0], [8.0, 0.0, 9.0]]))
    assert c.values.tolist() == [7, 8, 9]
    assert c.indices.tolist() == [0, 0, 2]
    assert c.row_ptr is not None
    assert c.row_ptr.tolist() == [0, 1, 3]
    assert c.rows is not None
    assert c.rows.tolist() == [0, 2]
    assert (c.fan_in, c.max_fan_in, c.is_constant, c.n_ablated) == (None, 2, False, 1)
    assert c.row_fan_in().tolist() == [1, 2]
    assert c.to_dense().tolist() == [[7, 0, 0], [0, 0, 0], [8, 0, 9]]


def test_no_rows_tensor_when_every_neuron_is_active() -> None:
    assert CondensedWeight.from_dense(torch.eye(3)).rows is None


def test_a_conv_kernel_is_part_of_the_fan_in() -> None:
    weight = torch.zeros(2, 3, 1, 2)
    weight[0, 2, 0, 1] = 5.0  # column 2 * 2 + 1
    weight[1, 0, 0, 0] = 6.0
    c = CondensedWeight.from_dense(weight)
    assert (c.dense_fan_in, c.indices.tolist()) == (6, [[5], [0]])
    assert torch.equal(c.to_dense(), weight)


@settings(deadline=None, max_examples=150)
@given(masked_weights(dtypes=DTYPES))
def test_round_trip_is_exact(m: Masked) -> None:
    """The mask, and every bit of the weight (zeros, -0.0) inside it; the NaN outside never enters."""
    c = CondensedWeight.from_dense(m.weight, m.mask)
    assert_same_bits(c.to_dense(), m.effective)
    assert torch.equal(c.mask(), m.mask)
    assert c.shape == tuple(m.weight.shape)


@settings(deadline=None, max_examples=100)
@given(masked_weights())
def test_sizes_follow_from_the_mask(m: Masked) -> None:
    c = CondensedWeight.from_dense(m.weight, m.mask)
    counts = m.mask.flatten(1).sum(1)
    alive = counts[counts > 0]
    assert (c.n_active, c.n_ablated, c.nnz) == (len(alive), len(counts) - len(alive), int(counts.sum()))
    assert torch.equal(c.row_fan_in(), alive)
    assert c.max_fan_in == (int(alive.max()) if len(alive) else 0)
    assert c.is_constant == (len(set(alive.tolist())) <= 1)
    assert c.nnz == round((1 - c.sparsity) * m.mask.numel())
    assert c.nbytes == sum(t.numel() * t.element_size() for n, t in c.state().items() if n != "shape")
    assert c.dense_nbytes == m.weight.nbytes


@settings(deadline=None, max_examples=60)
@given(masked_weights(), st.permutations(range(5)))
def test_strides_do_not_matter(m: Masked, order: list[int]) -> None:
    dims = [d for d in order if d < m.weight.ndim]
    back = [dims.index(d) for d in range(len(dims))]
    weight, mask = (t.permute(dims).contiguous().permute(back) for t in m)
    assert torch.equal(CondensedWeight.from_dense(weight, mask).to_dense(), m.effective)


@settings(deadline=None, max_examples=60)
@given(masked_weights(dtypes=DTYPES))
def test_state_round_trip(m: Masked) -> None:
    c = CondensedWeight.from_dense(m.weight, m.mask)
    again = CondensedWeight.from_state(c.state())
    assert_same_bits(again.to_dense(), m.effective)
    assert (again.shape, again.is_constant, again.state().keys()) == (
        c.shape,
        c.is_constant,
        c.state().keys(),
    )


@pytest.mark.parametrize("columns", [256, 257, 65536, 65537])
def test_safetensors_keep_every_index_dtype(tmp_path: Path, columns: int) -> None:
    files = pytest.importorskip("safetensors.torch")
    weight = torch.zeros(3, columns)
    weight[0, -1], weight[2, 0] = 1.0, 2.0
    c = CondensedWeight.from_dense(weight)
    files.save_file(c.state(), tmp_path / "w.safetensors")
    again = CondensedWeight.from_state(files.load_file(tmp_path / "w.safetensors"))
    assert again.indices.dtype == index_dtype(columns)
    assert torch.equal(again.to_dense(), weight)


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (0, torch.uint8),
        (256, torch.uint8),
        (257, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
    ],
)
def test_the_smallest_index_dtype_that_reaches_the_last_column(columns: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(1, columns)
    weight[:, -1:] = 1.0
    c = CondensedWeight.from_dense(weight)
    assert c.indices.dtype == dtype
    assert torch.equal(c.to_dense(), weight)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (4, 0), (4, 5), (0, 3, 2, 2), (4, 3, 0)])
def test_weights_without_a_single_active_entry(shape: tuple[int, ...]) -> None:
    c = CondensedWeight.from_dense(torch.ones(shape), torch.zeros(shape, dtype=torch.bool))
    assert (c.n_active, c.n_ablated, c.nnz, c.fan_in, c.max_fan_in) == (0, shape[0], 0, 0, 0)
    assert torch.equal(c.to_dense(), torch.zeros(shape))
    assert c.sparsity == (1.0 if c.mask().numel() else 0.0)
    assert torch.equal(CondensedWeight.from_state(c.state()).to_dense(), c.to_dense())


def test_full_fan_in() -> None:
    weight = torch.arange(6.0).view(2, 3)
    c = CondensedWeight.from_dense(weight, torch.ones(2, 3))
    assert (c.fan_in, c.sparsity, c.rows) == (3, 0.0, None)
    assert torch.equal(c.values, weight)


# The four faults of the paper's code, as far as a weight alone can show them.


def test_a_live_neuron_whose_weights_sum_to_zero_is_alive() -> None:
    c = CondensedWeight.from_dense(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]))
    assert c.rows is not None
    assert c.rows.tolist() == [0]
    assert c.values.tolist() == [[1, -1]]


def test_a_neuron_whose_active_weights_are_all_zero_is_alive() -> None:
    c = CondensedWeight.from_dense(torch.zeros(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    assert (c.n_active, c.fan_in) == (1, 2)


def test_an_active_weight_of_exactly_zero_keeps_the_layout() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    c = CondensedWeight.from_dense(torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 3.0]]), mask)
    assert c.indices.tolist() == [[0, 1], [1, 2]]  # read from the non-zeros, row 0 would have fan-in 1
    assert c.values.tolist() == [[0, 1], [2, 3]]


def test_ablated_neurons_keep_their_place_in_the_output() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])
    c = CondensedWeight.from_dense(weight)
    assert (c.n_active, c.out_features, c.shape) == (1, 3, (3, 2))
    assert torch.equal(c.to_dense(), weight)


def test_values_may_be_narrower_than_the_weight() -> None:
    weight = torch.tensor([[1e-30, 1.0], [0.0, 0.0]])
    c = CondensedWeight.from_dense(weight, values_dtype=torch.float16)
    assert c.values.tolist() == [[0, 1]]  # 1e-30 underflows and stays active
    assert torch.equal(c.mask(), weight != 0)
    assert c.to_dense(torch.float32).dtype == torch.float32


def test_new_values_fit_the_same_structure() -> None:
    c = condensed()
    weight = torch.rand(4, 5)
    again = dataclasses.replace(c, values=weight.flatten()[c.dense_index()].view_as(c.values))
    assert torch.equal(again.to_dense(), weight * c.mask())


def test_condensing_copies_and_detaches() -> None:
    weight = torch.nn.Parameter(torch.eye(3))
    c = CondensedWeight.from_dense(weight)
    with torch.no_grad():
        weight.zero_()
    assert not c.values.requires_grad
    assert torch.equal(c.to_dense(), torch.eye(3))


def test_prints_as_a_person_would_write_it() -> None:
    weight = torch.zeros(768, 3072)
    weight[12:, :307] = 1.0
    text = "CondensedWeight(768x3072, fan-in 307, 90.2 % sparse, 12 ablated, 1.4 MB of 9.4 MB)"
    assert str(CondensedWeight.from_dense(weight)) == text
    weight[0, :2] = 1.0
    assert "fan-in 2 to 307" in str(CondensedWeight.from_dense(weight))
    assert str(CondensedWeight.from_dense(torch.eye(4))) == (
        "CondensedWeight(4x4, fan-in 1, 75.0 % sparse, 20 B of 64 B)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (4,)}, r"shape is \(4,\)"),
        ({"shape": (-4, 5)}, "none negative"),
        ({"shape": (4, 257)}, r"indices.dtype is torch.uint8, expected torch.uint16"),
        ({"shape": (4, 4)}, "indices run from 0 to 4, expected within 0 to 3"),
        ({"shape": (3, 5)}, "rows has 3 entries of 3 rows"),
        ({"indices": torch.zeros(3, 3, dtype=torch.uint8)}, r"indices.shape is \(3, 3\), expected \(3, 2\)"),
        ({"indices": torch.tensor([[1, 4], [2, 0], [2, 3]]).byte()}, "has 12 before 10 at 2"),
        ({"indices": torch.tensor([[1, 4], [2, 2], [2, 3]]).byte()}, "has 12 before 12 at 2"),
        ({"values": torch.ones(2, 3).t()}, r"values.is_contiguous\(\) is False"),
        ({"values": torch.ones(3, 2, device="meta")}, "indices.device is cpu, expected meta"),
        ({"rows": None}, r"len\(values\) is 3, expected 4"),
        ({"rows": torch.tensor([0, 2, 3])}, "rows.dtype is torch.int64, expected torch.int32"),
        ({"rows": torch.tensor([[0, 2, 3]]).int()}, "rows.ndim is 2, expected 1"),
        ({"rows": torch.tensor([0, 3, 2]).int()}, "rows has 3 before 2 at 1"),
        ({"rows": torch.tensor([-1, 2, 3]).int()}, "rows runs from -1 to 3, expected within 0 to 3"),
        ({"rows": torch.tensor([0, 2, 4]).int()}, "rows runs from 0 to 4, expected within 0 to 3"),
        ({"row_ptr": torch.zeros(4, dtype=torch.int32)}, "values.ndim is 2, expected 1"),
    ],
)
def test_refuses_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        condensed(**changes)


@pytest.mark.parametrize(
    ("row_ptr", "message"),
    [
        ([0, 2, 4, 6], None),
        ([0, 2, 4, 6, 6], r"row_ptr.shape is \(5,\), expected \(4,\)"),
        ([1, 2, 4, 6], r"row_ptr\[0\] is 1, expected 0"),
        ([0, 2, 4, 7], r"row_ptr\[-1\] is 7, expected 6"),
        ([0, 2, 2, 6], "row_ptr has a row of fan-in 0"),
        ([0, 7, 4, 6], "row_ptr has a row of fan-in -3"),
    ],
)
def test_refuses_row_pointers_that_do_not_fit(row_ptr: list[int], message: str | None) -> None:
    c = condensed()
    parts = (c.values.flatten(), c.indices.flatten(), torch.tensor(row_ptr).int(), c.rows, c.shape)
    if message is None:
        assert torch.equal(CondensedWeight(*parts).to_dense(), c.to_dense())
    else:
        with pytest.raises(FormatError, match=message):
            CondensedWeight(*parts)


def test_refuses_row_pointers_of_another_dtype() -> None:
    c = condensed()
    with pytest.raises(FormatError, match=r"row_ptr.dtype is torch.int64, expected torch.int32"):
        CondensedWeight(c.values.flatten(), c.indices.flatten(), torch.tensor([0, 2, 4, 6]), c.rows, c.shape)


def test_refuses_active_rows_without_inputs() -> None:
    with pytest.raises(FormatError, match="fan-in is 0 for 2 active rows"):
        CondensedWeight(torch.empty(2, 0), torch.empty(2, 0, dtype=torch.uint8), None, None, (2, 3))


def test_refuses_negative_int32_columns() -> None:
    c = CondensedWeight.from_dense(torch.ones(1, 2**16 + 1))
    c.indices[0, 0] = -1
    with pytest.raises(FormatError, match="indices run from -1 to 65536"):
        CondensedWeight.from_state(c.state())


def test_refuses_states_with_missing_or_unknown_entries() -> None:
    state = condensed().state()
    with pytest.raises(FormatError, match=r"state lacks \['indices', 'shape'\]"):
        CondensedWeight.from_state({"values": state["values"]})
    with pytest.raises(FormatError, match=r"unknown entries \['bias'\]"):
        CondensedWeight.from_state(state | {"bias": torch.zeros(4)})


def test_refuses_vectors_and_masks_of_another_shape() -> None:
    with pytest.raises(FormatError, match=r"weight has shape \(3,\)"):
        CondensedWeight.from_dense(torch.ones(3))
    with pytest.raises(MaskError, match=r"mask has shape \(2, 4\), expected that of its weight, \(2, 3\)"):
        CondensedWeight.from_dense(torch.ones(2, 3), torch.ones(2, 4))
