"""Copies of biases in compiled graphs: right after every change of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.hold_vectors import MOST_ELEMENTS, hold_vectors
from tests.compile_support import assert_equals_model, compiled, randn, recorded, sparse_linear
from tests.passes.support import context, graph_of, run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dense = sparse_linear(64, 64, 6), nn.Linear(64, 8)
        self.norm, self.count = nn.LayerNorm(64), nn.Buffer(torch.arange(64))
        self.large = nn.Parameter(torch.randn(MOST_ELEMENTS + 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layer(x)) + self.count + self.large[:64]
        y: Tensor = self.dense(h)
        return y


def parameters(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def held(watched: bool, model: nn.Module) -> set[str]:
    """Which of the model's own tensors the graph reads no more."""
    x = randn(2, 64)
    gm = graph_of(model, x)
    before = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    run(
        gm,
        condense_linear,
        hold_vectors,
        ctx=context(gm, watched=parameters(model) if watched else ()),
        inputs=(x,),
    )
    return before - {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} - {"layer.weight"}


def test_vectors_are_copied_where_somebody_watches() -> None:
    assert held(True, Net()) == {"layer.bias", "norm.weight", "norm.bias", "dense.bias"}
    assert held(False, Net()) == set()


def test_graphs_without_layers_of_ours_keep_theirs() -> None:
    assert held(True, nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))) == set()


def test_what_the_graph_writes_to_or_returns_is_not_copied() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen, self.out = (
                sparse_linear(64, 64, 6),
                nn.Buffer(torch.zeros(64)),
                nn.Buffer(torch.ones(3)),
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.seen.add_(1)
            return self.layer(x) + self.seen, self.out

    model, x = Writes().eval(), randn(2, 64)
    gm = graph_of(model, x)
    condense_and_hold = (condense_linear, hold_vectors)
    for a_pass in condense_and_hold:
        a_pass(gm, context(gm, watched={*parameters(model), "seen", "out"}))
    read = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert {"seen", "out"} <= read
    with torch.no_grad():
        run_model = compiled(model)
        for count in (1, 2, 3):
            before = model.seen.clone()
            y, out = run_model(x)
            torch.testing.assert_close(y, model.layer(x) + before + 1)
            assert float(model.seen[0]) == count
            assert out is model.out or torch.equal(out, model.out)


def test_buffers_may_be_written_to_before_each_call(caplog: pytest.LogCaptureFixture) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = sparse_linear(64, 64, 6), nn.Buffer(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x).cumsum(0).sin() + self.scale
            return y

    model, x = Scaled().eval(), randn(3, 64)
    with torch.no_grad(), recorded() as compilations, caplog.at_level("INFO", "fanin_compile"):
        run_model = compiled(model)
        for step in range(3):
            model.scale.fill_(step)
            assert_equals_model(run_model(x), model, x)
        assert "packed anew" not in caplog.text
        model.layer.bias.add_(1)
        assert_equals_model(run_model(x), model, x)
        assert "packed anew" in caplog.text
    assert len(compilations) == 1


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda m: m.layer.bias.add_(1),
    "through data": lambda m: setattr(m.norm.weight, "data", torch.full((64,), 3.0)),
    "another parameter": lambda m: setattr(m.dense, "bias", nn.Parameter(torch.ones(8))),
    "load_state_dict": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: str) -> None:
    model, x = Net().eval(), randn(3, 64)
    with torch.no_grad(), recorded() as compilations:
        run_model = compiled(model)
        assert_equals_model(run_model(x), model, x)
        CHANGES[change](model)
        assert_equals_model(run_model(x), model, x)
    assert compilations[0].result is not None
