"""Norms whose every reader is a condensed linear layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fanin_compile
from fanin_compile.graph import bind_arguments
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.fuse_chain import fuse_chain
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.fuse_norm import fuse_norm
from tests.compile_support import (
    assert_equals_model,
    compiled,
    no_warning_of_ours,
    randn,
    recorded,
    sparse_linear,
)
from tests.passes.support import calls, context, graph_of, run

linear = torch.ops.fanin.gather_matmul.default
chain = torch.ops.fanin.gather_matmul_chain.default
NORMS = (torch.ops.aten.layer_norm.default, torch.ops.aten.rms_norm.default, torch.ops.aten.rsqrt.default)
PASSES = (drop_identities, condense_linear, fuse_epilogue, fuse_chain, fuse_norm)
Forward = Callable[["Net", Tensor], Any]


class SpelledRms(nn.Module):
    """As transformers write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Net(nn.Module):
    """Layers [64 -> 64] and [64 -> 96 -> 64] of some ablated neurons, and norms of all kinds."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b = (sparse_linear(64, 64, 6, ablated=i, seed=i) for i in range(2))
        self.up, self.gate = (sparse_linear(64, 96, 6, seed=2 + i) for i in range(2))
        self.down = sparse_linear(96, 64, 9, seed=4)
        self.norm, self.bare = nn.LayerNorm(64), nn.LayerNorm(64, elementwise_affine=False)
        self.rms, self.spelled = nn.RMSNorm(64, eps=1e-6), SpelledRms(64)
        self.two = nn.LayerNorm([5, 64])
        for norm in (self.norm, self.rms, self.spelled):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def fuse(forward: Forward, *shape: int) -> tuple[torch.fx.GraphModule, dict[str, str], dict[str, str]]:
    """The graph after the passes, what was fused into each layer, and why it was not."""
    x = randn(*(shape or (2, 5, 64)))
    gm = graph_of(Net(forward), x)
    result = run(gm, *PASSES, ctx=context(gm), inputs=(x,))
    return gm, {r.layer: r.detail for r in result.rewritten}, {s.layer: s.reason for s in result.skipped}


def norms(gm: torch.fx.GraphModule) -> int:
    return sum(len(calls(gm, target)) for target in NORMS)


MATCHES: dict[str, tuple[Forward, dict[str, str]]] = {
    "layer norm": (lambda m, x: m.a(m.norm(x)), {"a": "layer norm"}),
    "without weight and bias": (lambda m, x: m.a(m.bare(x)), {"a": "layer norm"}),
    "rms norm": (lambda m, x: m.a(m.rms(x)), {"a": "rms norm"}),
    "rms norm in parts": (lambda m, x: m.a(m.spelled(x)), {"a": "rms norm"}),
    "two readers": (lambda m, x: m.a(n := m.norm(x)) * m.b(n), {"a": "layer norm", "b": "layer norm"}),
    "a residual around it": (lambda m, x: x + m.a(m.norm(x)), {"a": "layer norm"}),
    "an epilogue": (lambda m, x: F.gelu(m.a(m.norm(x))), {"a": "layer norm"}),
    "a chain": (lambda m, x: x + m.down(F.gelu(m.up(m.norm(x)))), {"down": "layer norm"}),
    "a gated chain": (
        lambda m, x: x + m.down(F.silu(m.gate(n := m.spelled(x))) * m.up(n)),
        {"down": "rms norm"},
    ),
    "norms in turn": (
        lambda m, x: (h := x + m.a(m.norm(x))) + m.b(m.rms(h)),
        {"a": "layer norm", "b": "rms norm"},
    ),
    "a dropout behind it": (lambda m, x: m.a(F.dropout(m.norm(x), 0.5, m.training)), {"a": "layer norm"}),
}


@pytest.mark.parametrize("name", MATCHES)
def test_a_norm_is_computed_by_its_layers(name: str) -> None:
    forward, expected = MATCHES[name]
    gm, fused, _ = fuse(forward)
    assert {name.removesuffix(".values"): what for name, what in fused.items()} == expected
    assert norms(gm) == 0
    for node in (*calls(gm, linear), *calls(gm, chain)):
        assert bind_arguments(node)["norm"].op == "get_attr"


REFUSED: dict[str, tuple[Forward, str]] = {
    "read by others": (lambda m, x: m.a(n := m.norm(x)) * n, "it is read by mul as well"),
    "an output": (lambda m, x: (m.a(n := m.norm(x)), n), "it is read by the graph's output as well"),
    "a residual": (lambda m, x: m.a(n := m.norm(x)) + n, "it is a residual as well"),
    "not constant": (
        lambda m, x: m.a(F.layer_norm(x, (64,), weight=x[0, 0])),
        "its weight or bias is not constant",
    ),
    "written between": (
        lambda m, x: (h := x + 1, n := m.norm(h), h.add_(1), m.a(n) + h)[3],
        "something between them works in place",
    ),
    "a part is read": (
        lambda m, x: (
            s := x * (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0)),
            m.a(m.spelled.weight * s) + r,
        )[1],
        "what it computes on the way is read elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_norm_that_must_stay_is_named(name: str) -> None:
    forward, why = REFUSED[name]
    gm, fused, skipped = fuse(forward)
    assert fused == {}
    assert norms(gm) == 1
    assert skipped == {"a": f"norm of its input not fused: {why}"}


OTHERS: dict[str, Forward] = {
    "two dimensions": lambda m, x: m.a(m.two(x)),
    "no layer reads it": lambda m, x: m.a(x) * m.norm(x),
    "mean of another dimension": lambda m, x: m.a(
        m.spelled.weight * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1.0))
    ),
    "another power": lambda m, x: m.a(
        m.spelled.weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1.0))
    ),
    "of another tensor": lambda m, x: m.a(
        m.spelled.weight * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1.0))
    ),
    "a factor for all": lambda m, x: m.a(
        m.spelled.weight[:1] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1.0))
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_such_norm_is_left_alone(name: str) -> None:
    gm, fused, skipped = fuse(OTHERS[name])
    assert fused == {}
    assert skipped == {}
    assert all(bind_arguments(node)["norm"] is None for node in calls(gm, linear))


def test_compiled_with_changing_sizes_and_weights() -> None:
    model = Net(lambda m, x: x + m.down(F.gelu(m.up(m.norm(h := x + m.a(m.rms(x)))))) + h).eval()
    with no_warning_of_ours(), recorded() as compilations, torch.no_grad():
        run_model = compiled(model, dynamic=True)
        for shape in ((2, 5, 64), (3, 7, 64)):
            assert_equals_model(run_model(x := randn(*shape)), model, x)
        model.norm.weight.mul_(2)
        model.rms.weight.add_(1)
        model.norm.bias.zero_()
        assert_equals_model(run_model(x), model, x)
        *_, last = compilations  # the first may be traced anew, for its symbols
        before = len(compilations)
        assert_equals_model(run_model(x := randn(5, 2, 64)), model, x)
    assert len(compilations) == before
    assert last.result is not None
    assert {r.detail for r in last.result.rewritten if r.became == "norm"} == {
        "layer norm",
        "rms norm",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    model = Net(lambda m, x: m.a(m.norm(x))).eval().to(dtype)
    x = randn(4, 64).to(dtype)
    with torch.no_grad(), recorded() as compilations:
        y = compiled(model)(x)
        exact = model.double()(x.double())
    assert [r.detail for c in compilations if c.result for r in c.result.rewritten if r.became == "norm"]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))


def test_the_report_and_the_condensed_graph_have_it() -> None:
    model, x = Net(lambda m, x: m.a(m.norm(x))).eval(), randn(3, 64)
    (row,) = (r for r in fanin_compile.explain(model, x).layers if r.name == "a")
    assert row.became.startswith("layer norm + gather-matmul")
    graph = fanin_compile.condense(model, example_inputs=(x,))
    assert isinstance(graph, torch.fx.GraphModule)
    assert norms(graph) == 0
    with torch.no_grad():
        assert_equals_model(graph(x), model, x)
