"""`torch.compile(model, backend="fanin")`: rewrite masked layers while their weights are real tensors, then inductor.

Registered through the entry-point group `torch_dynamo_backends`, so no import is needed; without an installation,
`torch.compile(model, backend=fanin_compile.fanin)` does the same.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import LocalSource
from torch.compiler import config as compiler_config

from fanin_compile import guards
from fanin_compile.capture import Captured, capture, held_tensors, seen_from, static_position, static_target
from fanin_compile.errors import RewriteError
from fanin_compile.evaluator import Evaluator
from fanin_compile.fresh_graph import FreshGraph, freezing
from fanin_compile.freshness import watch_fused_optimizers
from fanin_compile.graph import CONVOLUTIONS, tensor_meta
from fanin_compile.options import Options
from fanin_compile.pipeline import PipelineResult
from fanin_compile.rewriting import rewrite, runnable, warn_once

log = logging.getLogger("fanin_compile")
STEM_CHANNELS = 4  # at most, of the images that a network is given
_recorders: list[list[Compilation]] = []


@dataclass(frozen=True)
class Compilation:
    """What the backend did with one graph, for reports."""

    result: PipelineResult | None  # None if the graph was handed on untouched
    untouched: str = ""  # why

    @property
    def rewritten_layers(self) -> set[str]:
        return {r.layer for r in self.result.rewritten} if self.result else set()


@contextmanager
def record() -> Iterator[list[Compilation]]:
    """Collect a Compilation for every graph compiled in this block, in order."""
    compilations: list[Compilation] = []
    _recorders.append(compilations)
    try:
        yield compilations
    finally:
        _recorders[:] = [r for r in _recorders if r is not compilations]


def fanin(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The backend. Called by torch.compile; `options` are the fields of fanin_compile.options.Options.

    Raises:
        OptionError: an unknown option or mode, or a value out of range.
        RewriteError: with options={"strict": True}, any failure which would otherwise leave the graph untouched.
    """
    settings = Options.parse(options, mode)
    watch_fused_optimizers()
    guards.discount_dropped_graphs()
    try:
        return _compile(gm, example_inputs, settings)
    except TensorifyScalarRestartAnalysis:
        raise  # no failure: Dynamo traces anew, with numbers where it had symbols
    except Exception as error:
        if settings.strict:
            raise RewriteError(f"fanin could not compile a graph: {error}") from error
        warn_once(f"fanin left a graph untouched after {type(error).__name__}: {error}")
        _record(Compilation(None, f"{type(error).__name__}: {error}"))
        return settings.finish(gm, example_inputs)


def analyse(
    gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Options, model: nn.Module
) -> Callable[..., Any]:
    """A backend that runs the passes for their report and then the graph as it is; nothing is compiled.

    Layers get the names they have in `model`, also in the frames of its submodules.
    """
    try:
        if reason := _untouchable(gm, example_inputs):
            _record(Compilation(None, reason))
        else:
            with torch.inference_mode(False), torch.no_grad():
                captured = seen_from(model, capture(gm, example_inputs))
                result = rewrite(captured, settings)
            _record(Compilation(result))
            _bind_to_modules(captured, _packed(captured, result))
    except Exception as error:
        if settings.strict:
            raise RewriteError(f"fanin could not analyse a graph: {error}") from error
        _record(Compilation(None, f"{type(error).__name__}: {error}"))
    return gm.forward


def _untouchable(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """Why a graph must be handed on as it is, if so."""
    inputs = (*example_inputs, *held_tensors(gm).values())
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
        return "gradients are enabled and needed: weights are not constant (use torch.no_grad())"
    for node in gm.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast):
        device, _, enabled, *_ = node.args
        if device == "cpu" and enabled != torch.is_autocast_enabled("cpu"):
            # retracing records these regions without entering them: dtypes would be wrong from there on
            return "torch.autocast is switched within the graph (wrap the call of the model instead)"
    return ""


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Options) -> Callable[..., Any]:
    if reason := _untouchable(gm, example_inputs):
        _record(Compilation(None, reason))
        return settings.finish(gm, example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        captured = capture(gm, example_inputs)
        result = rewrite(captured, settings)
    _record(Compilation(result))
    if not result.rewritten:
        return settings.finish(gm, example_inputs)
    inputs = (*example_inputs, *captured.held)
    packed = _packed(captured, result)
    if freezing(settings):
        packed = tuple(sorted({*packed, *_baked(result.graph_module)}))
    inference = [captured.statics[i] for i in packed if inputs[i].is_inference()]
    if inference:
        raise RewriteError(
            f"{', '.join(inference)}: made in inference mode, so changes are not counted; expected normal tensors"
        )
    stems = _only_stems(result.graph_module.graph)
    rewritten, constants, needed = runnable(result)
    patches: dict[str, object] = {"size_asserts": False}  # 3 of 9 us a layer go into them at every call
    if stems:
        patches["layout_optimization"] = False
    with _own_cache_key():
        compiled = settings.finish(rewritten, [example_inputs[i] for i in needed], **patches)
    _bind_to_modules(captured, packed)
    arguments = len(example_inputs)
    guards.keep_tensors(source for i, source in captured.sources.items() if i >= arguments)
    guards.leave_to_us(captured.sources[i] for i in packed if i < arguments and i in captured.sources)
    guards.walk_attributes(_roots(captured, packed))
    return FreshGraph(compiled, needed, gm, captured, rewritten, constants, settings, packed, inputs)


def _only_stems(graph: fx.Graph) -> bool:
    """Whether the dense convolutions left are few-channelled ones among condensed ones, all of whose images are planar:
    channels_last, which inductor would have them read, takes a copy before and one after."""
    dense = [tensor_meta(node.args[1]) for node in graph.nodes if node.target in CONVOLUTIONS]
    few = all(weight is not None and weight.shape[1] <= STEM_CHANNELS < weight.shape[0] for weight in dense)
    return few and any(node.target is torch.ops.fanin.gather_conv.default for node in graph.nodes)


def _packed(captured: Captured, result: PipelineResult) -> tuple[int, ...]:
    """The positions of static inputs whose values a pass relied on."""
    return tuple(i for i in captured.statics if static_target(i) in result.read)


def _baked(gm: fx.GraphModule) -> set[int]:
    """The positions of what freezing bakes in of Dynamo's tensors: those held by the graph that nothing writes to."""
    evaluator, arguments = Evaluator(gm), len(list(gm.graph.find_nodes(op="placeholder")))
    constants = (str(n.target) for n in gm.graph.find_nodes(op="get_attr") if evaluator.is_constant(n))
    positions = (static_position(target) for target in constants)
    return {i for i in positions if i is not None and i >= arguments}


def _bind_to_modules(captured: Captured, packed: Sequence[int]) -> None:
    guards.bind_to(_roots(captured, packed))


def _roots(captured: Captured, packed: Sequence[int]) -> Iterator[LocalSource]:
    owners = (captured.owners.get(i) for i in packed)
    return (owner.root for owner in owners if owner is not None and owner.root is not None)


@contextmanager
def _own_cache_key() -> Iterator[None]:
    """Key inductor's cache entries of our graphs by the content of this package: an edit never meets an old one."""
    tag = f"{compiler_config.cache_key_tag}fanin-{_source_hash()}"
    with compiler_config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]  # installed at run time
        yield


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".inc")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _record(compilation: Compilation) -> None:
    for compilations in _recorders:
        compilations.append(compilation)
