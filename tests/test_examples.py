"""The examples run as a user would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_decode_static_cache() -> None:
    pytest.importorskip("transformers")
    printed = _run("decode_static_cache.py")
    assert "the same tokens: True, True" in printed
    assert "16 of 17 layers" in printed
    assert (
        "scaled_dot_product_attention and 3 alike: cache-attention, keys of a cache where they are" in printed
    )


def test_train_condense_compile() -> None:
    printed = _run("train_condense_compile.py")
    assert "gather-matmul + relu" in printed
    accuracy = float(printed.split("test accuracy ")[1].split("%")[0])
    assert accuracy > 85


def _run(name: str) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
