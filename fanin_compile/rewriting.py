"""Dynamo's graph, rewritten by the passes and made ready for inductor."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import torch
from torch import Tensor, fx

from fanin_compile import cost
from fanin_compile.capture import Captured, layer_name, static_target, unlift
from fanin_compile.errors import BuildError
from fanin_compile.graph import attr_tensor
from fanin_compile.kernels import build
from fanin_compile.mask import find_masked_weight
from fanin_compile.options import Options
from fanin_compile.passes import LOWERING, PIPELINE
from fanin_compile.pipeline import Context, Gate, PipelineResult, run_pipeline
from fanin_compile.records import Skip
from fanin_compile.tuning import tuned_gate, tuned_pack

LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.embedding_bag.padding_idx)


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
        warn_once(f"fanin keeps every layer dense: {error}")
        missing = str(error)
        return lambda layer: Skip(layer.name, "no native kernels", {"error": missing})
    if not settings.cost_gate:
        return lambda layer: None
    if settings.max_autotune:  # linears are measured when they are packed
        return lambda layer: None if layer.op == "linear" else cost.gate(layer)
    return cost.gate_for(nbytes)


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def runnable(result: PipelineResult) -> tuple[fx.GraphModule, dict[int, Tensor], tuple[int, ...]]:
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
