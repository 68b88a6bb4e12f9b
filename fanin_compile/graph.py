"""What passes share: facts on nodes, and helpers that make and change them.

The dialect is pre-dispatch ATen in a `torch.fx.GraphModule` whose weights are `get_attr` nodes with real tensors behind
them, as both doors produce it: the backend from Dynamo's graph, `condense(..., example_inputs=...)` from torch.export.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import Argument, map_arg

from fanin_compile import ops_conv, ops_depthwise, ops_pool, ops_skinny  # noqa: F401  (they define operators)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import RewriteError
from fanin_compile.records import Skip

# the forward convolutions of captured graphs, each with its number of kernel dimensions
CONVOLUTIONS = {
    getattr(getattr(torch.ops.aten, f"conv{dims}d"), overload): dims
    for overload in ("default", "padding")
    for dims in (1, 2, 3)
}

# ours, which keep images planar; of the last, x is the only tensor
PLANAR = (
    torch.ops.fanin.gather_conv.default,
    torch.ops.fanin.depthwise_conv.default,
    torch.ops.fanin.max_pool.default,
)

# node.meta keys; replace_node carries them over, so they survive every rewrite of a node
LAYER = "fanin_layer"  # the Layer it computes
CONDENSED = "fanin_condensed"  # the CondensedWeight of its constant weight
REFUSAL = "fanin_refusal"  # the Skip that says why it is left dense
NAME = "fanin_name"  # of a dense layer in reports, where its weight is a new constant

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_refuses(node: fx.Node, name: str, weight: CondensedWeight, x: object, bias: object) -> Skip | None:
    """Why no native kernel can compute `node`, the layer `name` of input node x and bias node, if so."""
    out_meta, meta, bias_meta = tensor_meta(node), tensor_meta(x), tensor_meta(bias)
    dtype = weight.values.dtype
    if out_meta is None or meta is None:
        return Skip(name, "its input or output is no tensor")
    if {meta.dtype, out_meta.dtype} != {dtype}:
        values: dict[str, object] = {"input": meta.dtype, "weight": dtype, "output": out_meta.dtype}
        return Skip(name, "input, weight and output differ in dtype, as under autocast", values)
    if dtype not in KERNEL_DTYPES:
        return Skip(name, "no kernel for this dtype", {"dtype": dtype})
    if meta.device.type != "cpu":
        return Skip(name, "no kernel for this device", {"device": meta.device.type})
    if bias_meta is not None and (
        tuple(bias_meta.shape) != weight.shape[:1]
        or not bias_meta.is_contiguous()
        or bias_meta.dtype != dtype
    ):
        values = {"shape": tuple(bias_meta.shape), "strides": bias_meta.stride(), "dtype": bias_meta.dtype}
        return Skip(name, "its bias is not a plain vector of its outputs", values)
    return None


def replace_node(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
    """Put a call of `target` in the place of `node`: same users, same meta (value, stack trace, layer)."""
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def renew_value(graph: fx.Graph, node: fx.Node) -> None:
    """Compute node.meta["val"] from its arguments' values, for a new node or after those changed their shapes."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    # composite operators ask for sizes as numbers, which would fix symbolic ones, unless Python decomposes them
    with fake_mode(graph) or contextlib.nullcontext(), enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)
    node.meta.pop("tensor_meta", None)


def fake_mode(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode the graph's values were traced in."""
    for node in graph.nodes:
        if isinstance(val := node.meta.get("val"), FakeTensor):
            return val.fake_mode
    return None


def bind_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call to an operator by name, in schema order, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        else:
            bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return bound


def spread(value: int | list[int], dims: int) -> list[int]:
    """A convolution's argument as one number for each kernel dimension."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * dims if len(numbers) == 1 else numbers


def set_layer_weight(gm: fx.GraphModule, node: fx.Node, weight: CondensedWeight, bias: Tensor | None) -> None:
    """Give a linear or convolution node a new constant weight and bias, registered for it."""
    value = weight.to_dense()
    old = tensor_meta(node.args[1])
    value = value if old is None else in_format_of(value, old)
    dense = add_constant(gm, node, f"{node.name}_weight", value)
    bias_node = None if bias is None else add_constant(gm, node, f"{node.name}_bias", bias)
    use_layer_weight(node, (dense, bias_node), weight)


def in_format_of(weight: Tensor, old: Tensor) -> Tensor:
    """`weight` in the memory format of the one it stands for, which torch's convolutions give to their outputs."""
    format = suggest_memory_format(old)
    return weight if suggest_memory_format(weight) == format else weight.clone(memory_format=format)


def use_layer_weight(node: fx.Node, constants: Sequence[Argument], weight: CondensedWeight) -> None:
    """Give a linear or convolution node the weight and bias nodes of `constants`, which stand for `weight`."""
    node.args = (node.args[0], *constants, *node.args[3:])
    node.meta[CONDENSED] = weight
    node.meta[LAYER] = node.meta[LAYER].with_weight(weight.shape, weight.nnz, weight.n_ablated)


def attr_tensor(gm: fx.GraphModule, target: str) -> Tensor:
    value = operator.attrgetter(target)(gm)
    if not isinstance(value, Tensor):
        raise RewriteError(f"get_attr {target} holds a {type(value).__name__}, expected a Tensor")
    return value


def add_constant(gm: fx.GraphModule, before: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Register `value` as buffer `name` (made unique) of `gm` and return its get_attr node, placed before `before`."""
    unique, i = name, 0
    while hasattr(gm, unique):
        i += 1
        unique = f"{name}_{i}"
    gm.register_buffer(unique, value.detach())
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(unique)
    fake = next(
        (
            val.fake_mode
            for n in gm.graph.nodes
            if isinstance(val := n.meta.get("val"), torch._subclasses.FakeTensor)
        ),
        None,
    )
    node.meta["val"] = (
        fake.from_tensor(value.detach(), static_shapes=True) if fake is not None else value.detach()
    )
    return node


def after_inputs(graph: fx.Graph) -> fx.Node:
    """The first node which is no placeholder: constants go before it, so that every user comes after."""
    node: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return node


def constant_name(weight: fx.Node, names: Mapping[str, str]) -> str | None:
    """That of the first constant which `weight` is made of."""
    stack = [weight]
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            return names.get(str(node.target), str(node.target))
        stack.extend(reversed(node.all_input_nodes))
    return None


def layer_label(node: fx.Node, names: Mapping[str, str]) -> str:
    """The name in the report of the layer that a linear operator of ours computes."""
    if LAYER in node.meta:
        return str(node.meta[LAYER].name)
    values = bind_arguments(node)["values"]  # of a layer that condense() made
    return names.get(str(values.target), node.name).removesuffix(".values")


class ConstantNodes:
    """Registers what stands for a constant weight of a graph, once however many layers use it."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._nodes: dict[fx.Node, tuple[fx.Node | None, ...]] = {}

    def __contains__(self, dense: fx.Node) -> bool:
        return dense in self._nodes

    def __getitem__(self, dense: fx.Node) -> tuple[fx.Node | None, ...]:
        """The get_attr nodes of the parts of `dense`, in the order in which they were added."""
        return self._nodes[dense]

    def add(self, dense: fx.Node, **parts: Tensor | None) -> None:
        """Make `parts` constants named after the node `dense`; one that is None keeps its place."""
        first = after_inputs(self._gm.graph)
        self._nodes[dense] = tuple(
            None if part is None else add_constant(self._gm, first, f"{dense.name}_{name}", part)
            for name, part in parts.items()
        )

    def nbytes(self, dense: fx.Node) -> int:
        nodes = (node for node in self._nodes[dense] if node is not None)
        return sum(attr_tensor(self._gm, str(node.target)).nbytes for node in nodes)


def has_condensed(graph: fx.Graph) -> bool:
    """Whether an operator of ours stands there: passes that lower what is beside layers leave other graphs alone."""
    return any(
        isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "fanin" for n in graph.nodes
    )


def tensor_meta(node: object) -> Tensor | None:
    """The (fake) tensor a node computes, None for anything else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape whatever symbolic sizes are, without guarding on them."""
    return a.ndim == b.ndim and statically_known_true(sym_eq(tuple(a.shape), tuple(b.shape)))


def size_hint(value: int | torch.SymInt) -> int:
    """A concrete number for a possibly symbolic size: the one of the example inputs, without guarding on it."""
    if isinstance(value, int):
        return value
    hint = value.node.hint
    return int(hint) if hint is not None else 1
