"""`torch.compile(model, backend="fanin")`: rewrite masked layers while their weights are real tensors, then inductor.

Registered through the entry-point group `torch_dynamo_backends`, so no import is needed; without an installation,
`torch.compile(model, backend=fanin_compile.fanin)` does the same.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import LocalSource
from torch._inductor import config as inductor_config
from torch.compiler import config as compiler_config

from fanin_compile import cost, guards
from fanin_compile.capture import (
    Captured,
    capture,
    held_tensors,
    layer_name,
    relift,
    seen_from,
    static_position,
    static_target,
    unlift,
)
from fanin_compile.errors import BuildError, RewriteError
from fanin_compile.freshness import Watch, watch_fused_optimizers
from fanin_compile.graph import (
    CONVOLUTIONS,
    Context,
    Evaluator,
    Gate,
    PipelineResult,
    attr_tensor,
    run_pipeline,
    tensor_meta,
)
from fanin_compile.kernels import build
from fanin_compile.mask import find_masked_weight
from fanin_compile.options import Options
from fanin_compile.passes import LOWERING, PIPELINE
from fanin_compile.records import Skip
from fanin_compile.tuning import tuned_gate, tuned_pack

log = logging.getLogger("fanin_compile")

STEM_CHANNELS = 4  # at most, of the images that a network is given
LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.padding_idx)
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
        _warn_once(f"fanin left a graph untouched after {type(error).__name__}: {error}")
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
    if _freezing(settings):
        packed = tuple(sorted({*packed, *_baked(result.graph_module)}))
    inference = [captured.statics[i] for i in packed if inputs[i].is_inference()]
    if inference:
        raise RewriteError(
            f"{', '.join(inference)}: made in inference mode, so changes are not counted; expected normal tensors"
        )
    stems = _only_stems(result.graph_module.graph)
    rewritten, constants, needed = _runnable(result)
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
    return _FreshGraph(compiled, needed, gm, captured, rewritten, constants, settings, packed, inputs)


def _only_stems(graph: fx.Graph) -> bool:
    """Whether the dense convolutions left are few-channelled ones among condensed ones, all of whose images are planar:
    channels_last, which inductor would have them read, takes a copy before and one after."""
    dense = [tensor_meta(node.args[1]) for node in graph.nodes if node.target in CONVOLUTIONS]
    few = all(weight is not None and weight.shape[1] <= STEM_CHANNELS < weight.shape[0] for weight in dense)
    return few and any(node.target is torch.ops.fanin.gather_conv.default for node in graph.nodes)


def _packed(captured: Captured, result: PipelineResult) -> tuple[int, ...]:
    """The positions of static inputs whose values a pass relied on."""
    return tuple(i for i in captured.statics if static_target(i) in result.read)


def _freezing(settings: Options) -> bool:
    """Whether inductor bakes the tensors that a graph holds into its code."""
    return bool(settings.inductor.get("freezing", inductor_config.freezing))


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


def _runnable(result: PipelineResult) -> tuple[fx.GraphModule, dict[int, Tensor], tuple[int, ...]]:
    """The rewritten graph as inductor gets it, the constants it hands out by their positions, and the positions of its
    inputs among the arguments."""
    lowered = run_pipeline(result.graph_module, LOWERING, Context(gate=lambda layer: None)).graph_module
    gm, constants = _take_constant_outputs(unlift(lowered))
    return gm, constants, _drop_unread_inputs(gm)


def _take_constant_outputs(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[int, Tensor]]:
    """Part a graph from the constants it hands out as they are, such as the product torch.nn.utils.prune leaves on a
    module: by position, tensors which are no buffers of ours, so that packing anew never writes to what a user holds.
    """
    (output,) = gm.graph.find_nodes(op="output")
    nodes = output.args[0]
    taken = {i: n for i, n in enumerate(nodes) if isinstance(n, fx.Node) and n.op == "get_attr"}
    output.args = (tuple(n for i, n in enumerate(nodes) if i not in taken),)
    constants = {}
    for i, node in taken.items():
        tensor = attr_tensor(gm, str(node.target))
        constants[i] = tensor.clone()
    return fx.GraphModule(gm, gm.graph), constants


def _drop_unread_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Take the inputs that nothing reads off a graph, hundreds of weights most often; the positions of the others."""
    needed = []
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        if node.users:
            needed.append(i)
        else:
            gm.graph.erase_node(node)
    gm.recompile()
    return tuple(needed)


def rewrite(captured: Captured, settings: Options) -> PipelineResult:
    """Run the passes over a captured graph, reading masks and names from the modules its weights belong to."""
    masks: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    parameters: set[str] = set()
    for i, source in captured.statics.items():
        names[static_target(i)] = layer_name(source)
        tensor = attr_tensor(captured.graph_module, static_target(i))
        owner = captured.owners.get(i)
        module = None if owner is None else owner.module()
        if owner is None or module is None:
            continue
        if owner.name in module._parameters:
            parameters.add(static_target(i))
        if owner.name in vars(module):
            continue  # masks beside plain attributes are factors in the graph
        if tensor.is_floating_point() and tensor.ndim > 1:
            found = find_masked_weight(module, owner.name)
            # the other sources are factors in the graph, or no mask at all
            if found is not None and found.source in ("buffer", "module"):
                masks[static_target(i)] = found.mask
    gate = _gate(settings, _weight_bytes(captured))
    ctx = Context(gate, masks, names, settings.values_dtype, in_place=True, watched=parameters)
    if settings.max_autotune:
        ctx = replace(ctx, pack=tuned_pack, pack_gate=tuned_gate)
    return run_pipeline(captured.graph_module, PIPELINE, ctx)


def _weight_bytes(captured: Captured) -> int:
    """Of the weights that dense layers read at every call: neither masks, which are multiplied in once, nor
    embeddings, of which a call reads a few rows."""
    gm, total = captured.graph_module, 0
    readers: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).extend(node.users)
    for i in captured.statics:
        owner = captured.owners.get(i)
        tensor = attr_tensor(gm, static_target(i))
        looked_up = all(user.target in LOOKUPS for user in readers.get(static_target(i), ()))
        if tensor.is_floating_point() and not (looked_up or (owner and owner.name.endswith("mask"))):
            total += tensor.nbytes
    return total


def _gate(settings: Options, nbytes: int) -> Gate:
    """The gate for a graph with so many bytes of weights."""
    try:
        build.load()
    except BuildError as error:
        if settings.strict:
            raise
        _warn_once(f"fanin keeps every layer dense: {error}")
        missing = str(error)
        return lambda layer: Skip(layer.name, "no native kernels", {"error": missing})
    if not settings.cost_gate:
        return lambda layer: None
    if settings.max_autotune:  # linears are measured when they are packed
        return lambda layer: None if layer.op == "linear" else cost.gate(layer)
    return cost.gate_for(nbytes)


class _FreshGraph:
    """A compiled graph which packs its weights anew, or steps aside, when they are no longer those it was made for."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        needed: tuple[int, ...],
        original: fx.GraphModule,
        captured: Captured,
        rewritten: fx.GraphModule,
        constants: Mapping[int, Tensor],
        settings: Options,
        packed: tuple[int, ...],
        inputs: tuple[Any, ...],
    ) -> None:
        self._compiled: Callable[..., Any] | None = compiled
        self._captured: Captured | None = captured
        self._rewritten: fx.GraphModule | None = rewritten
        self._needed, self._original, self._held = needed, original, captured.held
        self._packed, self._settings = packed, settings
        self._hand_out(constants)
        self._watch = Watch(
            packed, inputs, witnesses=_witnesses(captured, packed), contents=settings.verify_contents
        )
        self._lock = threading.Lock()
        self._frozen = _freezing(settings)
        self._epoch = guards.open_epoch()
        weakref.finalize(self, guards.close_epoch, self._epoch)

    def __call__(self, *args: Any) -> Any:
        compiled, inputs = self._compiled, args + self._held
        if compiled is None:
            return self._original(*args)
        if torch.is_grad_enabled() and any(inputs[i].requires_grad for i in self._packed):
            return self._original(*args)  # unfrozen since: Dynamo does not guard parameters on this
        if not self._fresh(inputs) and not self._repack(inputs):
            return self._original(*args)
        outputs = compiled(*[args[i] for i in self._needed])
        if self._constants:
            outputs = list(outputs)
            for i, tensor, _ in self._constants:
                outputs.insert(i, tensor)
        return outputs

    def _hand_out(self, constants: Mapping[int, Tensor]) -> None:
        self._constants = [(i, constants[i], constants[i]._version) for i in sorted(constants)]

    def _fresh(self, inputs: tuple[Any, ...]) -> bool:
        # a user may have written to what was handed out
        return self._watch.fresh(inputs) and all(t._version == version for _, t, version in self._constants)

    def _repack(self, inputs: tuple[Any, ...]) -> bool:
        """Bring the packed constants up to date; False if their structure changed: the graph is compiled anew."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            captured, current = self._captured, self._rewritten
            if captured is None or current is None:  # another thread was first
                return False
            if self._fresh(inputs):
                return True
            if not self._watch.same_kind(inputs):
                return self._give_up("a weight has another type, dtype, size or stride")
            try:
                relift(captured.graph_module, {i: inputs[i] for i in captured.statics})
                rewritten, constants, _ = _runnable(rewrite(captured, self._settings))
            except Exception as error:
                if self._settings.strict:
                    raise RewriteError(f"fanin could not pack changed weights anew: {error}") from error
                _warn_once(f"fanin could not pack changed weights anew after {type(error).__name__}: {error}")
                return self._give_up("packing failed")
            new, old = dict(rewritten.named_buffers()), dict(current.named_buffers())
            same = not self._frozen and rewritten.code == current.code
            if not same or any(_layout(new[name]) != _layout(old[name]) for name in old):
                return self._give_up("the structure of its masks changed")
            for name, buffer in old.items():
                if buffer is not new[name]:  # else one that Dynamo's graph holds
                    buffer.copy_(new[name])
            self._hand_out(constants)
            self._watch.renew(self._packed, inputs)
            log.info("graph %d: weights changed, packed anew", self._epoch)
            return True

    def _give_up(self, why: str) -> bool:
        log.info("graph %d: %s, compiling anew", self._epoch, why)
        guards.raise_epoch(self._epoch)
        # Dynamo keeps this object, and calls it no more
        self._compiled = self._captured = self._rewritten = None
        return False


def _witnesses(captured: Captured, packed: Sequence[int]) -> list[Tensor]:
    """The batch counters of norms whose running statistics are packed: updating those does not raise their version."""
    counters: dict[int, Tensor] = {}
    for owner in (captured.owners.get(i) for i in packed):
        if owner is not None and owner.name in ("running_mean", "running_var"):
            counter = getattr(owner.module(), "num_batches_tracked", None)
            if isinstance(counter, Tensor):
                counters[id(counter)] = counter
    return list(counters.values())


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()


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


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
