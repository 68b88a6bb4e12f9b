"""`explain(model, ...)`: what became of every layer with a mask, through either door, and why the others were left."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile import backend
from fanin_compile.candidates import Candidate, candidates, packed_nbytes, unsupported
from fanin_compile.condensed import CondensedWeight
from fanin_compile.export import MODEL, RESULT, UNSUPPORTED
from fanin_compile.graph import LAYER
from fanin_compile.layers import CondensedConv, CondensedLayer
from fanin_compile.options import Options
from fanin_compile.pipeline import PipelineResult
from fanin_compile.records import Layer, Skip
from fanin_compile.report import LayerReport, Report

# operators without masks that run in kernels of ours
BESIDE = ("append-attention", "cache-attention", "cache-write", "depthwise-conv", "max-pool", "skinny-linear")


def explain(
    model: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """What fanin does, or did, with `model`.

    * a condensed module: its layers as they are, and why the others were left by condense();
    * a masked model with inputs (also one wrapped by torch.compile): what `torch.compile(model, backend="fanin",
      options=options)` does with the graphs these inputs lead to. Nothing is compiled natively;
    * a masked model without inputs: what condense(model) would do.

    Args:
        inputs, kwargs: as for model(*inputs, **kwargs); they set the batch sizes for multiply-adds and costs.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.fx.GraphModule) and isinstance(
        result := model.meta.get(RESULT), PipelineResult
    ):
        notes = _exported_notes(result, model.meta.get(UNSUPPORTED, ()))
        title = f"condense({model.meta[MODEL]}, example_inputs=...)"
        return Report(title, tuple(_graph_layers(result)), tuple(notes))
    if any(isinstance(module, CondensedLayer) for module in model.modules()):
        return _explain_condensed(model, inputs, kwargs)
    if inputs or kwargs:
        return _explain_compiled(model, inputs, kwargs, Options.parse(options))
    return _explain_plan(model)


def _explain_compiled(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> Report:
    def analyse(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        return backend.analyse(gm, example_inputs, options, model)

    with torch.no_grad(), _undisturbed(model), backend.record() as compilations:
        # isolated: must not spend the recompiles of the user's compiled model
        call = torch.compile(model, backend=analyse, isolate_recompiles=True)  # type: ignore[call-overload]  # not in its overloads
        call(*inputs, **kwargs)
    layers: list[LayerReport] = []
    notes: list[str] = []
    for number, compilation in enumerate(compilations):
        if compilation.result is None:
            notes.append(f"graph {number} left untouched: {compilation.untouched}")
        else:
            layers += _graph_layers(compilation.result)
            notes += [_note(skip) for skip in _skipped_beside(compilation.result)]
            notes += _lowered_beside(compilation.result)
    if len(compilations) != 1:
        notes.append(f"Dynamo made {len(compilations)} graphs of this model")
    notes += _unseen(model, {layer.name for layer in layers})
    return Report(f'torch.compile({type(model).__name__}, backend="fanin")', tuple(layers), tuple(notes))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Undo what a call changes: buffers (batch norm in train mode), the random state."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        yield
    for buffer, value in before:
        if not torch.equal(buffer, value):  # batch norm does not raise versions
            buffer.copy_(value)


def _unseen(model: nn.Module, seen: set[str]) -> Iterator[str]:
    """A note for every layer with weights which is in no graph of the call."""
    # a tied weight is seen under the name of its first module
    known = {id(p) for name in seen for p in _own_parameters(model, name)}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.RNNBase):
            yield f"{name}: {kind} stays as it is, one operator of torch holds all its weights"
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and name not in seen:
            if any(id(p) in known for p in module.parameters(recurse=False)):
                continue
            yield f"{name}: {kind} is in no graph that Dynamo captured, or was not called"


def _own_parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    try:
        module = model.get_submodule(name)
    except AttributeError:  # the name of a parameter, or of a further use
        return iter(())
    return module.parameters(recurse=False)


def _graph_layers(result: PipelineResult) -> Iterator[LayerReport]:
    reasons: dict[str, list[str]] = {}
    for skip in result.skipped:
        reasons.setdefault(skip.layer, []).append(str(skip))
    nodes = result.graph_module.graph.nodes
    now: dict[str, Layer] = {layer.name: layer for layer in (n.meta.get(LAYER) for n in nodes) if layer}
    for layer in result.found:
        done = [r for r in result.rewritten if r.layer == layer.name]
        became = next((r for r in done if r.bytes is not None), None)
        fused = [r.detail for r in done if r.became == "epilogue"]
        chained = [f", {r.detail}" for r in done if r.became == "chain"]
        norms = [f"{r.detail} + " for r in done if r.became == "norm"]
        stored = next((r.stored for r in done if r.stored is not None), became and became.bytes)
        refused = reasons.get(layer.name, [])
        # one left dense may have lost its ablated neurons, and columns that nobody fills
        dense = now.get(layer.name, layer) if became is None else layer
        dense_bytes = layer.dense_bytes * dense.dense_size // max(layer.dense_size, 1)
        left = "dense" if dense.shape == layer.shape else "dense, narrowed"
        if any(r.became == "active" for r in done):
            left = "dense, active neurons only"
        yield LayerReport(
            name=layer.name,
            op=layer.op,
            shape=layer.shape,
            fan_in=layer.fan_in,
            sparsity=layer.sparsity,
            ablated=layer.ablated,
            bytes_before=layer.dense_bytes,
            # as in dense_bytes, a weight counts once
            bytes_after=stored if stored and layer.dense_bytes else dense_bytes,
            macs_before=layer.dense_macs,
            macs_after=dense.dense_macs if became is None else became.macs,
            became=left if became is None else "".join([*norms, " ".join([became.became, *fused]), *chained]),
            reason="" if became is not None else (refused or ["no pass took it"])[-1],
            changes=(
                *(r.detail for r in done if r.became in ("activation", "folded", "narrowed", "active")),
                *([became.detail] if became is not None and became.detail else ()),
                *(r.detail for r in done if r.became == "tuned"),
                *(refused if became is not None else refused[:-1]),
            ),
        )


def _explain_condensed(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    positions = _output_positions(model, inputs, kwargs) if inputs or kwargs else {}
    layers: list[LayerReport] = []
    for name, module in model.named_modules():
        if isinstance(module, CondensedLayer):
            conv = isinstance(module, CondensedConv)
            op = f"conv{len(module.shape) - 2}d" if conv else "linear"
            nbytes = sum(t.nbytes for key, t in module.state_dict().items() if key != "bias")
            became = "gather-conv" if conv else "gather-matmul"
            layers.append(_weight_row(name, op, module.condensed, nbytes, became, positions.get(module)))
    layers += _left_rows(model, positions)
    return Report(f"condense({type(model).__name__})", tuple(layers), tuple(_unsupported(model)))


def _explain_plan(model: nn.Module) -> Report:
    layers: list[LayerReport] = []
    for candidate in candidates(model):
        if candidate.weight is not None:
            linear = len(candidate.weight.shape) == 2
            nbytes = packed_nbytes(candidate.module, candidate.weight)
            became = "gather-matmul" if linear else "gather-conv"
            row = _weight_row(candidate.name, _op(candidate), candidate.weight, nbytes, became, None)
            layers.append(row)
    layers += _left_rows(model, {})
    notes = tuple(_unsupported(model))
    return Report(f"condense({type(model).__name__}) would make", tuple(layers), notes)


def _unsupported(model: nn.Module) -> Iterator[str]:
    return (_note(skip) for skip in unsupported(model))


def _exported_notes(result: PipelineResult, unsupported: Sequence[Skip]) -> Iterator[str]:
    """What condense() knows no form of, and what passes said of, or did to, nodes that are no layer."""
    known = {skip.layer for skip in unsupported}
    yield from (_note(skip) for skip in unsupported)
    for skip in _skipped_beside(result):
        if skip.layer.removesuffix("weight").removesuffix(".") not in known:  # a pass names it by its weight
            yield _note(skip)
    yield from _lowered_beside(result)


def _skipped_beside(result: PipelineResult) -> Iterator[Skip]:
    """The refusals that are in no row of the table."""
    found = {layer.name for layer in result.found}
    return (skip for skip in result.skipped if skip.layer not in found)


def _lowered_beside(result: PipelineResult) -> Iterator[str]:
    """What became of operators without masks, alike ones in one note."""
    alike: dict[tuple[str, str], list[str]] = {}
    for done in result.rewritten:
        if done.became in BESIDE:
            alike.setdefault((done.became, done.detail), []).append(done.layer)
    for (became, detail), names in alike.items():
        others = f" and {len(names) - 1} alike" if len(names) > 1 else ""
        yield f"{names[0]}{others}: {became}, {detail}" if detail else f"{names[0]}{others}: {became}"


def _note(skip: Skip) -> str:
    return f"{skip.layer or '(the model)'}: {skip}"


def _left_rows(model: nn.Module, positions: Mapping[nn.Module, int]) -> Iterator[LayerReport]:
    for candidate in candidates(model):
        if candidate.skip is not None:
            weight = CondensedWeight.from_dense(*candidate.found.by_neuron())
            op = _op(candidate)
            row = _weight_row(
                candidate.name, op, weight, weight.dense_nbytes, "dense", positions.get(candidate.module)
            )
            yield LayerReport(**{**asdict(row), "macs_after": row.macs_before, "reason": str(candidate.skip)})


def _op(candidate: Candidate) -> str:
    if isinstance(candidate.module, nn.MultiheadAttention):
        return "attention"
    dims = candidate.found.weight.ndim - 2
    return f"conv{dims}d" if dims else "linear"


def _weight_row(
    name: str, op: str, weight: CondensedWeight, nbytes: int, became: str, positions: int | None
) -> LayerReport:
    counts = weight.row_fan_in()
    return LayerReport(
        name=name,
        op=op,
        shape=weight.shape,
        fan_in=(int(counts.min()), int(counts.max())) if len(counts) else (0, 0),
        sparsity=weight.sparsity,
        ablated=weight.n_ablated,
        bytes_before=math.prod(weight.shape) * weight.values.element_size(),
        bytes_after=nbytes,
        macs_before=None if positions is None else positions * math.prod(weight.shape),
        macs_after=None if positions is None else positions * weight.nnz,
        became=became,
    )


def _output_positions(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[nn.Module, int]:
    """How many output vectors each layer computes in one call of the model: batch, tokens, pixels."""
    positions: dict[nn.Module, int] = {}

    def count(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            out = module.shape[0] if isinstance(module, CondensedLayer) else len(module.weight)  # type: ignore[arg-type]
            positions[module] = positions.get(module, 0) + output.numel() // max(int(out), 1)

    kinds = (CondensedLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad(), _undisturbed(model), _hooked(layers, count):
        model(*inputs, **kwargs)
    return positions


@contextmanager
def _hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
