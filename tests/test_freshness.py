"""What a Watch sees, and what only refresh() or contents=True does; see test_backend_freshness for the whole way."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fanin_compile import freshness
from fanin_compile.freshness import Watch, refresh, watch_fused_optimizers
from fanin_compile.kernels import build
from tests.compile_support import randn

Args = tuple[Any, ...]


@pytest.fixture(params=["native", "python"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test runs with the native comparison and with the one for machines without it."""
    if request.param == "native":
        build.load()
        assert build.python_library() is not None
    else:
        monkeypatch.setattr(build, "python_library", lambda: None)
    return str(request.param)


def _args() -> Args:
    return randn(2, 3), nn.Parameter(randn(4, 4)), "text", nn.Parameter(randn(4, 4))


def test_unchanged_is_fresh_and_other_arguments_play_no_part() -> None:
    args = _args()
    watch = Watch((1, 3), args)
    assert watch.fresh((randn(5, 3), args[1], "other", args[3]))
    assert not watch.fresh((args[0], args[3], args[2], args[1]))


SEEN: dict[str, Callable[[nn.Parameter], object]] = {
    "other object": lambda p: nn.Parameter(p.detach().clone()),
    "same storage, other object": lambda p: nn.Parameter(p.detach()),
    ".data =": lambda p: setattr(p, "data", p.detach().clone()),
    "in place": lambda p: p.detach().mul_(1.0),
    "swapped": lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone())),
    # of these, the storage stays and nothing is counted
    "transposed": lambda p: setattr(p, "data", p.detach().t()),
    "another shape": lambda p: setattr(p, "data", p.detach().view(2, 8)),
    "another dtype": lambda p: setattr(p, "data", p.detach().view(torch.int32).view(torch.float16)),
    "another class": lambda p: setattr(p, "__class__", type("Mine", (nn.Parameter,), {})),
    "negated view": lambda p: setattr(p, "data", torch._neg_view(p.detach())),
}
KEEPS_KIND = ("other object", "same storage, other object", ".data =", "in place", "swapped")


@pytest.mark.parametrize("change", SEEN)
def test_changes_are_seen_and_renew_forgets_them(change: str) -> None:
    args = _args()
    watch = Watch((1, 3), args)
    parameter = args[3]
    new = SEEN[change](parameter)
    if isinstance(new, nn.Parameter):
        args = (*args[:3], new)
    assert not watch.fresh(args)
    assert watch.same_kind(args) == (change in KEEPS_KIND)
    watch.renew((1, 3), args)
    assert watch.fresh(args)


def test_a_layout_of_objects_that_the_kernels_do_not_expect_is_left_to_python(way: str) -> None:
    library = build.python_library()
    if library is None:
        assert way == "python"
        pytest.skip("of the native walk")
    tensor, buffer = randn(3), (ctypes.c_int64 * 200)()
    assert library.fanin_state(tensor, tensor._cdata + 8, buffer, 200) == 0
    assert library.fanin_state(tensor, tensor._cdata, buffer, 200) == 8 + 2


def test_addresses_that_come_back_do_not_deceive() -> None:
    parameter = nn.Parameter(randn(4, 4))
    for _ in range(50):
        watch = Watch((0,), (parameter,))
        for _ in range(
            2
        ):  # the first one's tensor and data are freed; the second may be given their addresses
            torch.utils.swap_tensors(parameter, nn.Parameter(randn(4, 4)))
            gc.collect(0)
        assert not watch.fresh((parameter,))


def test_memory_of_weights_that_have_other_by_now_is_free() -> None:
    args = _args()
    watch = Watch((3,), args)
    freed: list[bool] = []
    weakref.finalize(args[3].untyped_storage(), freed.append, True)
    args[3].data = randn(4, 4)
    assert freed
    assert not watch.fresh(args)


def test_a_witness_speaks_for_what_nothing_counts() -> None:
    norm = nn.BatchNorm1d(4)
    assert norm.running_mean is not None
    assert norm.num_batches_tracked is not None
    args = (norm.running_mean,)
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
    args = (weight,)
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
    args = (randn(6, 5),)
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
