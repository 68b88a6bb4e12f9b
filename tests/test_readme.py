"""README.md says what is so: its code runs, its commands and paths exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
pytestmark = pytest.mark.usefixtures("dynamo")


def test_python_blocks_run_top_to_bottom() -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("end", ["fanin demo", "pytest"])
def test_each_of_the_two_commands_is_one_line_of_valid_shell(end: str) -> None:
    lines = re.findall(rf"^python3 -m venv .*{end}$", README, flags=re.MULTILINE)
    assert len(lines) == 1
    subprocess.run(["bash", "-n", "-c", lines[0]], check=True)


def test_paths_it_names_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    code = re.findall(r"`((?:fanin_compile|passes|examples|tests)/[\w/.]*)`", README)
    assert links
    missing = [path for path in {*links, *code} if not (ROOT / path).exists()]
    assert not missing


def test_commands_it_names_exist() -> None:
    from typer.testing import CliRunner

    from fanin_compile.cli import app

    commands = set(re.findall(r"fanin ((?:bench )?[a-z]+)", README))
    assert "demo" in commands
    for command in commands:
        result = CliRunner().invoke(app, [*command.split(), "--help"])
        assert result.exit_code == 0, (command, result.output)
