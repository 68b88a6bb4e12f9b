"""What a Watch sees, and what only refresh() or contents=True does; see test_backend_freshness for the whole way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fanin_compile import freshness
from fanin_compile.freshness import Watch, refresh, watch_fused_optimizers
from tests.compile_support import randn


def _args() -> list[object]:
    return [randn(2, 3), nn.Parameter(randn(4, 4)), "text", nn.Parameter(randn(4))]


def test_unchanged_is_fresh_and_other_arguments_play_no_part() -> None:
    args = _args()
    watch = Watch((1, 3), args)
    args[0], args[2] = randn(5, 3), "other"
    assert watch.fresh(args)


SEEN: dict[str, Callable[[nn.Parameter], object]] = {
    "other object": lambda p: nn.Parameter(p.detach().clone()),
    "same storage, other object": lambda p: nn.Parameter(p.detach()),
    ".data =": lambda p: setattr(p, "data", p.detach().clone()),
    "in place": lambda p: p.detach().mul_(1.0),
    "swapped": lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone())),
}


@pytest.mark.parametrize("change", SEEN)
def test_changes_are_seen_and_renew_forgets_them(change: str) -> None:
    args = _args()
    watch = Watch((1, 3), args)
    parameter = args[3]
    assert isinstance(parameter, nn.Parameter)
    new = SEEN[change](parameter)
    if isinstance(new, nn.Parameter):
        args[3] = new
    assert not watch.fresh(args)
    watch.renew((1, 3), args)
    assert watch.fresh(args)


def test_a_witness_speaks_for_what_nothing_counts() -> None:
    norm = nn.BatchNorm1d(4)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    args = [norm.running_mean]
    blind, watch = Watch((0,), args), Watch((0,), args, witnesses=[norm.num_batches_tracked])
    norm(randn(5, 4))
    assert (blind.fresh(args), watch.fresh(args)) == (True, False)
    watch.renew((0,), args)
    assert watch.fresh(args)


def test_refresh_makes_every_watch_stale_once() -> None:
    args = _args()
    watches = [Watch((i,), args) for i in (1, 3)]
    refresh()
    assert [watch.fresh(args) for watch in watches] == [False, False]
    for watch, i in zip(watches, (1, 3), strict=True):
        watch.renew((i,), args)
    assert [watch.fresh(args) for watch in watches] == [True, True]


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    st.integers(0, 2**31 - 1),
    st.booleans(),
)
def test_contents_tells_any_two_contents_apart(dtype: torch.dtype, seed: int, transposed: bool) -> None:
    weight = randn(6, 5, seed=seed).to(dtype)
    weight = weight.t() if transposed else weight
    args = [weight]
    watch = Watch((0,), args, contents=True)
    assert watch.fresh(args)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(30, generator=generator)
    writes: tuple[Callable[[Tensor], object], ...] = (
        lambda t: t.data.neg_(),
        lambda t: t.data.copy_(t.reshape(-1)[order].view(t.shape)),
        lambda t: t.data[0, 0].add_(1),
    )
    for write in writes:
        before = weight.clone()
        write(weight)
        assert watch.fresh(args) == torch.equal(weight, before)
        watch.renew((0,), args)


def test_without_contents_such_writes_go_unseen() -> None:
    args = [randn(6, 5)]
    watch = Watch((0,), args)
    args[0].data.neg_()
    assert watch.fresh(args)  # hence refresh()


def test_steps_of_fused_optimizers_are_counted_once() -> None:
    watch_fused_optimizers()
    watch_fused_optimizers()
    parameter = nn.Parameter(randn(4))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    parameter.square().sum().backward()
    before = parameter._version
    optimizer.step()
    assert parameter._version > before


def test_hashing_reads_strided_and_empty_tensors() -> None:
    hashes: set[bytes] = set()
    tensors: list[Tensor] = [torch.empty(0), randn(4, 4), randn(4, 4).t(), randn(4, 4)[:, ::2]]
    for tensor in tensors:
        hashes.add(freshness._hash(tensor))
    assert len(hashes) == len(tensors)
