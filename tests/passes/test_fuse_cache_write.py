from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fanin_compile
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.fuse_cache_write import fuse_cache_write
from fanin_compile.passes.lower_cache_attention import lower_cache_attention
from fanin_compile.pipeline import PassResult
from tests.compile_support import any_type, compiled, no_warning_of_ours, recorded
from tests.passes.attention_support import HEADS, Step, assert_writes_like, step_inputs
from tests.passes.support import calls, graph_of, position, run

aten = torch.ops.aten
ATTEND, WRITE = torch.ops.fanin.attend_cache.default, torch.ops.fanin.write_attend.default
LENGTH, AT = 20, 6
sdpa = F.scaled_dot_product_attention
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]


def _at(new: Tensor) -> Tensor:
    return torch.arange(AT, AT + new.shape[2])


def _mask(q: Tensor) -> Tensor:
    return torch.arange(LENGTH) <= torch.arange(AT, AT + q.shape[2])[:, None]


def _static(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    at = _at(k)
    return (sdpa(q, ck.index_copy_(2, at, k), cv.index_copy_(-2, at, v), _mask(q), scale=0.3),)


def _grouped(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    at = _at(k)
    keys, values = ck.index_copy_(2, at, k), cv.index_copy_(2, at, v)
    return (sdpa(q, keys, values, _mask(q), enable_gqa=True),)


def _counted(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """As transformers' layers, which count what is in them between the two."""
    count = torch.full((), AT)
    at = torch.arange(k.shape[2]) + count
    keys = ck.index_copy_(2, at, k)
    count.add_(k.shape[2])
    return sdpa(q, keys, cv.index_copy_(2, at, v), _mask(q)), count


def _fused(body: Attend, **sizes: int) -> tuple[fx.GraphModule, PassResult, Any]:
    given = step_inputs(length=LENGTH, **sizes)
    gm = graph_of(Step(body, key_heads=sizes.get("key_heads", HEADS)), *given)
    result = run(gm, drop_identities, condense_linear, lower_cache_attention, fuse_cache_write, inputs=given)
    return gm, result, given


MATCHES: dict[str, tuple[Attend, dict[str, int]]] = {
    "one query": (_static, {}),
    "a few": (_static, {"queries": 3}),
    "heads that share keys": (_grouped, {"key_heads": 2}),
    "a counter beside them": (_counted, {}),
}


@pytest.mark.parametrize("name", MATCHES)
def test_fuses(name: str) -> None:
    body, sizes = MATCHES[name]
    gm, result, _ = _fused(body, **sizes)
    (node,) = calls(gm, WRITE)
    assert not calls(gm, ATTEND)
    assert not calls(gm, aten.index_copy_.default)
    assert [arg.op for arg in node.args[1:3]] == ["placeholder"] * 2  # type: ignore[union-attr]
    (done,) = result.rewritten
    assert (done.layer, done.became) == (node.name, "cache-write")
    assert not result.skipped


LEFT: dict[str, tuple[Attend, str]] = {
    "others read what was written": (
        lambda q, ck, k, cv, v: (
            sdpa(q, keys := ck.index_copy_(2, at := _at(k), k), cv.index_copy_(2, at, v), _mask(q)),
            keys + 1,
        ),
        "others read what is written to it",
    ),
    "others read the cache before it is attended to": (
        lambda q, ck, k, cv, v: (
            at := _at(k),
            other := ck.transpose(0, 1),
            keys := ck.index_copy_(2, at, k),
            values := cv.index_copy_(2, at, v),
            seen := other + 1,
            (sdpa(q, keys, values, _mask(q)), seen),
        )[-1],
        "others read it, or write to what is written, before it is attended to",
    ),
    "others write to what is written": (
        lambda q, ck, k, cv, v: (
            at := _at(k) + 0,
            keys := ck.index_copy_(2, at, k),
            values := cv.index_copy_(2, at, v),
            at.add_(1),
            (sdpa(q, keys, values, _mask(q)), at),
        )[-1],
        "others read it, or write to what is written, before it is attended to",
    ),
    "positions of their own": (
        lambda q, ck, k, cv, v: (
            sdpa(q, ck.index_copy_(2, _at(k), k), cv.index_copy_(2, _at(k), v), _mask(q)),
        ),
        "keys and values are written at positions of their own",
    ),
    "no rows": (
        lambda q, ck, k, cv, v: (
            sdpa(q, ck.index_copy_(0, at := torch.arange(1), one := ck[:1] * 0), cv.index_copy_(0, at, one)),
        ),
        "what is written are no rows of it",
    ),
    "keys that are values": (
        lambda q, ck, k, cv, v: (
            sdpa(q, ck.index_copy_(2, at := _at(k), k), ck.index_copy_(2, at, v), _mask(q)),
        ),
        "what is written shares memory with it",
    ),
    "rows of the cache itself": (
        lambda q, ck, k, cv, v: (
            sdpa(q, ck.index_copy_(2, at := _at(k), cv[:, :, :1]), cv.index_copy_(2, at, v), _mask(q)),
        ),
        "what is written shares memory with it",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_and_says_so(name: str) -> None:
    body, reason = LEFT[name]
    gm, result, _ = _fused(body)
    assert len(calls(gm, ATTEND)) == 1
    assert len(calls(gm, aten.index_copy_.default)) == 2
    assert not result.rewritten
    assert [skip.reason for skip in result.skipped] == [f"attention over a cache: {reason}"]


@pytest.mark.parametrize(
    "body",
    [
        lambda q, ck, k, cv, v: (sdpa(q, ck, cv),),
        lambda q, ck, k, cv, v: (sdpa(q, ck.index_copy_(2, _at(k), k), cv),),
        lambda q, ck, k, cv, v: (sdpa(q, k, v),),
    ],
)
def test_has_nothing_to_say_about_caches_that_are_not_written_so(body: Attend) -> None:
    gm, result, _ = _fused(body)
    assert not calls(gm, WRITE)
    assert result == PassResult()


def test_stands_behind_the_pass_that_makes_what_it_looks_for() -> None:
    assert position(lower_cache_attention) < position(fuse_cache_write)


@pytest.mark.parametrize("body", [_static, _counted])
def test_both_doors_use_it_and_write_the_cache_that_they_are_given(body: Attend, dynamo: None) -> None:
    model = Step(body).eval()

    def check(f: Callable[..., Any]) -> None:
        given = step_inputs(length=LENGTH)
        versions = [t._version for t in given]
        assert_writes_like(f, model, *given)
        assert [t._version > before for t, before in zip(given, versions, strict=True)] == [False, True, True]

    with recorded() as compilations, no_warning_of_ours(), torch.no_grad():
        fast = compiled(model)
        check(fast)
        check(fast)
    (compilation,) = compilations
    assert compilation.result is not None
    assert [r.became for r in compilation.result.rewritten if r.became.startswith("cache")] == [
        "cache-attention",
        "cache-write",
    ]
    with torch.no_grad():
        small = any_type(fanin_compile.condense(model, example_inputs=step_inputs(length=LENGTH)))
    assert len(calls(small, WRITE)) == 1
    check(small)
