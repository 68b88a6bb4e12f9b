"""From the graph Dynamo hands a backend to the passes' dialect and back.

    Dynamo graph                          dialect                            for inductor
    placeholder x, weight, mask    ->     placeholder x, (weight, mask)  ->  placeholder x, weight, mask
    F.linear(x, weight * mask)            aten.linear(x, mul(c1, c2))        gather_matmul(x, values, ...)
                                          get_attr c1 = weight, c2 = mask    get_attr values, ... (buffers)

Parameters stay placeholders of the signature throughout; in between, their uses read get_attr nodes with the real
tensors behind them, so that passes see constants. What no pass replaced reads the placeholder again at the end: later
changes of such a tensor are seen by every call.

Some graphs of Dynamo's hold tensors themselves, behind get_attr nodes: all parameters and buffers while inductor's
freezing is on, tensor attributes of modules that were compiled under it before, tensors given to mark_static_address.
They are constants like the others, at positions past the arguments of a call, and stay get_attr nodes at the end.
"""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch._dynamo.source import LocalSource
from torch._guards import Source, TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from fanin_compile.decompositions import TABLE
from fanin_compile.graph import after_inputs

_PREFIX = "fanin_static_"  # get_attr targets which stand for the placeholder of the same position
_MODULES = r"_modules\['([^']+)'\]"  # the steps of a source expression from module to module


@dataclass(frozen=True)
class Captured:
    """A graph in the passes' dialect.

    Attributes:
        statics: position of each parameter, buffer and tensor attribute -> Dynamo's source expression, for example
            L['self']._modules['fc']._parameters['weight'].
        owners: position -> the module it belongs to and its name there, where Dynamo knows them.
        held: the tensors at the positions past the arguments: those which Dynamo's graph reads as its attributes.
        sources: position of each static input, held or not -> where Dynamo found it, as far as it says.
    """

    graph_module: fx.GraphModule
    statics: Mapping[int, str]
    owners: Mapping[int, Owner]
    held: tuple[Tensor, ...]
    sources: Mapping[int, Source]


@dataclass(frozen=True)
class Owner:
    """Where a static input lives. Held weakly: a compiled graph must not keep a model alive."""

    module: weakref.ref[nn.Module]
    name: str
    root: LocalSource | None  # of the module it was reached from, if that is a local of the frame


def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Captured:
    """Retrace Dynamo's graph to pre-dispatch ATen with its static inputs lifted to constants.

    Must run inside a backend call: it traces in Dynamo's own fake mode, so that symbolic sizes stay symbolic.
    """
    held, arguments = held_tensors(gm), len(example_inputs)
    inputs = (*example_inputs, *held.values())
    nodes = list(gm.graph.find_nodes(op="placeholder"))
    known = getattr(gm, "_param_name_to_source", None) or {}
    sources = [getattr(node, "_dynamo_source", None) for node in nodes] + [known.get(name) for name in held]
    names = [node.name for node in nodes] + list(held)
    statics = {
        i: name if source is None else str(source.name)
        for i, (name, source, value) in enumerate(zip(names, sources, inputs, strict=True))
        if i >= arguments or (isinstance(value, Tensor) and _is_static(nodes[i]))
    }
    aten_gm = _retrace(gm, list(held), sources, inputs)
    lift(aten_gm, {i: inputs[i] for i in statics})
    for node in list(aten_gm.graph.find_nodes(op="placeholder"))[arguments:]:
        aten_gm.graph.erase_node(node)
    aten_gm.recompile()
    found = {i: source for i in statics if (source := sources[i]) is not None}
    return Captured(aten_gm, statics, _owners(sources, statics), tuple(held.values()), found)


def held_tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    """The tensors that a graph of Dynamo's reads as its own attributes, by the target of their get_attr nodes."""
    held = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if isinstance(value, Tensor):  # not the body of a higher-order operator
            held[str(node.target)] = value
    return held


def _is_static(node: fx.Node) -> bool:
    tensor_dict = node.meta.get("tensor_dict") or {}
    return "_dynamo_static_input_type" in tensor_dict


def _retrace(
    gm: fx.GraphModule, held: Sequence[str], sources: Sequence[Source | None], inputs: Sequence[Any]
) -> fx.GraphModule:
    """Trace the graph on fake tensors; the last inputs stand for its attributes `held`."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None and context.fake_mode is not None else FakeTensorMode()
    fakes = []
    for source, value in zip(sources, inputs, strict=True):
        if isinstance(value, Tensor):
            symbolic = context.tensor_to_context.get(value) if context is not None else None
            fakes.append(mode.from_tensor(value, symbolic_context=symbolic, source=source))
        else:
            fakes.append(value)

    for fake in fakes[len(fakes) - len(held) :]:
        for size in (*fake.shape, *fake.stride()):
            int(size)  # with dynamic=True it is symbolic: that of a constant is guarded to stay

    def call(*args: Any) -> Any:
        first = len(args) - len(held)
        attributes = dict(zip(held, args[first:], strict=True))
        return functional_call(gm, attributes, args[:first], tie_weights=False)

    with mode:
        traced = make_fx(call, decomposition_table=TABLE, pre_dispatch=True)(*fakes)
    assert isinstance(traced, fx.GraphModule)
    return traced


def lift(gm: fx.GraphModule, statics: Mapping[int, Tensor]) -> None:
    """Let every use of the placeholders at these positions read a get_attr node holding the given tensor."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    first = after_inputs(gm.graph)
    for i, tensor in statics.items():
        _set_static(gm, i, tensor)
        with gm.graph.inserting_before(first):
            node = gm.graph.get_attr(static_target(i))
        node.meta = dict(placeholders[i].meta)
        placeholders[i].replace_all_uses_with(node)
    gm.recompile()


def relift(gm: fx.GraphModule, statics: Mapping[int, Tensor]) -> None:
    """Put the tensors of a later call behind the get_attr nodes which lift() made."""
    for i, tensor in statics.items():
        _set_static(gm, i, tensor)


def _set_static(gm: fx.GraphModule, i: int, tensor: Tensor) -> None:
    name = static_target(i)
    if hasattr(gm, name):
        delattr(gm, name)
    if isinstance(tensor, nn.Parameter):
        gm.register_parameter(name, tensor)
    else:
        gm.register_buffer(name, tensor)


def static_target(position: int) -> str:
    """The get_attr target that stands for the static input at `position`."""
    return f"{_PREFIX}{position}"


def static_position(target: str) -> int | None:
    """The input position a get_attr target stands for, None if it is another constant."""
    match = re.fullmatch(rf"{_PREFIX}(\d+)", target)
    return int(match[1]) if match else None


def unlift(gm: fx.GraphModule) -> fx.GraphModule:
    """A GraphModule whose lifted get_attr nodes are placeholders again, as far as the graph has them, and which owns
    only the tensors it reads."""
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    for node in list(gm.graph.find_nodes(op="get_attr")):
        position = static_position(str(node.target))
        if position is not None and position < len(placeholders):
            node.replace_all_uses_with(placeholders[position])
            gm.graph.erase_node(node)
    return fx.GraphModule(gm, gm.graph)


def _owners(sources: Sequence[Source | None], statics: Mapping[int, str]) -> dict[int, Owner]:
    """The module each static input is a parameter, buffer or attribute of, by evaluating Dynamo's source of it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        output = InstructionTranslator.current_tx().output
    except AttributeError:  # not within a Dynamo compilation
        return {}
    scope = {"L": output.local_scope, "G": output.global_scope}
    owners = {}
    for i in statics:
        holder, name = _holder(sources[i])
        if holder is None:
            continue
        try:
            # the expression is Dynamo's own, the one its guards evaluate
            module = eval(holder.name, {"__builtins__": {}}, scope)
        except (KeyError, AttributeError, IndexError, NameError, TypeError):
            continue  # a source that needs more than the frame's scope: this input stays nameless
        if isinstance(module, nn.Module):
            owners[i] = Owner(weakref.ref(module), name, _root(holder, output.local_scope))
    return owners


def _holder(source: Source | None) -> tuple[Source | None, str]:
    """From m._parameters['weight'] or m.weight to m and the name."""
    base, member, index = (getattr(source, name, None) for name in ("base", "member", "index"))
    if isinstance(member, str):
        return base, member
    return (getattr(base, "base", None), index) if isinstance(index, str) else (None, "")


def _root(source: Source, local_scope: Mapping[str, object]) -> LocalSource | None:
    while (base := getattr(source, "base", None)) is not None:
        source = base
    if isinstance(source, LocalSource) and isinstance(local_scope.get(source.local_name), nn.Module):
        return source
    return None


def layer_name(source: str) -> str:
    """What people call the layer: L['self']._modules['fc']._parameters['weight'] -> fc, but ['w1'] -> fc.w1."""
    path = re.findall(_MODULES, source)
    if "parametrizations" in path:
        return ".".join(path[: path.index("parametrizations")])
    tensor = re.search(r"(?:_(?:parameters|buffers)\['([^']+)'\]|\.(\w+))$", source)
    name = (tensor[1] or tensor[2]) if tensor else ""
    return ".".join(path if name in ("weight", "weight_orig", "weight_mask") else [*path, name])


def seen_from(model: nn.Module, captured: Captured) -> Captured:
    """The same graph with sources that begin at `model`, in which Dynamo may have captured the frame of a submodule."""
    paths = {module: path for path, module in model.named_modules()}
    statics = dict(captured.statics)
    for i, owner in captured.owners.items():
        module = owner.module()
        if module not in paths or module is _module_at(model, re.findall(_MODULES, statics[i])):
            continue  # no part of the model, or under its own name already, one of several maybe
        steps = (f"._modules['{step}']" for step in paths[module].split("."))
        statics[i] = f"L['self']{''.join(steps)}._parameters['{owner.name}']"
    return replace(captured, statics=statics)


def _module_at(model: nn.Module, path: Sequence[str]) -> nn.Module | None:
    module: nn.Module | None = model
    for step in path:
        module = None if module is None else module._modules.get(step)
    return module
