"""max_autotune: what was measured decides, layers alike are measured once, and the report says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fanin_compile
from fanin_compile import timing, tuning
from fanin_compile.backend import record
from fanin_compile.bench.cases import masked_linear
from fanin_compile.condensed import CondensedWeight
from fanin_compile.graph import attr_tensor
from fanin_compile.kernels.variants import VARIANTS
from fanin_compile.packed import Header
from fanin_compile.packing import pack
from fanin_compile.records import Layer, Skip
from tests.compile_support import any_type, assert_equals_model
from tests.helpers import assert_close_fp64


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_choices", {})


def weight(out: int = 64, fan_in: int = 300) -> CondensedWeight:
    layer = masked_linear(fan_in, out, 0.9, torch.Generator().manual_seed(0))
    return CondensedWeight.from_dense(layer.weight)


def layer_of(w: CondensedWeight, batch: int) -> Layer:
    macs = batch * w.shape[0] * w.shape[1]
    return Layer("a", "linear", w.shape, (30, 30), w.nnz, 0, w.dense_nbytes, macs, batch)


def measured(
    monkeypatch: pytest.MonkeyPatch, least: dict[str, float], dense: float, active: float = 100.0
) -> list[int]:
    """Let the timer report these microseconds, 100 for variants not named; returns the sizes of what it was asked."""
    asked: list[int] = []

    def timer(functions: Any, seconds: float) -> list[Any]:
        asked.append(len(functions))
        for function in functions:
            function()  # each must run
        us = [dense, *(least.get(v.name, 100.0) for v in VARIANTS)]
        us += [active] * (len(functions) - len(us))
        return [timing.Timing(1e3 * u, 1e3 * u, 0.0) for u in us]

    monkeypatch.setattr(timing, "interleaved", timer)
    return asked


@pytest.mark.parametrize("name", [v.name for v in VARIANTS])
def test_the_fastest_variant_is_packed_and_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    measured(monkeypatch, {name: 50.0}, 200.0)
    w = weight()
    packing = tuning.tuned_pack(w, layer_of(w, 16))
    assert not isinstance(packing, Skip)
    packed, detail = packing
    variant = next(v for v in VARIANTS if v.name == name)
    assert torch.equal(packed.structure, variant.pack(w).structure)
    assert f"variant {name} " in detail
    assert "dense 200" in detail


def test_the_default_is_kept_where_the_gain_is_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, {"wide": 98.0}, 200.0)
    assert tuning.choose(weight(), 16).variant.name == "default"


def test_dense_stays_where_it_was_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, {}, 90.0)
    w = weight()
    packing = tuning.tuned_pack(w, layer_of(w, 16))
    assert isinstance(packing, Skip)
    assert packing.values == {
        "batch": 16,
        "dense": "90 us",
        "condensed": "100 us",
    }


@pytest.mark.parametrize(
    ("dense", "active", "form"),
    [(90.0, 80.0, "dense on its active neurons alone"), (80.0, 90.0, "dense"), (110.0, 105.0, None)],
)
def test_active_neurons_alone_are_measured_too(
    monkeypatch: pytest.MonkeyPatch, dense: float, active: float, form: str | None
) -> None:
    measured(monkeypatch, {}, dense, active)
    w = CondensedWeight.from_dense(weight().to_dense() * (torch.arange(64) % 2).view(-1, 1))
    packing = tuning.tuned_pack(w, layer_of(w, 16))
    if form is None:
        assert not isinstance(packing, Skip)
        assert "dense 110, active 105" in packing[1]
        return
    assert isinstance(packing, Skip)
    assert (packing.reason, packing.active) == (f"{form} was measured to be faster", form != "dense")
    assert packing.values["active"] == f"{active:.0f} us"


def test_layers_alike_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, {}, 200.0)
    w = weight()
    for batch in (16, 16, 5000, 6000):
        tuning.choose(w, batch)
    assert asked == [1 + len(VARIANTS)] * 2  # 5000 and 6000 rows are measured on 4096
    tuning.choose(weight(32), 16)
    assert len(asked) == 3


def test_variants_differ_in_what_they_pack() -> None:
    w = weight(1600, 2000)
    structures = [v.pack(w).structure for v in VARIANTS]
    headers = [Header.read(s) for s in structures]
    assert len({(h.width, h.blocks, h.tile) for h in headers}) == len(VARIANTS)


@pytest.mark.parametrize(
    "how", [{"options": {"max_autotune": True, "strict": True}}, {"mode": "max-autotune"}]
)
def test_the_backend_tunes_and_reports(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    real = tuning._measure
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    calls: list[int] = []

    def counting(w: CondensedWeight, batch: int) -> tuning.Choice:
        choice = real(w, batch)
        calls.append(batch)
        return tuning.Choice(choice.variant, choice.times, dense=1e9)  # ours, whatever the machine does

    monkeypatch.setattr(tuning, "_measure", counting)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        masked_linear(100, 200, 0.9, generator), nn.ReLU(), masked_linear(200, 100, 0.9, generator)
    )
    compiled = torch.compile(model, backend="fanin", **how)
    x = torch.randn(7, 100)
    with torch.no_grad():
        y = compiled(x)
    assert calls == [7, 7]
    exact = model.double()(x.double())
    assert_close_fp64(y, exact, exact.abs() + 10, k=20)


class Gated(nn.Module):
    """The feed-forward layer of a Llama, 100 -> 64 -> 100."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate, self.up = (masked_linear(100, 64, 0.9, generator) for _ in range(2))
        self.down = masked_linear(64, 100, 0.9, generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


@pytest.mark.parametrize("fastest", ["default", "short", "wide"])
def test_a_gated_chain_is_tuned_as_one(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    asked: list[int] = []

    def timer(functions: Any, seconds: float) -> list[Any]:
        asked.append(len(functions))
        for function in functions:
            function()
        if len(functions) == 1 + len(VARIANTS):  # a layer alone: the default, faster than dense
            us = [200.0, *(100.0 for _ in VARIANTS)]
        else:
            us = [50.0 if v.name == fastest else 100.0 for v in VARIANTS if v.tile == VARIANTS[0].tile]
        return [timing.Timing(1e3 * u, 1e3 * u, 0.0) for u in us]

    monkeypatch.setattr(timing, "interleaved", timer)
    torch._dynamo.reset()
    model, x = Gated(), torch.randn(7, 100)
    with torch.no_grad(), record() as compilations:
        y = torch.compile(model, backend="fanin", options={"max_autotune": True, "strict": True})(x)
        assert_equals_model(y, model, x)
    chains = [n for n in asked if n != 1 + len(VARIANTS)]
    assert chains == [5]  # two variants differ in the tile alone, which is a chain's own choice
    (compilation,) = compilations
    assert compilation.result is not None
    graph_module = compilation.result.graph_module
    (node,) = graph_module.graph.find_nodes(
        op="call_function", target=torch.ops.fanin.gather_matmul_chain.default
    )
    structure = attr_tensor(graph_module, str(any_type(node.args[2]).target))
    stack = CondensedWeight.stack([CondensedWeight.from_dense(m.weight) for m in (model.gate, model.up)])
    variant = next(v for v in VARIANTS if v.name == fastest)
    expected = pack(stack, width=variant.width, block_rows=64, tile=variant.tile)
    assert torch.equal(structure, expected.structure)
    assert f"gate: with up: variant {fastest} (us: default " in str(
        fanin_compile.explain(model, x, options={"max_autotune": True})
    )
    assert chains == [n for n in asked if n != 1 + len(VARIANTS)], "measured twice"


@pytest.mark.parametrize("max_autotune", [False, True])
def test_the_report_counts_the_bytes_of_a_stacked_gate(
    monkeypatch: pytest.MonkeyPatch, max_autotune: bool
) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.01)
    monkeypatch.setattr(
        tuning, "_measure", lambda w, batch: tuning.Choice(VARIANTS[0], {"default": 1.0}, 2.0)
    )
    options = {"max_autotune": max_autotune, "cost_gate": False}
    model, x = Gated(), torch.randn(7, 100)
    with torch.no_grad(), record() as compilations:
        report = fanin_compile.explain(model, x, options=options)
    (compilation,) = compilations
    assert compilation.result is not None
    graph_module = compilation.result.graph_module
    read = {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}
    kept = sum(
        attr_tensor(graph_module, name).nbytes for name in read if name.endswith(("values", "structure"))
    )
    assert {layer.name for layer in report.rewritten} == {"gate", "up", "down"}
    assert sum(layer.bytes_after for layer in report.layers) == kept
    assert report.totals()["bytes_after"] == kept


def test_explain_names_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, {"two": 10.0}, 200.0)
    model = masked_linear(100, 200, 0.9, torch.Generator().manual_seed(0))
    report = fanin_compile.explain(model, torch.randn(7, 100), options={"max_autotune": True})
    assert "variant two" in str(report)
