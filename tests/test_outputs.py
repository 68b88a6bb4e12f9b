"""Memory of large outputs: used again, bounded, given back when asked for."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from fanin_compile import ops
from fanin_compile.condensed import CondensedWeight
from fanin_compile.packing import pack

from .compile_support import sparse_weight

WEIGHT = CondensedWeight.from_dense(sparse_weight(256, 64, 6))
PACKED = pack(WEIGHT)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    assert ops.native_available()
    ops.release_outputs()
    assert ops.kept_output_nbytes() == 0


def call(mib: int) -> Tensor:
    """An output of so many MiB."""
    return ops.gather_matmul(torch.randn(mib * 1024, 64), PACKED.values, PACKED.structure, None, 256)


def test_freed_memory_is_used_again_and_holds_what_the_next_call_computes() -> None:
    first = call(2)
    address, copy = first.data_ptr(), first.clone()
    del first
    assert ops.kept_output_nbytes() == 2 * MIB
    x = torch.randn(2 * 1024, 64)
    again = ops.gather_matmul(x, PACKED.values, PACKED.structure, None, 256)
    assert again.data_ptr() == address
    assert not torch.equal(again, copy)
    torch.testing.assert_close(
        again.double(), x.double() @ WEIGHT.to_dense().double().t(), rtol=1e-4, atol=1e-4
    )
    assert ops.kept_output_nbytes() == 0


def test_outputs_alive_at_one_time_never_share_memory() -> None:
    outputs = [call(1) for _ in range(4)]
    copies = [y.clone() for y in outputs]
    spans = sorted((y.data_ptr(), y.data_ptr() + y.nbytes) for y in outputs)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    del outputs[::2]
    call(1)
    assert torch.equal(outputs[0], copies[1])
    assert torch.equal(outputs[1], copies[3])


def test_no_more_is_kept_than_half_as_much_again_as_was_in_use_at_one_time() -> None:
    for mib in (1, 2, 3, 5, 8, 4, 7):
        call(mib)
        assert ops.kept_output_nbytes() <= 12 * MIB
    y, z = call(6), call(6)
    del y, z
    assert 6 * MIB <= ops.kept_output_nbytes() <= 18 * MIB
    ops.release_outputs()
    assert ops.kept_output_nbytes() == 0


def test_the_smallest_block_that_is_large_enough_is_taken() -> None:
    large, small = call(8), call(2)
    addresses = large.data_ptr(), small.data_ptr()
    del large, small
    first = call(1)
    assert first.data_ptr() == addresses[1]
    second = call(1)
    assert second.data_ptr() == addresses[0]
    del first, second


def test_a_large_block_stays_though_a_smaller_one_serves_less_than_it_could() -> None:
    call(3)
    large, small = call(8), call(2)  # the latter in the memory of the first
    address = large.data_ptr()
    del large
    assert ops.kept_output_nbytes() == 8 * MIB
    assert call(8).data_ptr() == address
    del small


def test_small_outputs_are_not_served_from_it() -> None:
    call(2)
    before = ops.kept_output_nbytes()
    small = ops.gather_matmul(torch.randn(127, 64), PACKED.values, PACKED.structure, None, 256)
    assert ops.kept_output_nbytes() == before
    larger = ops.gather_matmul(torch.randn(128, 64), PACKED.values, PACKED.structure, None, 256)
    assert ops.kept_output_nbytes() == 0
    assert small.nbytes < 128 << 10 == larger.nbytes


def test_views_keep_their_memory_and_threads_do_not_disturb_each_other() -> None:
    row = call(2)[5:6]
    copy = row.clone()

    def work(seed: int) -> bool:
        x = torch.randn(1024, 64, generator=torch.Generator().manual_seed(seed))
        expected = ops.gather_matmul(x, PACKED.values, PACKED.structure, None, 256).clone()
        return all(
            torch.equal(ops.gather_matmul(x, PACKED.values, PACKED.structure, None, 256), expected)
            for _ in range(20)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert torch.equal(row, copy)
