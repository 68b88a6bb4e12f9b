"""What every graph pass shares: layer facts, results, node helpers and the one pipeline runner.

The dialect is pre-dispatch ATen in a `torch.fx.GraphModule` whose weights are `get_attr` nodes with real tensors behind
them, as both doors produce it: the backend from Dynamo's graph, `condense(..., example_inputs=...)` from torch.export.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import operator
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq
from torch.fx.node import Argument, map_arg

from fanin_compile import ops_conv, ops_depthwise, ops_pool  # noqa: F401  (they define the operators named below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import RewriteError
from fanin_compile.packed import Packed
from fanin_compile.packing import gate_rows, pack
from fanin_compile.records import Layer, Rewrite, Skip

log = logging.getLogger("fanin_compile")

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
_READ = "fanin_read"  # of the graph module: what Evaluators read


@dataclass(frozen=True)
class PassResult:
    rewritten: tuple[Rewrite, ...] = ()
    skipped: tuple[Skip, ...] = ()
    found: tuple[Layer, ...] = ()


class Gate(Protocol):
    """Decides whether condensing a layer gains: None to go ahead, else the Skip that says why not."""

    def __call__(self, layer: Layer, /) -> Skip | None: ...


class Packer(Protocol):
    """Packs the weight of a linear layer and says how, in a few words or none; or the Skip that says why not."""

    def __call__(self, weight: CondensedWeight, layer: Layer, /) -> tuple[Packed, str] | Skip: ...


def pack_by_default(weight: CondensedWeight, layer: Layer) -> tuple[Packed, str]:
    return pack(weight), ""


class GatePacker(Protocol):
    """Packs a gate and its partner, one weight [2 * hidden, in], for a chain with `second`; says how, if at all."""

    def __call__(
        self, gate: CondensedWeight, second: Packed, activation: str, batch: int, /
    ) -> tuple[Packed, str]: ...


def pack_gate_by_default(
    gate: CondensedWeight, second: Packed, activation: str, batch: int
) -> tuple[Packed, str]:
    return pack(gate, block_rows=gate_rows(gate)), ""


@dataclass(frozen=True)
class Context:
    """What passes may know beyond the graph.

    Attributes:
        masks: get_attr target -> bool mask of that weight.
        masks_decide: what a mask leaves out counts as 0. Otherwise the graph's own meaning comes first: a non-zero
            outside the mask is active as well.
        names: get_attr target -> the layer's name in reports.
        values_dtype: of condensed values; None keeps the weight's.
        pack, pack_gate: how linear weights are packed, by default or as measured (tuning.py).
        in_place: operators may write over tensors of the graph which nobody reads any more; for inference alone.
        watched: get_attr targets of parameters, changes of which whoever runs the graph notices.
    """

    gate: Gate
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    values_dtype: torch.dtype | None = None
    masks_decide: bool = False
    pack: Packer = pack_by_default
    pack_gate: GatePacker = pack_gate_by_default
    in_place: bool = False
    watched: Collection[str] = ()


Pass = Callable[[fx.GraphModule, Context], PassResult]


@dataclass(frozen=True)
class PipelineResult:
    graph_module: fx.GraphModule
    results: tuple[tuple[str, PassResult], ...]
    seconds: Mapping[str, float]
    read: frozenset[str] = frozenset()  # get_attr targets whose values the passes relied on

    @property
    def rewritten(self) -> tuple[Rewrite, ...]:
        return tuple(r for _, result in self.results for r in result.rewritten)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        return tuple(s for _, result in self.results for s in result.skipped)

    @property
    def found(self) -> tuple[Layer, ...]:
        return tuple(layer for _, result in self.results for layer in result.found)


def run_pipeline(gm: fx.GraphModule, passes: Iterable[Pass], ctx: Context) -> PipelineResult:
    """Run `passes` over a copy of `gm` (whose tensors are shared), checking each pass's contract here, once.

    Raises:
        RewriteError: a pass raised, left an invalid graph or changed the outputs' shapes; the message names it and
            those that ran before.
    """
    # a deep copy of a graph copies nodes and their meta, no tensors
    work = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    expected = _output_signature(work)
    results: list[tuple[str, PassResult]] = []
    seconds: dict[str, float] = {}
    for run in passes:
        name = getattr(run, "__name__", repr(run))
        start = time.perf_counter()
        try:
            result = run(work, ctx)
            work.graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node))
            work.graph.lint()
            if (now := _output_signature(work)) != expected:
                raise RewriteError(f"outputs were {expected} and became {now}")
        except Exception as error:
            done = ", ".join(name for name, _ in results) or "none"
            raise RewriteError(f"pass {name} failed (passes before it: {done}): {error}") from error
        seconds[name] = time.perf_counter() - start
        results.append((name, result))
        log.debug("pass %s: %d rewritten, %d left", name, len(result.rewritten), len(result.skipped))
    work.recompile()
    return PipelineResult(work, tuple(results), seconds, frozenset(work.meta.pop(_READ, ())))


def _output_signature(gm: fx.GraphModule) -> tuple[object, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    signature: list[object] = []
    for node in output.all_input_nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            signature.append((tuple(str(s) for s in val.shape), val.dtype))
    return tuple(signature)


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


def constant_name(weight: fx.Node, ctx: Context) -> str | None:
    """That of the first constant which `weight` is made of."""
    stack = [weight]
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            return ctx.names.get(str(node.target), str(node.target))
        stack.extend(reversed(node.all_input_nodes))
    return None


def layer_label(node: fx.Node, ctx: Context) -> str:
    """The name in the report of the layer that a linear operator of ours computes."""
    if LAYER in node.meta:
        return str(node.meta[LAYER].name)
    values = bind_arguments(node)["values"]  # of a layer that condense() made
    return ctx.names.get(str(values.target), node.name).removesuffix(".values")


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


def _pure(target: object) -> bool:
    if target is operator.getitem:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _schema_args(node: fx.Node, *, write: bool) -> Iterator[fx.Node]:
    """The argument nodes whose storage the op writes (write=True) or hands on as a view (write=False)."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        alias = argument.alias_info
        if alias is None or alias.is_write != write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, fx.Node):
                yield item


_NORMS: dict[object, str] = {
    torch.ops.aten.batch_norm.default: "training",
    torch.ops.aten.instance_norm.default: "use_input_stats",
}


def written_args(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that the node changes in place."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return
    yield from _schema_args(node, write=True)
    if node.target in _NORMS:
        # their schemas hide that training updates the running statistics
        bound = bind_arguments(node)
        statistics = (bound["running_mean"], bound["running_var"])
        if bound[_NORMS[node.target]]:
            yield from (arg for arg in statistics if isinstance(arg, fx.Node))


def writes(node: fx.Node) -> bool:
    """Whether the node changes one of its arguments in place."""
    return next(written_args(node), None) is not None


def writes_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether a node after `first` and before `last` works in place: what both read may differ."""
    node = first.next
    while node is not last:
        if writes(node):
            return True
        node = node.next
    return False


# they may return their input itself, which their schemas do not say
_UNDECLARED_VIEWS = (
    torch.ops.aten.dropout.default,
    torch.ops.aten.feature_dropout.default,
    torch.ops.aten.alpha_dropout.default,
    torch.ops.aten.type_as.default,
    torch.ops.aten.broadcast_tensors.default,
)


def _shares_storage_with(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose storage the result of `node` may share: views, and what it writes in place."""
    if node.target is operator.getitem or node.target in _UNDECLARED_VIEWS:
        yield from node.all_input_nodes
    elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        yield from _schema_args(node, write=False)
        yield from _schema_args(node, write=True)


def is_view(node: fx.Node) -> bool:
    """Whether the result of `node` may share the storage of an argument; True for what is no operator of torch."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return bool(node.target._schema.returns) and next(_shares_storage_with(node), None) is not None


def storage_roots(*nodes: fx.Node) -> set[fx.Node]:
    """The nodes whose storage any of `nodes` may share and which share no other's, through views and in-place ops."""
    seen: set[fx.Node] = set()
    roots: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        before = list(_shares_storage_with(current))
        stack.extend(before)
        if not before:
            roots.add(current)
    return roots


def copy_is_needless(node: fx.Node, copied: fx.Node) -> bool:
    """Whether nobody can tell the result of `node`, a copy of `copied`, from that itself: no later node writes to
    either, by whatever name, and no output of the graph shares the copy's storage."""
    either = {node, *storage_roots(copied)}
    later = node.next
    while later.op != "output":
        if not either.isdisjoint(storage_roots(*written_args(later))):
            return False
        later = later.next
    return node not in storage_roots(*later.all_input_nodes)


def overwritten(graph: fx.Graph) -> set[fx.Node]:
    """The nodes some users of which run after their storage was written to by another name of it.

    y = view(h); add_(y, 1); linear(h)  ->  {h}: the linear does not read what h was when it was computed.
    """
    position = {node: i for i, node in enumerate(graph.nodes)}
    found: set[fx.Node] = set()
    writers = [(node, arg) for node in graph.nodes for arg in written_args(node)]
    if not writers:
        return found
    roots = {node: storage_roots(node) for node in graph.nodes}
    for writer, arg in writers:
        for node in graph.nodes:
            if node is writer:
                break
            late = any(position[user] > position[writer] for user in node.users)
            if late and not roots[node].isdisjoint(roots[arg]):
                found.add(node)
    return found


class Evaluator:
    """Real values of the nodes which compute the same at every call: get_attr, and pure functions of such alone.

    A tensor that any node of the graph writes to is not constant, nor is what depends on it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._written = storage_roots(*(arg for node in gm.graph.nodes for arg in written_args(node)))
        self._constant: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}

    def is_constant(self, node: object) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node not in self._constant:
            self._constant[node] = (node.op == "get_attr" and node not in self._written) or (
                node.op == "call_function"
                and _pure(node.target)
                and bool(node.all_input_nodes)
                and all(self.is_constant(arg) for arg in node.all_input_nodes)
            )
        return self._constant[node]

    def __call__(self, node: object) -> Tensor | None:
        """The tensor a constant node computes, without grad, autocast and fake mode; None for anything else."""
        if not self.is_constant(node):
            return None
        assert isinstance(node, fx.Node)
        value = self._value(node)
        return value if isinstance(value, Tensor) else None

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "get_attr":
                self._gm.meta.setdefault(_READ, set()).add(str(node.target))
                self._values[node] = attr_tensor(self._gm, str(node.target))
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._value)
                assert callable(node.target)
                with torch.no_grad(), unset_fake_temporarily(), torch._C._DisableAutocast():
                    self._values[node] = node.target(*args, **kwargs)
        return self._values[node]
