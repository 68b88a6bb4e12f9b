"""The main job, small: a few steps on a few images, every part of the way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from fanin_compile import demo
from fanin_compile.train.data import Dataset, digits
from tests.compile_support import MLP, randn

pytestmark = pytest.mark.usefixtures("dynamo")


def _small(classes: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@pytest.fixture
def data() -> Dataset:
    whole = digits()
    return dataclasses.replace(
        whole,
        train_x=whole.train_x[:480],
        train_y=whole.train_y[:480],
        test_x=whole.test_x[:64],
        test_y=whole.test_y[:64],
    )


def test_the_whole_way(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "digits", lambda: data)
    monkeypatch.setattr(demo, "cnn", _small)
    monkeypatch.setattr(demo, "BATCHES", (1,))
    result = demo.run(sparsity=0.8, epochs=6, seconds=0.0)
    assert result.agreement
    assert result.largest_error < 1e-5
    assert result.dense_accuracy > 0.5  # ten classes: it has learnt
    assert result.sparse_accuracy > 0.5
    assert {layer.name for layer in result.report.layers} == {"0", "3", "5"}
    assert sum(layer.sparsity > 0.5 for layer in result.report.layers) >= 1
    assert set(result.times[1]) == {"masked dense", "inductor", "fanin"}
    printed = capsys.readouterr().out
    for part in (
        "SRigL at 80% sparsity",
        "state_dict",
        "predictions of condensed and compiled equal",
        "over the best dense",
    ):
        assert part in printed


def test_the_demos_model_is_wide() -> None:
    shapes = [tuple(m.weight.shape) for m in demo.cnn() if isinstance(m, nn.Linear)]
    assert shapes == [(3072, 2048), (1024, 3072), (10, 1024)]


def test_compare_finds_a_difference() -> None:
    model, x = MLP(), randn(20, 64)
    assert demo.compare(model, {"same": model}, x)[0]

    def wrong(x: Tensor) -> Tensor:
        y: Tensor = -model(x)
        return y

    agrees, error = demo.compare(model, {"same": model, "wrong": wrong}, x)
    assert not agrees
    assert error > 0.1


def test_training_stops_at_the_sparsity_asked_for(data: Dataset) -> None:
    torch.manual_seed(0)
    model = _small()
    demo.train(model, data, epochs=6, sparsity=0.9, title="sparse")
    weights = [m.weight for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    active = sum(int((w != 0).sum()) for w in weights)
    assert active / sum(w.numel() for w in weights) < 0.11
