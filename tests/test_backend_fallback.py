"""Whatever fails within the backend: one warning that says so and the right result, or an error if strict."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fanin_compile import OptionError, RewriteError, backend, rewriting
from fanin_compile.options import Options
from fanin_compile.passes import PIPELINE
from tests.compile_support import MLP, STRICT, assert_equals_dense, randn, recorded

pytestmark = pytest.mark.usefixtures("dynamo")


def _raise(*args: object, **kwargs: object) -> Any:
    raise ValueError("injected")


def _broken_pass(gm: object, ctx: object) -> Any:
    raise KeyError("injected")


def _broken_finish(original: Any) -> Any:
    """Inductor refuses the rewritten graph, and takes the untouched one."""
    calls: list[int] = []

    def finish(self: Any, gm: torch.fx.GraphModule, inputs: Any, **patches: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("injected")
        return original(self, gm, inputs, **patches)

    return finish


@pytest.fixture(params=["capture", "pass", "rewrite", "inductor"])
def broken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    part = str(request.param)
    if part == "pass":
        monkeypatch.setattr(rewriting, "PIPELINE", (*PIPELINE[:1], _broken_pass))
    elif part == "inductor":
        monkeypatch.setattr(Options, "finish", _broken_finish(Options.finish))
    else:
        monkeypatch.setattr(backend, part, _raise)
    return part


def test_one_warning_and_the_right_result(broken: str) -> None:
    model, x = MLP(), randn(5, 64)
    f = torch.compile(model, backend="fanin", options={"cost_gate": False})
    with recorded() as compilations, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in (5, 5, 3):
            x = randn(batch, 64)
            assert_equals_dense(f(x), model, x)
    ours = [str(w.message) for w in caught if "fanin" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].startswith("fanin left a graph untouched after ")
    assert "injected" in ours[0]
    assert "injected" in next(c.untouched for c in compilations if c.result is None)


def test_strict_raises(broken: str) -> None:
    f = torch.compile(MLP(), backend="fanin", options=STRICT)
    with torch.no_grad(), pytest.raises(Exception, match="injected") as caught:
        f(randn(5, 64))
    chain = []
    error: BaseException | None = caught.value
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    assert any(isinstance(e, RewriteError) for e in chain)
    if broken == "pass":
        assert "pass _broken_pass failed (passes before it: write_as_linears)" in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"options": {"stritc": True}}, "unknown option 'stritc' .did you mean strict."),
        ({"mode": "fastest"}, "unknown mode 'fastest', expected one of "),
        ({"options": {"values_dtype": torch.int8}}, "values_dtype is torch.int8, expected None or one of"),
    ],
)
def test_options_are_refused_by_name(kwargs: dict[str, Any], message: str) -> None:
    f = torch.compile(MLP(), backend="fanin", **kwargs)
    with torch.no_grad(), pytest.raises(Exception, match=message) as caught:
        f(randn(5, 64))
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, OptionError):
        error = error.__cause__ or error.__context__
    assert isinstance(error, OptionError)


def test_a_mode_of_inductor_is_taken() -> None:
    model, x = MLP(), randn(5, 64)
    f = torch.compile(model, backend="fanin", mode="max-autotune-no-cudagraphs")
    with torch.no_grad():
        assert_equals_dense(f(x), model, x)


NO_COMPILER = f"""
import sys, warnings, torch
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.compile_support import MLP, assert_equals_dense, randn
import fanin_compile
model, x = MLP(), randn(5, 64)
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    condensed = fanin_compile.condense(model)
    assert_equals_dense(condensed(x), model, x)
    report = fanin_compile.explain(model, x)
    assert not report.rewritten
    assert "no native kernels" in str(report) and "/nowhere/g++" in str(report)
    f = torch.compile(model, backend=lambda gm, ex: fanin_compile.backend._compile(
        gm, ex, fanin_compile.backend.Options()))
    # inductor needs a compiler as well
    fanin_compile.backend.Options.finish = lambda self, gm, ex, **patches: gm.forward
    assert_equals_dense(f(x), model, x)
ours = [str(w.message) for w in caught if "fanin keeps every layer dense" in str(w.message)]
assert len(ours) == 1, caught
print(ours[0])
"""


def test_without_a_compiler_the_message_names_it_and_results_are_right(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "FANIN_CACHE_DIR": str(tmp_path),
        "CXX": "/nowhere/g++",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-c", NO_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "C++ compiler '/nowhere/g++' not found: install g++" in done.stdout
