from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

import fanin_compile
from fanin_compile.attention import ATTENTION
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.fuse_append_attention import fuse_append_attention
from fanin_compile.passes.lower_cache_attention import lower_cache_attention
from fanin_compile.pipeline import PassResult
from tests.compile_support import (
    any_type,
    compiled,
    no_warning_of_ours,
    recorded,
)
from tests.passes.attention_support import HEADS, SIZE, Step, assert_writes_like, step_inputs
from tests.passes.support import calls, graph_of, position, run

aten = torch.ops.aten
ATTEND = torch.ops.fanin.attend_cache.default
LENGTH, AT = 20, 6
sdpa = F.scaled_dot_product_attention
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def step(attend: Attend, *, key_heads: int = HEADS) -> Step:
    return Step(lambda *tensors: (attend(*tensors),), key_heads=key_heads)


def inputs(*, queries: int = 1, key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return step_inputs(length=LENGTH, queries=queries, key_heads=key_heads)


def _write(cache: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy_(2, torch.arange(AT, AT + new.shape[2]), new)


def _mask(q: Tensor) -> Tensor:
    return torch.arange(LENGTH) <= torch.arange(AT, AT + q.shape[2])[:, None]


def _static(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, _write(ck, k), _write(cv, v), _mask(q), scale=0.3)


def _repeat(rows: Tensor, times: int) -> Tensor:
    """As transformers does for heads of queries that share keys."""
    b, h, n, d = rows.shape
    return rows[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)


def _whole(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, ck, cv)


def _assigned(q: Tensor, ck: Tensor, k: Tensor, cv: Tensor, v: Tensor) -> Tensor:
    ck[:, :, AT : AT + k.shape[2]] = k
    cv[:, :, AT : AT + k.shape[2]] = v
    return sdpa(q, ck, cv, _mask(q))


def _lower(body: Attend, **sizes: int) -> tuple[fx.GraphModule, PassResult]:
    given = inputs(**sizes)
    gm = graph_of(step(body, key_heads=sizes.get("key_heads", HEADS)), *given)
    return gm, run(
        gm, drop_identities, condense_linear, fuse_append_attention, lower_cache_attention, inputs=given
    )


MATCHES: dict[str, tuple[Attend, dict[str, int]]] = {
    "written in place": (_static, {}),
    "a few queries": (_static, {"queries": 3}),
    "assigned to": (_assigned, {}),
    "written by nobody: of a cross-attention": (_whole, {}),
    "a part of the cache": (
        lambda q, ck, k, cv, v: sdpa(q, _write(ck, k)[:, :, : AT + 1], _write(cv, v)[:, :, : AT + 1]),
        {},
    ),
    "a mask of numbers": (
        lambda q, ck, k, cv, v: sdpa(q, _write(ck, k), cv, torch.arange(20.0).sin().view(1, 20)),
        {},
    ),
    "repeated for heads that share": (
        lambda q, ck, k, cv, v: (
            keys := _write(ck, k),
            values := _write(cv, v),
            sdpa(q, _repeat(keys, 2), _repeat(values, 2), _mask(q)),
        )[2],
        {"key_heads": 2},
    ),
    "shared by heads": (
        lambda q, ck, k, cv, v: sdpa(q, _write(ck, k), _write(cv, v), _mask(q), enable_gqa=True),
        {"key_heads": 2},
    ),
}


@pytest.mark.parametrize("name", MATCHES)
def test_lowers(name: str) -> None:
    body, sizes = MATCHES[name]
    gm, result = _lower(body, **sizes)
    (node,) = calls(gm, ATTEND)
    assert not calls(gm, ATTENTION)
    for keys in node.args[1:3]:
        assert keys.meta["val"].shape[1] == sizes.get("key_heads", HEADS)  # type: ignore[union-attr]
    (done,) = result.rewritten
    assert done.became == "cache-attention"
    assert ("hidden ones unread" in done.detail) == (
        name not in ("a mask of numbers", "a part of the cache") and body is not _whole
    )
    assert not result.skipped


def test_arguments_and_meta_go_along() -> None:
    given = inputs()
    gm = graph_of(step(_static), *given)
    run(gm, condense_linear, inputs=given)
    (attention,) = calls(gm, ATTENTION)
    before, args = dict(attention.meta), attention.args
    run(gm, lower_cache_attention, inputs=given)
    (node,) = calls(gm, ATTEND)
    assert node.args == (*args[:4], 0.3)
    assert node.meta == before


LEFT: dict[str, tuple[Attend, str, dict[str, int]]] = {
    "causal": (
        lambda q, ck, k, cv, v: sdpa(q, _write(ck, k), _write(cv, v), is_causal=True),
        "dropout, or causal",
        {},
    ),
    "another dtype": (
        lambda q, ck, k, cv, v: sdpa(q.double(), ck.double(), cv.double()).float(),
        "the kernel knows float32 alone",
        {},
    ),
    "of three dimensions": (
        lambda q, ck, k, cv, v: sdpa(q, ck[0], cv[0]),
        "not of batches of heads",
        {},
    ),
    "one batch for all": (
        lambda q, ck, k, cv, v: sdpa(q, ck[:1], cv[:1]),
        "heads or strides are not those of a cache",
        {},
    ),
    "columns apart": (
        lambda q, ck, k, cv, v: sdpa(q, ck.mT[:, :, :, :SIZE].mT.transpose(2, 3), cv[:, :, :SIZE]),
        "heads or strides are not those of a cache",
        {},
    ),
    "something written after keys were repeated": (
        lambda q, ck, k, cv, v: sdpa(q, _repeat(ck, 2), _repeat(_write(cv, v), 2)),
        "something is written before it reads",
        {"key_heads": 2},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_and_says_so(name: str) -> None:
    body, reason, sizes = LEFT[name]
    gm, result = _lower(body, **sizes)
    assert len(calls(gm, ATTENTION)) == 1
    assert not result.rewritten
    assert [(skip.reason, bool(skip.values)) for skip in result.skipped] == [
        (f"attention over a cache: {reason}", True)
    ]


OTHERS: dict[str, tuple[Attend, dict[str, int]]] = {
    "no cache": (lambda q, ck, k, cv, v: sdpa(q, k, v), {}),
    "keys computed from a cache": (lambda q, ck, k, cv, v: sdpa(q, 2 * ck, cv), {}),
    "many queries": (_static, {"queries": 9}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_has_nothing_to_say_about_other_attention(name: str) -> None:
    body, sizes = OTHERS[name]
    gm, result = _lower(body, **sizes)
    assert len(calls(gm, ATTENTION)) == 1
    assert result == PassResult()


def test_leaves_graphs_without_a_condensed_layer() -> None:
    given = inputs()
    gm = graph_of(step(_static), *given)
    assert run(gm, lower_cache_attention, inputs=given) == PassResult()
    assert len(calls(gm, ATTENTION)) == 1


def test_stands_behind_the_pass_that_appends() -> None:
    assert position(condense_linear) < position(fuse_append_attention) < position(lower_cache_attention)


@pytest.mark.parametrize("body", [_static, _assigned, _whole])
def test_both_doors_use_it_and_write_the_cache_that_they_are_given(body: Attend, dynamo: None) -> None:
    model = step(body).eval()

    def check(f: Callable[..., Any]) -> None:
        assert_writes_like(f, model, *inputs())

    with recorded() as compilations, no_warning_of_ours(), torch.no_grad():
        fast = compiled(model)
        check(fast)
        check(fast)
    (compilation,) = compilations
    assert compilation.result is not None
    assert [r.detail[:15] for r in compilation.result.rewritten if r.became == "cache-attention"] == [
        "keys of a cache"
    ]
    with torch.no_grad():
        small = any_type(fanin_compile.condense(model, example_inputs=inputs()))
    assert len(calls(small, ATTEND)) == 1
    check(small)
