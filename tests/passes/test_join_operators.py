from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fanin_compile import capture, ops, rewriting
from fanin_compile.backend import record
from fanin_compile.effects import storage_roots
from fanin_compile.ops_program import MOST_OUTPUTS
from fanin_compile.passes import LOWERING, PIPELINE
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fuse_cache_write import fuse_cache_write
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.join_operators import join_operators
from fanin_compile.passes.lower_cache_attention import lower_cache_attention
from fanin_compile.passes.reuse_residuals import reuse_residuals
from fanin_compile.program import Program, parse
from tests.compile_support import (
    any_type,
    assert_equals_model,
    compiled,
    no_warning_of_ours,
    randn,
    sparse_linear,
)
from tests.passes.attention_support import HEADS, SIZE, WIDTH, assert_writes_like, step_inputs
from tests.passes.support import calls, context, graph_of, run
from tests.passes.test_reuse_residuals import Convolutions, two_blocks

fanin, aten = torch.ops.fanin, torch.ops.aten
MATMUL = fanin.gather_matmul.default
LENGTH = 20


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


class Layers(nn.Module):
    """Four masked layers of 16 neurons each, called as a body says."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(sparse_linear(16, 16, 4, seed=i) for i in range(4))
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return self.body(*self.layers, *inputs)


def _runs(gm: fx.GraphModule) -> list[fx.Node]:
    """The operators that run several."""
    return [node for node in gm.graph.nodes if "run_program" in str(node.target)]


def _programs(gm: fx.GraphModule) -> list[Program]:
    return [parse(str(node.args[-1])) for node in _runs(gm)]


def _ops(program: Program) -> list[str]:
    return [step.op.removeprefix("fanin::") for step in program.instructions]


def _joined(body: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, list[Program]]:
    inputs = inputs or (randn(2, 6, 16),)
    gm = graph_of(Layers(body), *inputs)
    run(gm, condense_linear, join_operators, inputs=inputs)
    return gm, _programs(gm)


FOUR = ["gather_matmul"] * 4


def test_joins_a_chain_and_what_moves_elements_in_it() -> None:
    gm, (program,) = _joined(
        lambda a, b, c, d, x: d(c(b(a(x).view(2, 2, 3, 16).transpose(1, 2)).flatten(1, 2)[:, 1:]))
    )
    assert _ops(program) == [
        *("gather_matmul", "aten::as_strided", "gather_matmul", "aten::as_strided"),
        *("gather_matmul", "gather_matmul"),
    ]
    assert not calls(gm, MATMUL)
    assert len(program.outputs) == 1
    (node,) = _runs(gm)
    # x, and values, structure and bias of each layer
    assert program.inputs == len(node.args[0]) == 13  # type: ignore[arg-type]


def test_a_copy_between_them_stays_a_copy() -> None:
    _, (program,) = _joined(lambda a, b, c, d, x: d(c(b(a(x).transpose(0, 1).reshape(12, 16)))))
    assert _ops(program) == ["gather_matmul", "aten::as_strided", "aten::reshape", *FOUR[:3]]


def test_pieces() -> None:
    _, (program,) = _joined(lambda a, b, c, d, x: (p := a(x).split([2, 4], 1), b(p[0]), c(p[1]))[1:])
    assert _ops(program) == ["gather_matmul", *2 * ["aten::as_strided", "gather_matmul"]]
    assert len(program.outputs) == 2


def test_all_that_others_read_comes_out() -> None:
    gm, (program,) = _joined(
        lambda a, b, c, d, x: (
            h := a(x),
            v := h.view(12, 16),
            y := b(v),
            z := c(y),
            (h.sin(), v.cos(), y, z * 2, v.t()[1:]),
        )[-1]
    )
    assert _ops(program) == ["gather_matmul", "aten::as_strided", *FOUR[:2]]
    assert len(program.outputs) == 3
    (node,) = _runs(gm)
    assert len(calls(gm, operator.getitem)) == 3
    later = [aten.view.default, aten.sin.default, aten.cos.default]
    assert all(node < call for target in later for call in calls(gm, target))


def test_what_needs_none_of_them_runs_before_them() -> None:
    gm, (program,) = _joined(lambda a, b, c, d, x: (h := b(a(x)), w := x.sin(), d(c(h)) + d(w))[-1])
    assert _ops(program) == [*FOUR, "gather_matmul"]
    (sin,), (node,) = calls(gm, aten.sin.default), _runs(gm)
    assert sin < node
    assert sin in node.args[0]  # type: ignore[operator]


def test_what_needs_one_of_them_ends_the_run() -> None:
    gm, programs = _joined(lambda a, b, c, d, x: c(b(a(d(c(b(a(x))).softmax(-1))))))
    assert [_ops(program) for program in programs] == [FOUR[:3], FOUR]
    (softmax,) = calls(gm, aten.softmax.int)
    first, second = _runs(gm)
    assert first < softmax < second


def test_few_are_left_alone() -> None:
    gm, programs = _joined(lambda a, b, c, d, x: d(c(b(a(x)).softmax(-1))))
    assert not programs
    assert len(calls(gm, MATMUL)) == 4


def _write_between(a: Any, b: Any, c: Any, d: Any, x: Tensor) -> Tensor:
    h = b(a(x))
    x.clamp_(-1, 1)
    y: Tensor = d(c(h))
    return y + x


def _write_what_is_read(a: Any, b: Any, c: Any, d: Any, x: Tensor) -> Tensor:
    w = x.clamp(-1, 1)
    h = b(a(w))
    w.clamp_(-0.5, 0.5)
    y: Tensor = d(c(h))
    return y + w


def _write_beside(a: Any, b: Any, c: Any, d: Any, x: Tensor) -> Tensor:
    w = torch.zeros(3)
    h = b(a(x))
    w.add_(1)
    y: Tensor = d(c(h))
    return y + w.sum()


@pytest.mark.parametrize("body", [_write_between, _write_what_is_read, _write_beside])
def test_writes_do_not_change_places_with_what_reads(body: Callable[..., Tensor]) -> None:
    x = randn(2, 6, 16)
    gm = graph_of(Layers(body), x)
    with torch.no_grad():
        expected = gm(x.clone())
        for run_pass in (find_masked_layers, condense_linear, join_operators):
            run_pass(gm, context(gm))
        gm.recompile()
        torch.testing.assert_close(gm(x.clone()), expected, rtol=1e-4, atol=1e-4)
    # beside: all four, else two and two, which are too few
    assert [_ops(program) for program in _programs(gm)] == ([FOUR] if body is _write_beside else [])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_that_write_over_their_residual(format: torch.memory_format) -> None:
    inputs = (randn(2, 16, 9, 9).contiguous(memory_format=format),)
    gm = graph_of(Convolutions(two_blocks), *inputs)
    ctx = context(gm, in_place=True)
    run(gm, condense_conv, fuse_epilogue, reuse_residuals, join_operators, ctx=ctx, inputs=inputs)
    (program,) = _programs(gm)
    assert _ops(program) == ["gather_conv", *2 * ["gather_conv", "gather_conv_"]]


def test_strides_that_a_pass_left_wrong_do_not_reach_the_program() -> None:
    inputs = (randn(2, 6, 16),)
    gm = graph_of(Layers(lambda a, b, c, d, x: d(c(b(a(x).transpose(0, 1))))), *inputs)
    run(gm, condense_linear, inputs=inputs)
    first = calls(gm, MATMUL)[0]
    val = first.meta["val"]
    with val.fake_mode:
        first.meta["val"] = torch.empty_strided(val.shape, (1, 2, 12))
    run(gm, join_operators, inputs=inputs)
    assert len(_programs(gm)) == 1


# ---- caches ----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Layers of attention over caches of their own, of which `kept` hand their queries out."""

    def __init__(self, layers: int, kept: int = 0) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(sparse_linear(WIDTH, 3 * WIDTH, 6, seed=i) for i in range(layers))
        self.out = nn.ModuleList(sparse_linear(WIDTH, WIDTH, 8, seed=9 + i) for i in range(layers))
        self.kept = kept
        with torch.no_grad():
            for layer in self.out:
                layer.weight.mul_(0.01)  # type: ignore[operator]

    def forward(self, x: Tensor, *caches: Tensor) -> Any:
        position = torch.arange(6, 7)
        mask = torch.arange(LENGTH) <= position
        queries = []
        for i, (qkv, out) in enumerate(zip(self.qkv, self.out, strict=True)):
            q, k, v = (p.view(2, 1, HEADS, SIZE).transpose(1, 2) for p in qkv(x).split(WIDTH, 2))
            keys = caches[2 * i].index_copy_(2, position, k)
            values = caches[2 * i + 1].index_copy_(2, position, v)
            y = F.scaled_dot_product_attention(q, keys, values, mask[None])
            x = x + out(y.transpose(1, 2).reshape(2, 1, WIDTH))
            queries.append(q)
        return (x, *queries[: self.kept]) if self.kept else x


def _decoder_inputs(layers: int) -> tuple[Tensor, ...]:
    caches = [cache + i for i in range(layers) for cache in step_inputs(length=LENGTH)[1:]]
    return randn(2, 1, WIDTH), *caches


DECODING = (condense_linear, lower_cache_attention, fuse_cache_write, fuse_epilogue, join_operators)


@pytest.mark.parametrize("kept", [0, 2])
def test_the_layers_of_a_decoder_are_one_run_with_their_caches(kept: int) -> None:
    inputs = _decoder_inputs(3)
    gm = graph_of(Decoder(3, kept), *inputs)
    run(gm, *DECODING, inputs=inputs)
    (program,) = _programs(gm)
    assert [op for op in _ops(program) if op != "aten::as_strided"] == 3 * [
        *("gather_matmul", "write_attend", "gather_matmul")
    ]
    (node,) = (n for n in gm.graph.nodes if "run_program_writing" in str(n.target))
    assert [arg.op for arg in node.args[1]] == ["placeholder"] * 6
    assert len(program.outputs) == 1 + kept


def test_more_outputs_than_torch_takes_of_what_writes_are_left_alone() -> None:
    layers = MOST_OUTPUTS + 1
    inputs = _decoder_inputs(layers)
    gm = graph_of(Decoder(layers, layers), *inputs)
    run(gm, *DECODING, inputs=inputs)
    assert not _programs(gm)
    assert len(calls(gm, fanin.write_attend.default)) == layers


class Shared(Decoder):
    """All layers write to one cache."""

    def forward(self, x: Tensor, *caches: Tensor) -> Any:
        return super().forward(x, *(caches[i % 2] for i in range(2 * len(self.qkv))))


def test_a_cache_that_is_written_twice_is_one_input() -> None:
    inputs = _decoder_inputs(1)
    gm = graph_of(Shared(3), *inputs)
    run(gm, *DECODING, inputs=inputs)
    for node in gm.graph.nodes:
        if "run_program_writing" in str(node.target):
            assert len(set(node.args[1])) == len(node.args[1]) == 2


class Aliased(Decoder):
    """What the first layer wrote is attended to once more, by names from before."""

    def forward(self, x: Tensor, *caches: Tensor) -> Any:
        keys, values = (cache.transpose(0, 1).transpose(0, 1) for cache in caches[:2])
        x = super().forward(x, *caches)
        for i in range(2):
            q = self.qkv[i](x)[..., :WIDTH].view(2, 1, HEADS, SIZE).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, keys, values)
            x = x + self.out[i](y.transpose(1, 2).reshape(2, 1, WIDTH))
        return x


def test_what_is_written_has_one_name_in_a_run(dynamo: None) -> None:
    inputs = _decoder_inputs(1)
    gm = graph_of(Aliased(2), *inputs, *_decoder_inputs(1)[1:])
    run(gm, *DECODING, inputs=(*inputs, *_decoder_inputs(1)[1:]))
    writing = [node for node in _runs(gm) if "writing" in str(node.target)]
    assert writing
    for node in writing:
        given, written = (storage_roots(*args) for args in any_type(node.args[:2]))
        assert given.isdisjoint(written)
    model = Aliased(2).eval()
    with torch.no_grad():
        tensors = (*_decoder_inputs(1), *_decoder_inputs(1)[1:])
        assert_equals_model(compiled(model)(*(t.clone() for t in tensors)), model, *tensors)


# ---- in the backend --------------------------------------------------------------------------------------


def test_stands_behind_the_pipeline() -> None:
    assert LOWERING[-1] is join_operators
    assert join_operators not in PIPELINE


def _compiled_programs(monkeypatch: pytest.MonkeyPatch) -> list[list[Program]]:
    """Of each graph that the backend lowers from now on."""
    found: list[list[Program]] = []

    def spy(gm: fx.GraphModule) -> fx.GraphModule:
        found.append(_programs(gm))
        return capture.unlift(gm)

    monkeypatch.setattr(rewriting, "unlift", spy)
    return found


def test_any_size_of_a_dynamic_batch(dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = _compiled_programs(monkeypatch)
    model = Layers(
        lambda a, b, c, d, x: d(c(b(a(x).view(x.shape[0], 2, 3, 16).transpose(1, 2)).flatten(1, 2)))
    )
    with torch.no_grad(), record() as compilations, no_warning_of_ours():
        fast = compiled(model.eval(), dynamic=True)
        for batch in (2, 5, 1, 7):
            x = randn(batch, 6, 16, seed=batch)
            assert_equals_model(fast(x), model, x)
    assert len(compilations) <= 2
    assert all(len(of_graph) == 1 for of_graph in programs)
    assert programs[0][0].sizes >= 1


@pytest.mark.parametrize("outputs", [1, 2])
def test_inductors_wrapper_in_cpp_runs_it(
    outputs: int, dynamo: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which generates the text into C++ code, and takes the results apart by itself."""
    programs = _compiled_programs(monkeypatch)
    model = Layers(
        lambda a, b, c, d, x: (d(y := c(b(a(x).mT.mT[:, 1:])[:, 1:])[:, 1:]).abs(), y.abs())[:outputs]
    ).eval()
    x = randn(2, 6, 16)
    with torch.no_grad(), no_warning_of_ours():
        fast = compiled(model, options={"inductor": {"cpp_wrapper": True}})
        assert_equals_model(fast(x), model, x)
    ((program,),) = programs
    assert len(program.outputs) == outputs


def test_weights_that_change_reach_the_program(dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = _compiled_programs(monkeypatch)
    model = Layers(lambda a, b, c, d, x: (h := b(a(x)), c(h) + d(h), h)[1:]).eval()
    x = randn(3, 16)
    with torch.no_grad(), record() as compilations:
        fast = compiled(model)
        assert_equals_model(fast(x), model, x)
        for layer in model.layers:
            layer.weight.mul_(-2)  # type: ignore[operator]
            layer.bias.add_(1)  # type: ignore[operator]
        assert_equals_model(fast(x), model, x)
    assert len(compilations) == 1
    assert len(programs) == 2  # packed anew
    assert programs[0] == programs[1]
    assert len(programs[0]) == 1


def test_a_decoder_writes_to_the_caches_of_each_call(dynamo: None) -> None:
    model = Decoder(3).eval()
    with torch.no_grad(), no_warning_of_ours():
        fast = compiled(model)
        for seed in range(3):
            assert_writes_like(fast, model, *(t + seed for t in _decoder_inputs(3)))
