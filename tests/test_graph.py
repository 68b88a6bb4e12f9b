"""The pipeline runner, constants, and node helpers that every pass leans on."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, fx, nn

from fanin_compile import RewriteError
from fanin_compile.effects import writes
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import add_constant, bind_arguments, replace_node
from fanin_compile.passes import PIPELINE
from fanin_compile.pipeline import Context, PassResult, run_pipeline
from tests.compile_support import MLP, assert_equals_dense, randn
from tests.passes.support import calls, context, graph_of

aten = torch.ops.aten


def _does_nothing(gm: fx.GraphModule, ctx: Context) -> PassResult:
    return PassResult()


def test_runs_on_a_copy_and_times_every_pass() -> None:
    x = randn(5, 64)
    gm = graph_of(MLP(), x)
    before = gm.code
    result = run_pipeline(gm, PIPELINE, context(gm))
    assert gm.code == before
    assert calls(result.graph_module, torch.ops.fanin.gather_matmul_chain.default)
    assert list(result.seconds) == [getattr(p, "__name__", "") for p in PIPELINE]
    assert [name for name, _ in result.results] == list(result.seconds)
    assert {layer.name for layer in result.found} == {"a", "b"}
    assert "a.weight" in result.read
    assert_equals_dense(result.graph_module(x), MLP(), x)


def _raises(gm: fx.GraphModule, ctx: Context) -> PassResult:
    raise KeyError("injected")


def _breaks_the_graph(gm: fx.GraphModule, ctx: Context) -> PassResult:
    first, second = calls(gm, aten.linear.default)
    second.append(first)  # after its reader
    return PassResult()


def _narrows_the_output(gm: fx.GraphModule, ctx: Context) -> PassResult:
    (output,) = gm.graph.find_nodes(op="output")
    first, _ = calls(gm, aten.linear.default)
    output.args = (([first]),)
    return PassResult()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_raises, "pass _raises failed (passes before it: _does_nothing): 'injected'"),
        (_breaks_the_graph, "pass _breaks_the_graph failed"),
        (
            _narrows_the_output,
            "outputs were ((('5', '10'), torch.float32),) and became ((('5', '48'), torch.float32),)",
        ),
    ],
)
def test_a_failure_names_the_pass_and_those_before_it(broken: object, message: str) -> None:
    gm = graph_of(MLP(), randn(5, 64))
    with pytest.raises(RewriteError, match=re.escape(message)):
        run_pipeline(gm, (_does_nothing, broken), context(gm))  # type: ignore[arg-type]


class _Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Buffer(torch.ones(3)), nn.Buffer(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.a.view(1, 3)[0].mul_(2.0)
        mean = self.norm.running_mean
        assert mean is not None
        return x + self.a * 2 + self.b * 2 + mean


def test_constants_are_what_nothing_writes_to_even_through_views() -> None:
    gm = graph_of(_Writes(), randn(2, 3))
    evaluate = Evaluator(gm)
    nodes = {str(n.target): n for n in gm.graph.find_nodes(op="get_attr")}
    assert not evaluate.is_constant(nodes["a"])
    assert evaluate.is_constant(nodes["b"])
    assert evaluate(nodes["a"]) is None
    products = calls(gm, aten.mul.Tensor)
    assert [evaluate.is_constant(n) for n in products] == [False, True]
    assert evaluate(products[1]).tolist() == [2.0, 2.0, 2.0]  # type: ignore[union-attr]
    assert [n.target for n in gm.graph.nodes if writes(n)] == [aten.mul_.Tensor]


def test_batch_norm_writes_its_statistics_in_train_mode_only() -> None:
    for training in (True, False):
        graph = fx.Graph()
        x, mean, var = (graph.placeholder(name) for name in ("x", "mean", "var"))
        norm = graph.call_function(
            aten.batch_norm.default, (x, None, None, mean, var, training, 0.1, 1e-5, True)
        )
        instance = graph.call_function(
            aten.instance_norm.default, (x, None, None, mean, var, training, 0.1, 1e-5, True)
        )
        assert (writes(norm), writes(instance)) == (training, training)


def test_arguments_by_name_with_defaults() -> None:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(aten.conv2d.default, (x, w), {"stride": [2, 2]})
    bound = bind_arguments(node)
    assert (bound["input"], bound["weight"], bound["bias"]) == (x, w, None)
    assert (bound["stride"], bound["groups"]) == ([2, 2], 1)


def test_a_replaced_node_keeps_its_meta_and_users() -> None:
    gm = graph_of(MLP(), randn(5, 64))
    (relu,) = calls(gm, aten.relu.default)
    relu.meta["mine"] = 1
    users = list(relu.users)
    new = replace_node(relu, aten.tanh.default, relu.args)
    assert new.meta["mine"] == 1
    assert tuple(new.meta["val"].shape) == (5, 48)
    assert list(new.users) == users
    gm.graph.lint()


def test_constants_get_names_of_their_own() -> None:
    gm = graph_of(MLP(), randn(5, 64))
    first = next(iter(calls(gm, aten.linear.default)))
    one, two = (add_constant(gm, first, "c", torch.full((2,), float(i))) for i in range(2))
    assert one.target != two.target
    assert [gm.get_buffer(str(n.target)).tolist() for n in (one, two)] == [[0.0, 0.0], [1.0, 1.0]]
    assert tuple(one.meta["val"].shape) == (2,)
