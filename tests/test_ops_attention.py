"""The attention operators as PyTorch sees them: schemas, fake kernels, gradients, dtypes, tracing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from fanin_compile.ops_attention import (
    append_attend,
    attend_appended,
    attend_cache,
    reference_append_attend,
    reference_attend_cache,
    reference_write_attend,
    write_attend,
)

from .helpers import assert_close_at_scale

OPS = (torch.ops.fanin.attend_appended.default, torch.ops.fanin.append_attend.default)
CACHE = torch.ops.fanin.attend_cache.default
WRITE = torch.ops.fanin.write_attend.default


def arguments(
    *, past: int = 5, group: int = 1, mask: str = "", dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Any]:
    """Two heads of two images, new keys and values as parts of something packed."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(2, 1, (group + 2) * 2 * 6, generator=generator).to(dtype)
    query, keys, values = (
        part.unflatten(2, (-1, 6)).transpose(1, 2) for part in packed.split([group * 12, 12, 12], 2)
    )
    past_keys, past_values = (torch.randn(2, 2, past, 6, generator=generator).to(dtype) for _ in range(2))
    hidden = torch.rand(2, 1, 1, past + 1, generator=generator) < 0.3
    given = {"": None, "bool": ~hidden, "float": torch.randn(hidden.shape, generator=generator).to(dtype)}
    return [query, past_keys, keys, past_values, values, given[mask], 0.4]


def on_cache(arguments: list[Any]) -> list[Any]:
    """The arguments of attend_cache where those of attend_appended are given."""
    query, past_keys, keys, past_values, values, *others = arguments
    return [query, torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2), *others]


@pytest.mark.parametrize("op", [*OPS, CACHE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("past", "group", "mask"), [(5, 1, ""), (0, 2, "bool"), (7, 1, "float")])
def test_opcheck(op: Any, dtype: torch.dtype, past: int, group: int, mask: str) -> None:
    args = arguments(past=past, group=group, mask=mask, dtype=dtype)
    args = on_cache(args) if op is CACHE else args
    torch.library.opcheck(op, tuple(args))
    args = [
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    torch.library.opcheck(op, tuple(args))


def written(arguments: list[Any]) -> list[Any]:
    """The arguments of write_attend: the new keys and values once more, to the first row of the cache."""
    _, _, keys, _, values, *_ = arguments
    query, *cache, mask, scale = on_cache(arguments)
    return [query, *cache, keys.clone(), values.clone(), torch.tensor([0]), mask, scale]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("group", "mask"), [(1, ""), (2, "bool"), (1, "float")])
def test_writing_opcheck(dtype: torch.dtype, group: int, mask: str) -> None:
    args = written(arguments(group=group, mask=mask, dtype=dtype))
    torch.library.opcheck(WRITE, tuple(args))
    ours, theirs = (copy.deepcopy(args) for _ in range(2))
    assert_close_at_scale(write_attend(*ours), reference_write_attend(*theirs))
    assert_close_at_scale(ours[1:3], theirs[1:3])


def test_gradients_come_through_what_was_written() -> None:
    query, keys, values, new_keys, new_values, *rest = written(arguments())
    leaves = [t.detach().clone().requires_grad_() for t in (query, new_keys, new_values)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: write_attend(q, keys.clone(), values.clone(), k, v, *rest), leaves
    )


@pytest.mark.parametrize(("group", "mask"), [(1, ""), (2, "bool"), (1, "float")])
def test_gradients_agree_with_finite_differences(group: int, mask: str) -> None:
    *tensors, given, scale = arguments(group=group, mask=mask)
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    for op in OPS:
        assert torch.autograd.gradcheck(lambda *t, op=op: op(*t, given, scale), tensors)
    whole = [t.detach().requires_grad_() for t in on_cache(tensors)]
    assert torch.autograd.gradcheck(lambda *t: CACHE(*t, given, scale), whole)


def test_gradients_of_the_native_kernel_are_those_of_torch() -> None:
    *tensors, mask, scale = arguments(dtype=torch.float32, mask="float")
    tensors = [t.detach().clone().requires_grad_() for t in (*tensors, mask)]
    reference: Any = reference_append_attend
    outputs = OPS[1](*tensors, scale)
    exact = reference(*(t.double() for t in tensors), scale)
    assert_close_at_scale(outputs, exact)
    ours, theirs = (
        torch.autograd.grad(torch.stack([y.square().sum() for y in ys]).sum(), tensors)
        for ys in (outputs, exact)
    )
    assert_close_at_scale(ours, theirs)


def test_no_grad_graph_when_none_is_wanted() -> None:
    args = arguments(dtype=torch.float32)
    assert not attend_appended(*args).requires_grad
    args[1].requires_grad_()
    with torch.no_grad():
        assert not attend_appended(*args).requires_grad
    y, all_keys, all_values = append_attend(*args)
    assert (y.requires_grad, all_keys.requires_grad, all_values.requires_grad) == (True, True, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 2])
def test_reference_native_and_fake_have_one_layout(dtype: torch.dtype, group: int) -> None:
    args = arguments(group=group, dtype=dtype, mask="bool")
    results = append_attend(*args)
    on_meta: list[Any] = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
    for others in (reference_append_attend(*args), append_attend(*on_meta)):
        for a, b in zip(results, others, strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    y, cached = results[0], on_cache(args)
    for single in (
        attend_appended(*on_meta),
        attend_cache(*on_cache(on_meta)),
        attend_cache(*cached),
        reference_attend_cache(*cached),
    ):
        assert (y.dtype, y.shape, y.stride()) == (single.dtype, single.shape, single.stride())
    assert y.dtype == dtype


def test_many_queries_run_by_the_reference() -> None:
    _, *rest = arguments(dtype=torch.float32)
    query = torch.randn(2, 2, 65, 6)
    y, all_keys, all_values = append_attend(query, *rest)
    expected = F.scaled_dot_product_attention(
        query.double(), all_keys.double(), all_values.double(), scale=rest[-1]
    )
    assert_close_at_scale(y, expected)


@pytest.mark.parametrize("appends", [False, True])
def test_a_compiled_graph_calls_the_op_and_grows_without_compiling_anew(appends: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    def step(query: Tensor, past_keys: Tensor, keys: Tensor, past_values: Tensor, values: Tensor) -> Any:
        args = (2 * query, past_keys, keys, past_values, values)
        if not appends:
            return (attend_appended(*args).transpose(1, 2).flatten(2) + 1,)
        y, all_keys, all_values = append_attend(*args)
        return y.transpose(1, 2).flatten(2) + 1, all_keys, all_values

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        for past in (3, 4, 5, 9):
            args = arguments(past=past, dtype=torch.float32)[:5]
            exact = step(*(t.double() for t in args))
            assert_close_at_scale(compiled(*args), exact)
    assert counter.frame_count == 2  # of a fixed length, and of any
    targets = [node.target for node in counter.graphs[-1].graph.nodes]
    assert any("append" in str(target) for target in targets)
    args[1].requires_grad_()
    grads = [torch.autograd.grad(f(*args)[0].sum(), args[1])[0] for f in (compiled, step)]
    assert_close_at_scale(*grads)
