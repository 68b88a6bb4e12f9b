"""The promise: what `import fanin_compile` offers, and how it is called."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import fanin_compile


def test_names() -> None:
    assert sorted(fanin_compile.__all__) == [
        "BuildError",
        "CondensedWeight",
        "FaninError",
        "FormatError",
        "LayerReport",
        "MaskError",
        "OptionError",
        "Report",
        "RewriteError",
        "SRigL",
        "condense",
        "explain",
        "fanin",
        "refresh",
    ]
    assert all(hasattr(fanin_compile, name) for name in fanin_compile.__all__)


def test_every_public_name_is_documented() -> None:
    undocumented = [n for n in fanin_compile.__all__ if not inspect.getdoc(getattr(fanin_compile, n))]
    assert undocumented == []


def test_signatures() -> None:
    assert list(inspect.signature(fanin_compile.condense).parameters) == [
        *("model", "masks", "filter_fn", "values_dtype", "progress", "example_inputs")
    ]
    assert list(inspect.signature(fanin_compile.explain).parameters) == [
        "model",
        "inputs",
        "options",
        "kwargs",
    ]
    assert list(inspect.signature(fanin_compile.fanin).parameters) == [
        "gm",
        "example_inputs",
        "options",
        "mode",
    ]
    assert not inspect.signature(fanin_compile.refresh).parameters


def test_errors_are_what_people_catch() -> None:
    for name in fanin_compile.__all__:
        value = getattr(fanin_compile, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, fanin_compile.FaninError)
    assert issubclass(fanin_compile.MaskError, ValueError)
    assert issubclass(fanin_compile.BuildError, RuntimeError)


def test_the_version_is_that_of_the_distribution() -> None:
    assert fanin_compile.__version__ == importlib.metadata.version("fanin-compile")


def test_torch_finds_the_backend_without_an_import() -> None:
    code = (
        "import sys, torch\n"
        "assert 'fanin' in torch._dynamo.list_backends()\n"
        "assert 'fanin_compile' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
