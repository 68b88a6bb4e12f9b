from __future__ import annotations

import operator
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
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.pipeline import PassResult
from tests.compile_support import (
    any_type,
    assert_equals_model,
    compiled,
    no_warning_of_ours,
    recorded,
)
from tests.passes.attention_support import HEADS, Body, Step, step_inputs
from tests.passes.support import calls, graph_of, position, run

aten = torch.ops.aten
ATTEND, APPEND = torch.ops.fanin.attend_appended.default, torch.ops.fanin.append_attend.default
sdpa = F.scaled_dot_product_attention


def inputs(*, queries: int = 1, past: int = 6, key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    return step_inputs(length=past, queries=queries, key_heads=key_heads)


def _cat(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], -2)


def _plain(q: Tensor, pk: Tensor, k: Tensor, pv: Tensor, v: Tensor) -> Any:
    return (sdpa(q, _cat(pk, k), _cat(pv, v)),)


def _kept(q: Tensor, pk: Tensor, k: Tensor, pv: Tensor, v: Tensor) -> Any:
    keys, values = _cat(pk, k), _cat(pv, v)
    return sdpa(q, keys, values, scale=0.3), keys, values


def _fuse(body: Body, **sizes: int) -> tuple[fx.GraphModule, PassResult]:
    given = inputs(**sizes)
    gm = graph_of(Step(body, key_heads=sizes.get("key_heads", HEADS)), *given)
    return gm, run(gm, drop_identities, condense_linear, fuse_append_attention, inputs=given)


MASK = torch.arange(7) % 3 != 0
ADDED = torch.arange(7.0).sin().view(1, 1, 1, 7)

# whether the cache is appended, further sizes, scale
MATCHES: dict[str, tuple[Body, bool, dict[str, int]]] = {
    "a cache that is dropped": (_plain, False, {}),
    "a cache that is kept": (_kept, True, {}),
    "keys alone are kept": (
        lambda q, pk, k, pv, v: (keys := _cat(pk, k), (sdpa(q, keys, _cat(pv, v)), keys))[1],
        True,
        {},
    ),
    "read by others as well, afterwards": (
        lambda q, pk, k, pv, v: (
            values := _cat(pv, v),
            y := sdpa(q, _cat(pk, k), values),
            (y + values.mean(2, keepdim=True),),
        )[2],
        True,
        {},
    ),
    "a mask of bool": (
        lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv, v), MASK.view(1, 1, 1, 7)),),
        False,
        {},
    ),
    "a mask of numbers": (lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv, v), ADDED),), False, {}),
    "keys shared by heads": (
        lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv, v), enable_gqa=True),),
        False,
        {"key_heads": 2},
    ),
    "a few queries": (_plain, False, {"queries": 3}),
    "as many values as keys, otherwise split": (
        lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv[:, :, :-1], v.expand(-1, -1, 2, -1))),),
        False,
        {},
    ),
    "an empty cache": (_kept, True, {"past": 0}),
    "written to afterwards": (
        lambda q, pk, k, pv, v: (
            keys := _cat(pk, k),
            y := sdpa(q, keys, _cat(pv, v)),
            keys.mul_(2),
            (y, keys),
        )[3],
        True,
        {},
    ),
    "an empty vector before the cache": (
        lambda q, pk, k, pv, v: (
            sdpa(q, _cat(_cat(torch.tensor([]), pk), k), _cat(_cat(torch.tensor([]), pv), v)),
        ),
        False,
        {},
    ),
}


@pytest.mark.parametrize("name", MATCHES)
def test_fuses(name: str) -> None:
    body, kept, sizes = MATCHES[name]
    gm, result = _fuse(body, **sizes)
    assert [len(calls(gm, target)) for target in (ATTEND, APPEND)] == [not kept, kept]
    assert not calls(gm, ATTENTION)
    assert not calls(gm, aten.cat.default)
    (done,) = result.rewritten
    assert done.became == "append-attention"
    assert ("appended in passing" in done.detail) == kept
    assert not result.skipped


def test_arguments_and_meta_go_along() -> None:
    given = inputs()
    gm = graph_of(Step(_kept), *given)
    run(gm, condense_linear, inputs=given)
    (attention,) = calls(gm, ATTENTION)
    before = dict(attention.meta)
    appended = [node.meta["val"] for node in calls(gm, aten.cat.default)]
    past = list(gm.graph.find_nodes(op="placeholder"))[1:]
    run(gm, fuse_append_attention, inputs=given)
    (node,) = calls(gm, APPEND)
    assert [node.args[1], node.args[3]] == past
    assert node.args[5:] == (None, 0.3)
    y, *kept = calls(gm, operator.getitem)[-3:]
    assert y.meta == before
    assert [n.meta["val"] for n in kept] == appended
    assert node.meta["stack_trace"] == before["stack_trace"]


def _masked_by(mask: Tensor) -> Body:
    return lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv, v), mask),)


LEFT: dict[str, tuple[Body, str, dict[str, int]]] = {
    "many queries": (_plain, "more than a few queries", {"queries": 9}),
    "causal": (
        lambda q, pk, k, pv, v: (sdpa(q, _cat(pk, k), _cat(pv, v), is_causal=True),),
        "dropout, or causal",
        {},
    ),
    "another dtype": (
        lambda q, pk, k, pv, v: (
            sdpa(q.double(), _cat(pk, k).double(), _cat(pv.double(), v.double())).float(),
        ),
        "",
        {},
    ),
    "all in another dtype": (
        lambda q, pk, k, pv, v: (
            sdpa(q.double(), _cat(pk.double(), k.double()), _cat(pv.double(), v.double())).float(),
        ),
        "the kernel knows float32 alone",
        {},
    ),
    "read before": (
        lambda q, pk, k, pv, v: (
            keys := _cat(pk, k),
            (sdpa(q + keys.mean(2, keepdim=True), keys, _cat(pv, v)),),
        )[1],
        "its keys or values are read before",
        {},
    ),
    "written in between": (
        lambda q, pk, k, pv, v: (
            keys := _cat(pk, k),
            k.mul_(2),
            (sdpa(q + k, keys, _cat(pv, v)),),
        )[2],
        "something is written before it reads",
        {},
    ),
    "of three dimensions": (
        lambda q, pk, k, pv, v: (sdpa(q[0], _cat(pk[0], k[0]), _cat(pv[0], v[0])).expand(2, -1, -1, -1),),
        "not of batches of heads",
        {},
    ),
    "one batch for all": (
        lambda q, pk, k, pv, v: (sdpa(q, _cat(pk[:1], k[:1]), _cat(pv[:1], v[:1])),),
        "heads or strides are not those of a cache",
        {},
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_and_says_so(name: str) -> None:
    body, reason, sizes = LEFT[name]
    gm, result = _fuse(body, **sizes)
    assert len(calls(gm, ATTENTION)) == 1
    assert not result.rewritten
    reasons = [(skip.reason, bool(skip.values)) for skip in result.skipped]
    assert reasons == ([(f"append attention: {reason}", True)] if reason else [])


OTHERS: dict[str, Body] = {
    "no cache": lambda q, pk, k, pv, v: (sdpa(q, k, v),),
    "no cache of values": lambda q, pk, k, pv, v: (sdpa(q, pk, pv),),
    "three parts": lambda q, pk, k, pv, v: (sdpa(q, torch.cat([pk, k, k], -2), torch.cat([pv, v, v], -2)),),
    "heads side by side": lambda q, pk, k, pv, v: (
        sdpa(q, torch.cat([k[:, :2], k[:, 2:]], 1), torch.cat([v[:, :2], v[:, 2:]], 1)),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_has_nothing_to_say_about_attention_without_a_cache(name: str) -> None:
    gm, result = _fuse(OTHERS[name])
    assert len(calls(gm, ATTENTION)) == 1
    assert result == PassResult()


def test_leaves_graphs_without_a_condensed_layer() -> None:
    given = inputs()
    gm = graph_of(Step(_plain), *given)
    assert run(gm, fuse_append_attention, inputs=given) == PassResult()
    assert len(calls(gm, ATTENTION)) == 1


def test_one_tensor_for_keys_and_values() -> None:
    gm, result = _fuse(lambda q, pk, k, pv, v: (rows := _cat(pk, k), (sdpa(q, rows, rows), rows))[1])
    assert len(calls(gm, APPEND)) == 1
    assert len(result.rewritten) == 1


def test_stands_where_layers_are_known_and_heads_are_as_narrow_as_they_get() -> None:
    assert position(remove_unread_neurons) < position(condense_linear) < position(fuse_append_attention)
    assert position(drop_identities) < position(fuse_append_attention)


@pytest.mark.parametrize("body", [_plain, _kept])
def test_both_doors_use_it(body: Body, dynamo: None) -> None:
    model, given = Step(body).eval(), inputs()
    with recorded() as compilations, no_warning_of_ours():
        fast = compiled(model)
        for past in (6, 7, 8, 11):
            assert_equals_model(fast(*inputs(past=past)), model, *inputs(past=past))
    assert len(compilations) == 2  # of a fixed length, and of any
    for compilation in compilations:
        assert compilation.result is not None
        (done,) = (r for r in compilation.result.rewritten if r.became == "append-attention")
        assert ("appended" in done.detail) == (body is _kept)
    with torch.no_grad():
        small = any_type(fanin_compile.condense(model, example_inputs=given))
        assert len(calls(small, APPEND if body is _kept else ATTEND)) == 1
        assert not calls(small, ATTENTION)
        for past in (6, 13):  # its length stays free
            assert_equals_model(small(*inputs(past=past)), model, *inputs(past=past))
