"""The training report: its numbers by eye, its table, plot, JSON and TensorBoard events."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.errors import FaninError, OptionError
from fanin_compile.train import SRigL, Static, TrainingReport
from tests.train_support import batch, mlp, train


def start(**options: object) -> SRigL:
    model = mlp(20, 40, 10)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    settings = {
        "total_steps": 40,
        "delta_t": 4,
        "sparsity": 0.8,
        "allocation": "uniform",
        "dense_first": False,
    }
    return SRigL(model, optimizer, **(settings | options))  # type: ignore[arg-type]


def test_the_first_record_by_eye() -> None:
    sparse = start(grad_steps=2)
    report = TrainingReport(sparse, [batch(sparse.model, 0)])
    first, second = report.record().layers
    assert (first.neurons, first.dense_fan_in, first.fan_in, first.ablated) == (40, 20, 4, 0)
    assert (first.active, first.explored, first.inference_macs) == (160, 0.2, 160)
    # three products with 160 weights; every other step of four, the third of them is dense
    assert first.training_macs == 3 * 160 + (800 - 160) / 2
    assert (second.fan_in, second.inference_macs) == (8, 80)
    assert report.to_dict()["dense_macs"] == 800 + 400
    assert report.history[0].sparsity == pytest.approx(0.8)


def test_multiply_adds_of_the_whole_model_by_eye() -> None:
    """A dense first layer of 20 x 40, a sparse second one of 40 x 10 at 80 %: 800 + 80 of 1200."""
    sparse = start(dense_first=True)
    report = TrainingReport(sparse, [batch(sparse.model, 0)])
    snapshot = report.record()
    assert snapshot.inference_macs == 800 + 80
    # thrice that, and in one step of four the gradient of the weight is dense
    assert snapshot.training_macs == 3 * (800 + 80) + (400 - 80) / 4
    assert str(report).splitlines()[-1].endswith(", multiply-adds 73.3% of dense, 75.6% in training")
    without = TrainingReport(sparse)
    assert without.record().inference_macs is None
    assert "multiply-adds" not in str(without)


def test_history_follows_ablation_and_exploration() -> None:
    sparse = start(gamma_sal=1.0, alpha=0.9)
    report = TrainingReport(sparse)
    for _ in range(8):
        report.record()
        train(sparse.model, sparse.optimizer, sparse, 5)
    last = report.record(accuracy=0.5)
    layer = sparse.layers[0]
    alive = int(layer.mask.any(dim=1).sum())
    assert last.layers[0].ablated == 40 - alive > 0
    assert last.layers[0].fan_in == 160 // alive
    assert last.explored > report.history[0].explored == pytest.approx(0.2)
    assert last.ablated == (40 - alive) / 50
    assert last.layers[0].inference_macs is None
    assert [snapshot.step for snapshot in report.history] == list(range(0, 45, 5))


def test_dense_gradients_are_free_once_the_topology_is_final() -> None:
    model = mlp(20, 40, 10)
    static = Static(model, torch.optim.SGD(model.parameters(), 0.1), sparsity=0.8)
    layer = TrainingReport(static, [batch(model, 0)]).record().layers[0]
    assert layer.inference_macs is not None
    assert layer.training_macs == 3 * layer.inference_macs
    sparse = start()
    assert sparse.dense_gradient_share == 0.25
    train(sparse.model, sparse.optimizer, sparse, 28)  # the last update; t_end is 30
    assert sparse.dense_gradient_share == 0.0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, stride=2, groups=2)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        y: Tensor = self.head(self.mha(tokens, tokens, value=tokens[:, :])[0])
        return y


def test_multiply_adds_count_positions_and_tokens() -> None:
    model = Mixed()
    static = Static(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        sparsity=0.5,
        allocation="uniform",
        dense_first=False,
    )
    states = TrainingReport(static, [torch.randn(3, 2, 7, 9)]).record().layers
    # the convolution gives 3 x 4 positions, which are the tokens of everything after it
    assert {s.name: s.inference_macs for s in states} == {
        "conv.weight": 8 * 4 * 12,
        "mha.in_proj_weight": 24 * 4 * 12,
        "mha.out_proj.weight": 8 * 4 * 12,
        "head.weight": 4 * 4 * 12,
    }
    assert model.training, "the forward that counts leaves the mode as it was"


def test_table_json_and_order() -> None:
    sparse = start(exclude="2")
    report = TrainingReport(sparse, [batch(sparse.model, 0)])
    assert str(report) == "nothing recorded yet"
    train(sparse.model, sparse.optimizer, sparse, 3)
    report.record(accuracy=0.25)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "layer",
        "shape",
        "fan-in",
        "sparsity",
        "ablated",
        "explored",
        "MAC",
        "MAC",
        "training",
    ]
    assert lines[2].split() == ["0.weight", "40", "x", "20", "4", "80.0%", "0", "20.0%", "160", "640"]
    assert lines[3].split() == ["2.weight", "excluded"]
    assert lines[4].startswith("step 3: sparsity 80.00%")
    assert lines[4].endswith("accuracy 0.25")
    data = json.loads(report.to_json())
    assert (data["method"], data["history"][0]["step"]) == ("SRigL", 3)
    assert data["history"][0]["layers"][0]["fan_in"] == 4
    sparse.load_state_dict(sparse.state_dict() | {"steps": 1})
    with pytest.raises(OptionError, match="step 1 after step 3"):
        report.record()


@pytest.mark.parametrize("keep_masks", [True, False])
def test_what_was_learnt_is_reported_after_finalize(keep_masks: bool) -> None:
    sparse = start(gamma_sal=1.0, alpha=0.9)
    report = TrainingReport(sparse)
    train(sparse.model, sparse.optimizer, sparse, 20)
    before, described = report.record(), repr(sparse).splitlines()[1:]
    assert before.explored > 1 - before.sparsity
    sparse.finalize(keep_masks=keep_masks)
    assert report.record() == before
    assert repr(sparse).splitlines() == ["SRigL at step 20, finalized", *described]
    assert str(report).splitlines()[-1].startswith("step 20, finalized: sparsity")


def test_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    sparse = start()
    report = TrainingReport(sparse)
    with pytest.raises(FaninError, match="nothing to plot"):
        report.plot(tmp_path / "empty.png")
    report.record()
    train(sparse.model, sparse.optimizer, sparse, 5)
    report.record(accuracy=0.5)
    report.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(FaninError, match=r"fanin-compile\[plot\]"):
        report.plot(tmp_path / "other.png")


def test_tensorboard_events_hold_the_history(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    sparse = start()
    writer = SummaryWriter(str(tmp_path))
    report = TrainingReport(sparse, [batch(sparse.model, 0)], writer=writer)
    for _ in range(3):
        report.record(accuracy=0.1 * sparse.steps)
        train(sparse.model, sparse.optimizer, sparse, 4)
    writer.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    fan_in = [(event.step, event.value) for event in events.Scalars("fan_in/0.weight")]
    assert fan_in == [(s.step, s.layers[0].fan_in) for s in report.history]
    assert len(events.Scalars("metrics/accuracy")) == 3
    for name in ("inference", "training"):
        macs = [event.value for event in events.Scalars(f"macs/{name}")]
        assert macs == [getattr(snapshot, f"{name}_macs") for snapshot in report.history]
