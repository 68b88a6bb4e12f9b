"""The examples run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_condense_compile() -> None:
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_condense_compile.py")],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert "gather-matmul + relu" in run.stdout
    accuracy = float(run.stdout.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 85
