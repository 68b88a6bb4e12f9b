"""explain(): every layer once, in numbers that add up, with a reason for whatever was left."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import fanin_compile
from fanin_compile import LayerReport, Report, backend, condense, cost, explain
from fanin_compile.records import Skip
from tests.compile_support import (
    MLP,
    assert_equals_dense,
    compiled,
    randn,
    recorded,
    rewritten,
    sparse_linear,
)

pytestmark = pytest.mark.usefixtures("dynamo")
ALL = {"cost_gate": False}


def test_of_a_masked_model_with_inputs() -> None:
    report = explain(MLP(), randn(5, 64), options=ALL)
    a, b = report.layers
    assert (a.name, a.op, a.shape, a.fan_in, a.ablated) == ("a", "linear", (48, 64), (6, 6), 2)
    assert a.became == "gather-matmul + relu, chained into b"
    assert b.became == "gather-matmul, chained onto a"
    assert a.macs_before == 5 * 48 * 64
    assert a.bytes_before == 48 * 64 * 4
    assert 0 < a.bytes_after < a.bytes_before
    assert math.isclose(a.sparsity, 1 - 46 * 6 / (48 * 64))
    assert report.rewritten == report.layers
    assert report.left == ()
    assert report.notes == ()


def test_multiply_adds_after_are_at_most_the_active_weights() -> None:
    report = explain(MLP(), randn(5, 64), options=ALL)
    assert report.layers[0].macs_after is not None
    assert 0 < report.layers[0].macs_after <= 5 * 46 * 6


def test_a_layer_left_dense_counts_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cost, "gate_for", lambda nbytes: lambda layer: Skip(layer.name, "refused for the test")
    )
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    mask = torch.ones(48, 64, dtype=torch.bool)
    mask[:16] = False
    prune.custom_from_mask(model[0], "weight", mask)
    report = explain(model, randn(5, 64))
    first, _ = report.layers
    assert (first.became, first.macs_before, first.macs_after) == (
        "dense, narrowed",
        5 * 48 * 64,
        5 * 32 * 64,
    )
    assert (first.bytes_before, first.bytes_after) == (4 * 48 * 64, 4 * 32 * 64)
    assert report.left == report.layers


def test_active_neurons_alone_with_all_three_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cost, "host_rates", lambda t: cost.Rates(t, (10.0,) * 5, (1.0,) * 5, (1.0,) * 5, *((9.0,) * 3,) * 3)
    )
    model = nn.Linear(200, 48).eval()
    mask = torch.ones(48, 200, dtype=torch.bool)
    mask[:16] = False
    prune.custom_from_mask(model, "weight", mask)
    for report in (
        explain(model, randn(500, 200)),
        explain(fanin_compile.condense(model, example_inputs=(randn(500, 200),))),
    ):
        (layer,) = report.layers
        assert layer.became == "dense, active neurons only"
        assert (layer.bytes_before, layer.bytes_after) == (4 * 48 * 200, 4 * 32 * 200)
        assert (layer.macs_before, layer.macs_after) == (500 * 48 * 200, 500 * 32 * 200)
        assert "32 of 48 neurons computed" in layer.changes
        assert report.left == report.layers
        assert "dense on its active neurons alone is " in layer.reason
    estimates = (
        "estimated to be faster (sparsity 33.3%, batch 500, dense 480 us, active 344 us, condensed 3200 us)"
    )
    assert explain(model, randn(500, 200)).layers[0].reason.endswith(estimates)


def test_totals_are_sums() -> None:
    report = explain(MLP(), randn(5, 64), options=ALL)
    for field, total in report.totals().items():
        assert total == sum(getattr(layer, field) for layer in report.layers)
    assert explain(MLP()).totals()["macs_before"] is None  # no inputs, so not known


def test_round_trip_through_json() -> None:
    report = explain(MLP(), randn(5, 64), options=ALL)
    parsed = json.loads(report.to_json())
    assert parsed == json.loads(json.dumps(report.to_dict()))
    assert parsed["totals"] == report.totals()
    layers = []
    for fields in parsed["layers"]:
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        layers.append(LayerReport(**arguments))
    assert Report(parsed["title"], tuple(layers), tuple(parsed["notes"])) == report


def test_the_table_names_layers_sizes_and_reasons() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6), nn.ReLU(), nn.Linear(32, 16))
    text = str(explain(model, randn(5, 64), options=ALL))
    lines = text.splitlines()
    assert lines[0] == 'torch.compile(Sequential, backend="fanin")'
    assert lines[1].split()[:4] == ["layer", "op", "shape", "fan-in"]
    assert lines[3].split()[:5] == ["0", "linear", "32x64", "6", "90.6%"]
    assert "1 of 2 layers" in lines[5]
    assert "left dense: 2: every weight is active (shape 16x32)" in text


def test_the_cost_gate_gives_both_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cost, "host_rates", lambda t: cost.Rates(t, (10.0,) * 5, (5.0,) * 5, (1.0,) * 5, *((9.0,) * 3,) * 3)
    )
    model = nn.Linear(64, 64)
    prune.random_unstructured(model, "weight", 0.02)
    (layer,) = explain(model, randn(256, 64)).layers
    assert layer.became == "dense"
    assert layer.reason.startswith("dense is estimated to be faster (sparsity 2.0%, batch 256, dense ")
    assert layer.macs_after == layer.macs_before
    assert layer.bytes_after == layer.bytes_before


def test_of_a_condensed_model() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=2), nn.Linear(32, 16))
    report = explain(condense(model), randn(7, 64))
    first, second = report.layers
    assert (first.name, first.became, first.ablated) == ("0", "gather-matmul", 2)
    assert (first.macs_before, first.macs_after) == (7 * 32 * 64, 7 * 30 * 6)
    assert (second.became, second.reason) == ("dense", "every weight is active")
    assert second.macs_before == second.macs_after == 7 * 16 * 32
    assert explain(condense(model)).layers[0].macs_before is None


def test_of_a_plan() -> None:
    model = nn.ModuleDict(
        {"a": sparse_linear(64, 32, 6), "c": nn.Conv2d(8, 8, 3), "at": nn.MultiheadAttention(32, 4)}
    )
    prune.random_unstructured(model["c"], "weight", 0.9)
    report = explain(model)
    assert [(r.name, r.op, r.became) for r in report.layers] == [
        ("a", "linear", "gather-matmul"),
        ("c", "conv2d", "gather-conv"),
        ("at.in_proj_weight", "attention", "dense"),
        ("at.out_proj", "linear", "dense"),
    ]
    assert report.title == "condense(ModuleDict) would make"


def test_of_an_exported_condensed_model() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.ReLU(), sparse_linear(32, 16, 20))
    report = explain(condense(model, example_inputs=(randn(5, 64),)))
    assert [layer.became for layer in report.layers] == [
        "gather-matmul + relu, chained into 2",
        "gather-matmul, chained onto 0",
    ]
    assert report.layers[0].changes == ("32 -> 28 neurons",)
    assert "4 constant inputs folded" in str(report)


class _Tags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = _pruned(nn.ConvTranspose1d(16, 16, 3))
        self.a = sparse_linear(20, 64, 3)
        self.rnn = nn.LSTM(64, 32, batch_first=True)
        with torch.no_grad():
            dict(self.rnn.named_parameters())["weight_hh_l0"].mul_(torch.rand(128, 32) < 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(self.a(self.up(x)))[0]
        return y


def _pruned(layer: nn.Module) -> Any:
    prune.random_unstructured(layer, "weight", 0.9)
    prune.remove(layer, "weight")
    return layer


@pytest.mark.parametrize("graph", [False, True])
def test_sparse_weights_without_a_condensed_form_are_noted(graph: bool) -> None:
    torch.manual_seed(0)
    model, x = _Tags().eval(), randn(2, 16, 18)
    with torch.no_grad():
        report = explain(condense(model, example_inputs=(x,)) if graph else condense(model))
    assert [(layer.name, layer.became) for layer in report.layers] == [("a", "gather-matmul")]
    assert [note.partition(" (")[0] for note in report.notes] == [
        "up: transposed convolutions stay dense",
        "rnn.weight_hh_l0: stays as it is, one operator of torch holds all its weights",
    ]
    assert "note: up: transposed convolutions stay dense (type ConvTranspose1d, sparsity 9" in str(report)


def test_refusals_of_nodes_that_are_no_layer_are_noted() -> None:
    torch.manual_seed(0)
    pool = nn.MaxPool2d(2, return_indices=True)

    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = _pruned(nn.Conv2d(4, 16, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            values, indices = pool(self.conv(x))
            return values, indices

    report = explain(condense(Pools().eval(), example_inputs=(randn(2, 4, 9, 9),)))
    assert [layer.name for layer in report.rewritten] == ["conv"]
    (note,) = report.notes
    assert "max pool: its indices are read" in note


@pytest.mark.parametrize("graph", [False, True])
def test_operators_that_run_in_kernels_of_ours_are_noted(graph: bool) -> None:
    torch.manual_seed(0)
    convs, pool = [_pruned(nn.Conv2d(16, 16, 3)) for _ in range(2)], nn.MaxPool2d(2)
    model, x = nn.Sequential(convs[0], pool, convs[1], pool).eval(), randn(2, 16, 19, 19)
    with torch.no_grad():
        if graph:
            report = explain(condense(model, example_inputs=(x,)))
        else:
            report = explain(model, x, options={"cost_gate": False})
    (note,) = report.notes
    assert note == "max_pool2d and 1 alike: max-pool, planar kernel"
    assert f"note: {note}" in str(report)


def test_graph_breaks_and_untouched_graphs_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks(MLP):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            torch._dynamo.graph_break()
            y: Tensor = self.b(h)
            return y

    report = explain(Breaks(), randn(5, 64), options=ALL)
    assert [layer.name for layer in report.rewritten] == ["a", "b"]
    assert report.notes == ("Dynamo made 2 graphs of this model",)

    def fail(*args: object) -> None:
        raise ValueError("injected")

    monkeypatch.setattr(backend, "rewrite", fail)
    report = explain(MLP(), randn(5, 64))
    assert report.rewritten == ()
    assert "graph 0 left untouched: ValueError: injected" in report.notes
    assert "note: graph 0 left untouched: ValueError: injected" in str(report)


def test_a_weight_used_twice_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = sparse_linear(64, 64, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(torch.relu(self.a(x)))
            return y

    report = explain(Twice(), randn(5, 64), options=ALL)
    assert [(layer.name, layer.became) for layer in report.layers] == [
        ("a", "gather-matmul + relu, chained into a (use 2)"),
        ("a (use 2)", "gather-matmul, chained onto a"),
    ]
    assert report.totals()["bytes_before"] == 64 * 64 * 4


def test_a_tied_weight_is_no_layer_that_was_not_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 64), sparse_linear(64, 50, 6, bias=False)
            self.uncalled = nn.Linear(3, 3)
            self.embed.weight = self.head.weight

        def forward(self, i: Tensor) -> Tensor:
            y: Tensor = self.head(self.embed(i))
            return y

    report = explain(Tied(), torch.arange(7), options=ALL)
    assert [layer.name for layer in report.rewritten] == ["embed"]
    assert report.notes == ("uncalled: Linear is in no graph that Dynamo captured, or was not called",)


def test_of_a_compiled_model_and_of_nothing() -> None:
    model = MLP()
    f = compiled(model)
    assert isinstance(f, nn.Module)
    assert explain(f, randn(5, 64), options=ALL).layers == explain(model, randn(5, 64), options=ALL).layers
    assert str(explain(nn.ReLU(), randn(3))).endswith("no linear or convolution layer found")


def test_leaves_no_trace() -> None:
    """Neither in Dynamo's recompile limit, nor in buffers, nor in the random state."""
    model = nn.Sequential(sparse_linear(64, 48, 6), nn.BatchNorm1d(48), nn.Dropout(0.5)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state, x = torch.get_rng_state(), randn(5, 64)
    for _ in range(9):
        explain(model, x, options=ALL)
    explain(condense(model), x)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    with recorded() as compilations:
        compiled(model)(x)
    assert rewritten(compilations) == [{"0"}]


def test_does_not_disturb_a_compiled_model() -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model)
    with recorded() as compilations:
        f(x)
        fanin_compile.explain(model, x)
    with recorded() as again:
        assert_equals_dense(f(x), model, x)
    assert (len(compilations), len(again)) == (2, 0)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(fanin_compile.OptionError, match="unknown option 'gate'"):
        explain(MLP(), randn(5, 64), options={"gate": False})


@pytest.mark.parametrize("graph", [False, True])
def test_a_layer_whose_packed_form_is_larger_stays_dense(graph: bool) -> None:
    small = nn.Sequential(sparse_linear(7, 2, 1), nn.ReLU(), sparse_linear(2, 64, 1))
    condensed = condense(small, example_inputs=(randn(3, 7),)) if graph else condense(small)
    first, second = explain(condensed).layers
    assert first.reason.startswith("would not shrink (sparsity 85.7%")
    assert second.reason.startswith("would not shrink (sparsity 50.0%")
    assert sum(t.nbytes for t in condensed.state_dict().values()) <= sum(
        t.nbytes for t in small.state_dict().values()
    )
