"""The training examples, each run small."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_evidence_trains_every_method_and_its_table_has_their_means(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    evidence = load("evidence")
    monkeypatch.setattr(evidence, "STEPS", 60)
    data = evidence.digits()
    for build in (evidence.mlp, evidence.cnn):
        assert evidence.run(data, build, "dense", 0.0, seed=0)["accuracy"] > 70
    for method in evidence.METHODS:
        result = evidence.run(data, evidence.mlp, method, 0.9, seed=0)
        assert 0.05 < result["density"] <= 0.1
        assert result["accuracy"] > 70
    rows = [
        {"setting": "digits MLP", "method": method, "sparsity": sparsity, "seed": seed}
        | {
            "accuracy": 90.0 + seed + (method == "SRigL, gamma_sal 0.95"),
            "density": 1 - sparsity,
            "living": 0.75,
        }
        for method in ("dense", *evidence.METHODS)
        for sparsity in ((0.0,) if method == "dense" else evidence.SPARSITIES)
        for seed in range(5)
    ]
    text = evidence.table(rows)
    assert "### digits MLP, 5 seeds; dense 92.00 ± 1.96 %" in text
    assert "| *SRigL, gamma_sal 0.3 - RigL* | 0.00 ± 0.00 |" in text
    assert "| *SRigL, gamma_sal 0.95 - RigL* | 1.00 ± 0.00 |" in text
    assert "| *RigL: active weights* | 20.00% | 10.00% | 5.00% | 1.00% |" in text
    assert "| *RigL: neurons without inputs* | 25% |" in text
    assert evidence.table(rows[:-1]) == "\n", "a setting that was not run to its end is left out"


def test_output_norm_variance_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    load("output_norm_variance").main(str(tmp_path / "plot.png"), samples=1000)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "fan-in  k =  2  0.6042 /" in capsys.readouterr().out


def test_train_overhead_measures_updates_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    overhead = load("train_overhead")
    monkeypatch.setattr(overhead, "DELTA_T", 2)
    layers = overhead.vit_layers(blocks=1, d=16)
    assert sum(p.numel() for p in layers.parameters()) == 12 * 16 * 16
    assert len(overhead.update_seconds(layers, repeats=2)) == 2

    def small() -> tuple[nn.Module, torch.Tensor]:
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(4, 16)

    times = overhead.interleaved([overhead.trainer(small, sparse) for sparse in (False, True)], rounds=3)
    (dense, no_update), (sparse, update) = times
    assert min(dense, sparse, update) > 0
    assert no_update == 0


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_train_ddp_goes_on_from_the_newest_checkpoint_of_both_ranks(tmp_path: Path, layout: str) -> None:
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "examples" / "train_ddp.py"), "--checkpoint", str(tmp_path)]
    command += ["--fsdp"] if layout == "fsdp" else []
    for steps, expected in (("100", "accuracy 0.9"), ("200", "rank 1 goes on from step 100")):
        done = subprocess.run([*command, "--steps", steps], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-4000:]
        assert expected in done.stdout
        assert "rank 1: masks equal rank 0's" in done.stdout
        here = sorted(path.name for path in tmp_path.iterdir())
        assert here == [f"{layout}-{rank}-of-2-step{steps}.pt" for rank in (0, 1)]
        (
            tmp_path / f"{layout}-0-of-2-step150.pt"
        ).touch()  # as if rank 1 had been killed before it wrote its own
