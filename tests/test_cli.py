from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fanin_compile import demo
from fanin_compile.cli import app
from fanin_compile.demo import DemoResult
from fanin_compile.report import Report

TIMES = {1: {"masked dense": 3.0, "inductor": 2.0, "fanin": 1.0}}


def _result(*, agreement: bool) -> DemoResult:
    return DemoResult(0.98, 0.97, agreement, 1e-7, Report("title", ()), TIMES)


def test_help_and_module_entry() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fanin_compile", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in done.stdout
    assert CliRunner().invoke(app, ["demo", "--help"]).exit_code == 0


@pytest.mark.parametrize("agreement", [True, False])
def test_demo_passes_its_options_on_and_writes_json(
    agreement: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def run(**kwargs: Any) -> DemoResult:
        seen.update(kwargs)
        return _result(agreement=agreement)

    monkeypatch.setattr(demo, "run", run)
    out = tmp_path / "demo.json"
    arguments = ["demo", "--sparsity", "0.8", "--epochs", "3", "--seed", "7", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (0 if agreement else 1)
    assert seen == {"sparsity": 0.8, "epochs": 3, "seed": 7}
    written = json.loads(out.read_text())
    assert written["agreement"] is agreement
    assert written["sparse_accuracy"] == 0.97
    assert written["times_us"] == {"1": TIMES[1]}
    assert written["report"]["title"] == "title"


@pytest.mark.parametrize("arguments", [["--sparsity", "1.5"], ["--epochs", "0"], ["--unknown"]])
def test_demo_refuses_what_makes_no_sense(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["demo", *arguments]).exit_code == 2
