"""Benchmarks run, compare outputs and write what they found; no time is asserted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from typer.testing import CliRunner

from fanin_compile import ops
from fanin_compile.backend import record
from fanin_compile.bench import contenders
from fanin_compile.bench.cases import LinearCase, build
from fanin_compile.bench.feed_forward import feed_forward, time_removal
from fanin_compile.bench.footprint import FIRST_OUTPUT, first_output
from fanin_compile.bench.linear import bench_linear, target
from fanin_compile.bench.masking import is_hidden, mask_constant_fan_in, maskable
from fanin_compile.bench.measure import DisagreementError, expect_dependence, geometric_mean, nnz_of, run_case
from fanin_compile.bench.models import MAKERS, OneInput, make_model
from fanin_compile.bench.roofline import handover_ns, roofline
from fanin_compile.bench.whole import bench_model
from fanin_compile.cli import app
from fanin_compile.errors import OptionError
from fanin_compile.timing import threads
from tests.compile_support import any_type

pytestmark = pytest.mark.usefixtures("dynamo")


@pytest.mark.parametrize("command", ["linear", "mlp"])
def test_quick_run_prints_a_table_and_writes_json_and_a_picture(command: str, tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]
    result = CliRunner().invoke(app, ["bench", command, "--quick", "--batches", "1,3", *files])
    assert result.exit_code == 0, result.output
    assert "x best dense" in result.output
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["ratio"] > 0 and row["dense"] == "eager" for row in rows)
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_quick_run_of_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    # with nothing kept, inductor takes half a minute to compile even this; that it does is tested below
    assert FIRST_OUTPUT["fanin"] is contenders.fanin
    assert FIRST_OUTPUT["inductor"] is contenders.inductor
    monkeypatch.setitem(FIRST_OUTPUT, "fanin", contenders.eager)
    monkeypatch.setitem(FIRST_OUTPUT, "inductor", contenders.eager)
    file = tmp_path / "model.json"
    command = ["bench", "model", "mlp", "--quick", "--ablate", "0.5", "--first-output", "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "mlp, 50% ablated" in result.output
    assert "1 thread, batch 1: 96 neurons ablated, in 2 of 3 layers" in result.output
    assert "1 feed-forward blocks alone" in result.output
    notes = json.loads(file.read_text())["notes"]
    assert all(note in result.output for note in notes)
    (seconds,) = [note for note in notes if "first output" in note]
    doors = ["fanin", "inductor", r"condense\(model\)", r"condense\(model, example_inputs=...\)"]
    assert re.search(
        r"\(s, no compilation kept\): " + ", ".join(rf"{door} \d+\.\d" for door in doors), seconds
    )
    (kept,) = [note for note in notes if "resident" in note]
    shares = [int(share) for share in re.findall(r"\((\d+)%\)", kept)]
    swapped, graph, backend = shares
    assert graph < swapped < 100 < backend  # ablated neurons go; the backend keeps the model's own weights


def test_the_first_output_starts_with_nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(LinearCase(16, 32, 0.9, 4, 1))
    calls = []  # graphs compiled, and the files of the cache after it

    def contender(model: nn.Module, x: torch.Tensor) -> object:
        graphs = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=graphs)

        def run() -> None:
            compiled(x)
            calls.append((graphs.frame_count, os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"])))

        return run

    monkeypatch.setattr("fanin_compile.bench.footprint.FIRST_OUTPUT", {"a": contender, "b": contender})
    seconds = first_output(model, x, threads_used=1)
    assert list(seconds) == ["a", "b"]
    assert all(taken > 0 for taken in seconds.values())
    assert calls == [(1, [])] * 2


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_hidden_neurons_are_ablated_in_every_model(name: str) -> None:
    pytest.importorskip("transformers")
    model = make_model(name, small=True).model
    masks = mask_constant_fan_in(model, 0.9, ablate=0.5)
    transposed = {f"{path}.weight": swapped for path, _, _, swapped in maskable(model)}
    for key, mask in masks.items():
        alive = (mask.t() if transposed[key] else mask).flatten(1).any(1)
        share = 0.5 if is_hidden(key.removesuffix(".weight")) else 0.0
        assert int((~alive).sum()) == round(share * len(alive)), key
    assert any(is_hidden(key.removesuffix(".weight")) for key in masks)


def test_ablation_of_a_model_without_hidden_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("fanin_compile.bench.masking.HIDDEN", ())
    with pytest.raises(
        OptionError, match=r"ablate is 0\.5, expected 0 for mlp: it has 3 masked layers, none"
    ):
        bench_model("mlp", batches=[1], sparsity=0.9, ablate=0.5, threads=[1], seconds=0.0, quick=True)


def test_layers_alone_stand_beside_the_whole(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "model.json"
    result = CliRunner().invoke(app, ["bench", "model", "gpt2-decode", "--quick", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "layers alone" in result.output
    assert "1 thread, batch 1: 8 layers alone (us: fanin " in result.output
    assert "1 thread, batch 1: condensed graph " in result.output
    (row,) = json.loads(file.read_text())["rows"]
    assert set(row["times_us"]) == {"fanin", "condensed module", "condensed graph", "eager"}
    alone = row["layers_alone"]
    assert set(alone["times_us"]) == {"fanin", "condensed module", "eager"}
    assert alone["dense"] == "eager"
    assert alone["ratio"] == pytest.approx(alone["times_us"]["eager"] / alone["times_us"]["fanin"])


def test_layers_alone_get_the_inputs_of_one_call_and_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from fanin_compile.bench.layers_alone import layers_alone, time_alone

    first, second = nn.Linear(8, 8), nn.Linear(8, 4)
    model, x = nn.Sequential(first, nn.ReLU(), first, second), torch.randn(3, 8)
    alone, inputs = layers_alone(model, x, [first, second])
    assert list(alone.layers) == [first, first, second]
    h = first(x).relu()
    expected = [x, h, first(h)]
    assert all(torch.equal(a, b) for a, b in zip(inputs, expected, strict=True))
    assert not first._forward_pre_hooks

    def wrong(model: nn.Module, x: object) -> object:
        return lambda: [y * 1.001 for y in model(x)]

    monkeypatch.setitem(contenders.CONTENDERS, "inductor", wrong)
    with pytest.raises(DisagreementError, match="layer 0 of inductor alone is off by"):
        time_alone(alone, inputs, threads_used=1, contenders=["eager", "inductor"], seconds=0.0)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_removal_in_feed_forward_blocks_stands_beside_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    case = make_model(name, small=True)
    mask_constant_fan_in(case.model, 0.9, ablate=0.5)
    model, x = OneInput(case).eval(), next(iter(case.inputs.values()))
    layers = {path: layer for path, layer, *_ in maskable(case.model)}
    blocks, inputs = feed_forward(model, x, layers)
    assert len(inputs) == 2
    monkeypatch.setattr("fanin_compile.bench.feed_forward.interleaved", lambda runs, seconds: runs)
    with torch.no_grad(), record() as compilations:
        time_removal(blocks, inputs, threads_used=1, seconds=0)
    results = [c.result for c in compilations]
    assert None not in results
    narrowed = [[r for r in result.rewritten if r.became == "narrowed"] for result in results if result]
    assert [len(found) for found in narrowed] == [0, 2]


def test_quick_run_of_the_targets(tmp_path: Path) -> None:
    file, held = tmp_path / "targets.json", ops.scratch_nbytes() / 1024  # by kernels of earlier tests
    result = CliRunner().invoke(app, ["bench", "targets", "--quick", "--threads", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    targets = json.loads(file.read_text())["targets"]
    assert f"of {len(targets)} met" in result.output
    assert all(
        t["met"] == (t["reached"] >= t["aim"] if t["least"] else t["reached"] <= t["aim"]) for t in targets
    )
    assert {t["unit"] for t in targets} == {"x", "%", "us", "", "KiB"}
    by_name = {t["what"]: t["reached"] for t in targets}
    assert by_name["96->64, batch 64: tensors allocated by a call"] == 1
    assert 0 < by_name["scratch of a thread, the most so far"] < max(1024, held + 1)


def test_quick_run_of_a_convolution(tmp_path: Path) -> None:
    file = tmp_path / "conv.json"
    result = CliRunner().invoke(app, ["bench", "conv", "--quick", "--batches", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert "geometric mean" in result.output
    (row,) = json.loads(file.read_text())["rows"]
    assert row["name"] == "512->512 3x3 at 7"
    assert row["ratio"] > 0


def test_quick_run_of_a_depthwise_convolution(tmp_path: Path) -> None:
    file = tmp_path / "depthwise.json"
    command = ["bench", "depthwise", "--quick", "--batches", "1", "--json", str(file)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "mean of ratios" in result.output
    (row,) = json.loads(file.read_text())["rows"]
    assert row["name"] == "960 at 7"
    assert row["ratio"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["linear", "--batches", "one"], "--batches is 'one', expected numbers separated by commas"),
        (["mlp", "--threads", ""], "--threads is '', expected numbers separated by commas"),
        (["conv", "--threads", "1,0"], "--threads is '1,0', expected numbers from 1 on"),
        (["depthwise", "--batches=-1"], "--batches is '-1', expected numbers from 1 on"),
        (["targets", "--threads", "two"], "--threads is 'two', expected numbers separated by commas"),
        (
            ["linear", "--sparsities", "0.9,1"],
            "--sparsities is '0.9,1', expected numbers from 0 to less than 1",
        ),
        (["linear", "--sparsities", "nan"], "--sparsities is 'nan', expected numbers from 0 to less than 1"),
        (["model", "mlp", "--batches", "0.5"], "--batches is '0.5', expected numbers separated by commas"),
        (["model", "vgg"], f"unknown model 'vgg', expected one of {', '.join(sorted(MAKERS))}"),
    ],
)
def test_wrong_options_are_refused_with_what_was_expected(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", "").split())


def test_unknown_models_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown model 'vgg', expected one of bert"):
        make_model("vgg")


def test_all_contenders_agree_on_a_small_layer() -> None:
    bench = bench_linear(
        stack=False, batches=[3], sparsities=[0.9], threads=[1], seconds=0.01, layers=[(48, 64)]
    )
    (row,) = bench.rows
    assert {"fanin", "condensed module", "eager", "inductor", "csr", "gather by tensor ops"} <= set(row.times)
    assert row.nnz_macs == 3 * 48 * 6
    assert bench.roofline is not None
    assert "of peak" in str(bench)


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, x: torch.Tensor) -> object:
        return lambda: model(x) * 1.001

    monkeypatch.setitem(contenders.CONTENDERS, "eager", wrong)
    model, x = build(LinearCase(16, 32, 0.9, 4, 1))
    with pytest.raises(DisagreementError, match="eager is off by"):
        run_case(
            model,
            x,
            name="",
            sparsity=0.9,
            threads_used=1,
            contenders=["eager"],
            seconds=0.0,
            nnz_macs=nnz_of(model),
        )


@pytest.mark.parametrize("kind", ["numbers", "tokens"])
def test_outputs_that_do_not_depend_on_the_input_are_not_compared(kind: str) -> None:
    """Every contender would agree with every other, as it was with MobileNetV2 at its initial weights."""
    model: nn.Module = nn.Linear(8, 4) if kind == "numbers" else nn.Embedding(9, 4)
    x = torch.randn(3, 8) if kind == "numbers" else torch.randint(0, 9, (3, 2))
    model.requires_grad_(False)
    expect_dependence(model, x)
    any_type(model).weight.mul_(1e-4).add_(1 if kind == "tokens" else 0)
    if kind == "numbers":
        any_type(model).bias.fill_(1.0)
    options = {"sparsity": 0.9, "threads_used": 1, "contenders": ["eager"], "seconds": 0.0, "nnz_macs": 1}
    with pytest.raises(
        DisagreementError, match=r"another input changes the output by .*e-0. of the largest, expected more"
    ):
        run_case(model, x, name="", **any_type(options))


def test_targets_and_means() -> None:
    assert target(0.9, 256) == 6.5
    assert target(0.8, 256) == 3.25
    assert target(0.7, 64) == 1.0
    assert target(0.5, 64) is None
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_lines_are_handed_over_between_two_threads_only() -> None:
    with threads(1):
        assert handover_ns() is None
    with threads(2):
        took = handover_ns()
    assert took is None or 1 < took < 1e6  # none: the two share a core just now


def test_roofline_is_plausible() -> None:
    limits = roofline()
    assert 0.1 < limits.macs_per_ns < 1000
    assert limits.stream(1) == limits.read[min(limits.read)]
    assert limits.stream(1 << 40) == limits.read[max(limits.read)]
