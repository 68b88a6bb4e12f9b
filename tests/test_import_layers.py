"""Imports point down: a file imports only from layers below its own, wherever in the file the import stands."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

import fanin_compile

ROOT = Path(fanin_compile.__file__).parent

# From the lowest up. What stands in a line may import from the lines above it, not from its own; a package named here
# stands for all its modules, which may import each other as long as there is no circle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "records", "timing", "decompositions"),  # facts and means, nothing of ours beneath
    ("axes",),  # facts about the elements of tensors, along few axes
    ("neurons",),  # facts about neurons: who is tied to whom, who reads them
    ("mask",),  # every mask source -> one bool mask
    ("masking",),  # putting one on a module
    ("condensed",),  # the format
    ("structure", "norm"),  # numbers and arrays in one tensor of bytes; the norm of an input in one of floats
    ("packed",),  # the format in the order of the kernels
    ("packing", "packed_conv"),  # from one to the other; the same of convolutions
    ("packing_conv",),
    ("kernels.build", "kernels.__init__"),  # C++ sources -> a library
    ("ops",),  # the operators, each with its plain-torch reference
    ("ops_chain", "ops_conv", "ops_skinny"),
    ("ops_attention", "ops_depthwise", "ops_pool"),
    ("program",),  # operators in the order in which they run, as text
    ("ops_program",),  # as one operator
    ("kernels.variants",),  # one table of kernel variants
    ("layers", "options", "attributes", "freshness", "cost", "tuning"),
    ("guards",),  # what the backend asks of Dynamo
    ("graph",),  # what passes share
    ("effects", "capture", "pointwise"),
    ("evaluator",),  # what is the same at every call
    ("pipeline",),  # how passes run
    ("moves",),  # where operators take the elements of tensors
    ("attention", "planar"),  # the same for what attention averages; who stands beside planar images
    ("channels",),  # which are constant
    ("labels",),  # which neuron each belongs to
    ("liveness",),  # which are read
    ("passes",),  # one rewrite a file
    ("export", "candidates", "rewriting"),
    ("fresh_graph",),  # weights that change
    ("condense", "backend"),  # the two doors
    ("report",),  # what became of each layer
    ("explain",),  # of a model, by either door
    ("train",),  # learning such models: uses masks and the format alone, see TRAIN
    ("bench", "demo"),
    ("cli",),
    ("__init__", "__main__"),
)
# The side branch knows nothing of compilation, so that training code can be read and used by itself.
TRAIN = ("errors", "records", "timing", "mask", "condensed")


def _modules() -> dict[str, Path]:
    """Module name below the package -> file; the link passes/ is followed."""
    files = [*ROOT.glob("*.py"), *(f for d in ROOT.iterdir() if d.is_dir() for f in d.glob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package which `path` imports, also within functions."""
    package = ["fanin_compile", *name.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.add(source)
            found.update(f"{source}.{alias.name}" for alias in node.names)
    ours = {f.removeprefix("fanin_compile").lstrip(".") for f in found if f.split(".")[0] == "fanin_compile"}
    ours = {f or "__init__" for f in ours}
    # `from fanin_compile import cost` reads the package, too; what counts is the submodule
    targets = {
        f if f in modules else f"{f}.__init__" for f in ours if f in modules or f"{f}.__init__" in modules
    }
    if any(t != "__init__" for t in targets):
        targets.discard("__init__")
    return targets - {name}


def _rank(name: str) -> int:
    for rank, layer in enumerate(LAYERS):
        if name in layer or name.split(".")[0] in layer:
            return rank
    raise AssertionError(f"{name} has no place in LAYERS")


@pytest.fixture(scope="module")
def edges() -> list[tuple[str, str]]:
    modules = _modules()
    assert {"backend", "passes.fuse_epilogue", "kernels.build", "train.srigl"} <= modules.keys()
    return [(name, target) for name, path in modules.items() for target in _imports(name, path, modules)]


def test_every_module_has_a_place() -> None:
    for name in _modules():
        _rank(name)


def test_imports_point_down(edges: list[tuple[str, str]]) -> None:
    wrong = [
        f"{source} imports {target}"
        for source, target in edges
        if _rank(source) <= _rank(target)
        and not (
            source.split(".")[0] == target.split(".")[0] and "." in source and _rank(source) == _rank(target)
        )
    ]
    assert not wrong


def test_there_is_no_circle(edges: list[tuple[str, str]]) -> None:
    graph = nx.DiGraph(edges)
    assert list(nx.simple_cycles(graph)) == []


def test_passes_know_no_other_pass(edges: list[tuple[str, str]]) -> None:
    assert not [
        (source, target)
        for source, target in edges
        if source.startswith("passes.") and source != "passes.__init__" and target.startswith("passes.")
    ]


def test_training_stands_on_masks_and_the_format_alone(edges: list[tuple[str, str]]) -> None:
    targets = {t for s, t in edges if s.startswith("train.") and not t.startswith("train.")}
    assert targets <= set(TRAIN)


def test_what_the_checks_read_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "from . import cost\nfrom .graph import Pass\nimport fanin_compile.report\n"
        "def f():\n    from fanin_compile.train import SRigL\n    from fanin_compile import guards\n"
    )
    assert _imports("x", file, _modules()) == {"cost", "graph", "report", "train.__init__", "guards"}
    assert _imports("passes.x", file, _modules()) >= {"report", "train.__init__", "guards"}
