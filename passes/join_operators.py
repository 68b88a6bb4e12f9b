"""Join operators that run one after the other into one operator, which calls them without Python between them.

    a = gather_matmul(x, ...); b = gather_matmul(view(a), ...)    ->    b, = run_program([x, ...], text)

A run is a stretch of operators of ours, with the views between them. What stands among them and needs none of their
results runs before them; what needs one ends the run, and so does what cannot change places with it, because one of
them writes to what the other reads. Views that others read as well stay in the graph, behind the run. Where all numbers
are known, a chain of views is one as_strided. Caches that a run writes to are inputs of a kind of their own.

It is no part of the pipeline: reports and saved graphs are about what is joined here. The backend runs it afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx

from fanin_compile.effects import is_view, storage_roots, writes, written_args
from fanin_compile.graph import bind_arguments, renew_value, same_shape, tensor_meta
from fanin_compile.moves import VIEWS
from fanin_compile.ops_program import MOST_OUTPUTS, program_op
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.program import Argument, Instruction, Program, Register, Size, name_of, representable

fanin, aten = torch.ops.fanin, torch.ops.aten
LEAST = 3  # operators of ours in a run: joined ones take some 5 us to begin, each takes 2 to 4 us less
OURS = (
    *(fanin.gather_matmul.default, fanin.gather_matmul_chain.default, fanin.gather_conv.default),
    *(fanin.depthwise_conv.default, fanin.max_pool.default, fanin.skinny_linear.default),
    *(fanin.attend_cache.default, fanin.attend_appended.default, fanin.append_attend.default),
)
_WRITE_ATTEND = fanin.write_attend.default
_OVER_RESIDUAL = fanin.gather_conv_.default


def join_operators(gm: fx.GraphModule, ctx: Context) -> PassResult:
    runs = [run for run in _runs(gm.graph) if len(run.operators) >= LEAST]
    if runs and _renew_values(gm.graph):
        for run in reversed(runs):  # those before it are as they were found
            _join(gm.graph, run)
    return PassResult()


@dataclass
class _Run:
    """Operators in the order of the graph, and the views of their results."""

    operators: list[fx.Node] = field(default_factory=list)
    views: list[fx.Node] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    given: dict[fx.Node, None] = field(default_factory=dict)  # from outside, in the order of reading
    written: dict[fx.Node, None] = field(default_factory=dict)  # of those

    def takes(self, node: fx.Node) -> bool:
        """Whether `node` may be the next one; if so, it is."""
        given = [arg for arg in node.all_input_nodes if arg not in self.inside]
        written: list[fx.Node] = []
        if node.target in OURS or (node.target is _OVER_RESIDUAL and node.args[-1] in self.operators):
            part = self.operators
        elif node.target is _WRITE_ATTEND:
            part, written = self.operators, list(written_args(node))
        elif _hands_on(node) and node.args[0] in self.inside:
            part = self.views
        else:
            return False
        if not all(_has_text(argument) for argument in node.args) or not self._one_name_each(given, written):
            return False
        part.append(node)
        self.given.update(dict.fromkeys(given))
        self.written.update(dict.fromkeys(written))
        self.inside.add(node)
        return True

    def _one_name_each(self, given: Sequence[fx.Node], written: Sequence[fx.Node]) -> bool:
        """Whether what the run writes to comes from outside and is known to it by one name alone, with these as well.

        torch takes writing operators for functions of what they were given: another name would keep the old rows.
        """
        caches = dict.fromkeys((*self.written, *written))
        if not caches:
            return True
        if any(cache in self.inside for cache in caches):
            return False
        together = storage_roots(*caches)
        others = (arg for arg in (*self.given, *given) if arg not in caches)
        apart = sum(len(storage_roots(cache)) for cache in caches) == len(together)
        return apart and together.isdisjoint(storage_roots(*others))

    def lets_pass(self, node: fx.Node) -> bool:
        """Whether `node` may as well come before the run."""
        if node.op in ("placeholder", "get_attr"):
            return True
        if node.op == "output" or any(arg in self.inside for arg in node.all_input_nodes):
            return False
        writes = storage_roots(*written_args(node))
        if any(root.op in ("placeholder", "get_attr") for root in writes):
            return False  # which may have other names
        if self.written and any(root.op == "placeholder" for root in storage_roots(*node.all_input_nodes)):
            return False
        return storage_roots(*self.given).isdisjoint(writes)

    def computes(self, node: fx.Node) -> bool:
        """Whether `node` is a result of an operator, and no view."""
        if node in self.operators:
            return tensor_meta(node) is not None
        return node.target is operator.getitem and node.args[0] in self.operators

    def exposed(self) -> set[fx.Node]:
        """Results and views that are read outside, and what they are views of."""
        found: set[fx.Node] = set()
        for node in (*reversed(self.views), *self.operators):
            if any(user not in self.inside or user in found for user in node.users):
                found.add(node)
        return found


def _hands_on(node: fx.Node) -> bool:
    """Whether `node` computes nothing: a view of its first argument, or a copy where there is no view."""
    if node.target is operator.getitem or node.target in VIEWS:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and is_view(node) and not writes(node)


def _has_text(argument: object) -> bool:
    if isinstance(argument, list | tuple):
        return all(_has_text(item) for item in argument)
    if isinstance(argument, fx.Node):
        return isinstance(argument.meta.get("val"), Tensor | torch.SymInt | int | list | tuple)
    return representable(argument)


def _runs(graph: fx.Graph) -> Iterator[_Run]:
    run = _Run()
    for node in graph.nodes:
        if run.takes(node):
            continue
        if not run.lets_pass(node):
            yield run
            run = _Run()
            run.takes(node)


def _renew_values(graph: fx.Graph) -> bool:
    """Bring strides up to date, which passes leave as those of what they replaced. False if more than that changed."""
    for node in graph.nodes:
        before = node.meta.get("val")
        known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        if known and isinstance(before, Tensor | list | tuple):
            renew_value(graph, node)
            if not _same(before, node.meta["val"]):
                return False  # as under autocast, which is off here
    return True


def _same(before: object, now: object) -> bool:
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return before.dtype == now.dtype and same_shape(before, now)
    return isinstance(before, list | tuple) and isinstance(now, list | tuple) and len(before) == len(now)


class _Writer:
    """Writes the program of a run: registers for what it is given from outside and for what it computes."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self.sizes = [node for node in run.given if tensor_meta(node) is None]
        self.inputs = [node for node in run.given if node not in self.sizes and node not in run.written]
        self.written = list(run.written)
        self._registers = {node: i for i, node in enumerate((*self.inputs, *self.written))}
        self._count = len(self._registers)
        self._steps: list[Instruction] = []
        for node in run.operators:
            self._add(node)

    def program(self, outputs: Sequence[fx.Node]) -> Program:
        registers = tuple(self._registers[node] for node in outputs)
        inputs = len(self.inputs) + len(self.written)
        return Program(inputs, len(self.sizes), tuple(self._steps), registers)

    def _new(self, node: fx.Node) -> int:
        self._registers[node] = self._count
        self._count += 1
        return self._registers[node]

    def _add(self, node: fx.Node) -> None:
        """The call of an operator, or of a view whose argument it is not known to share memory with."""
        assert isinstance(node.target, torch._ops.OpOverload)
        arguments = tuple(self._argument(value) for value in bind_arguments(node).values())
        results: tuple[int | None, ...] = ()
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            pieces = {user.args[1]: user for user in node.users if user in self._run.inside}
            results = tuple(self._new(pieces[i]) if i in pieces else None for i in range(len(value)))
        elif value is not None:
            results = (self._new(node),)
        self._steps.append(Instruction(name_of(node.target), results, arguments))

    def _argument(self, value: object) -> Argument:
        if isinstance(value, list | tuple):
            return [self._argument(item) for item in value]
        if not isinstance(value, fx.Node):
            return value
        if value in self.sizes:
            return Size(self.sizes.index(value))
        if value not in self._registers:
            self._add_view(value)
        return Register(self._registers[value])

    def _add_view(self, node: fx.Node) -> None:
        base, meta = node, tensor_meta(node)
        while not self._run.computes(base):
            base = cast(fx.Node, base.args[0])
        of = tensor_meta(base)
        assert meta is not None
        assert of is not None
        place = [list(meta.shape), list(meta.stride()), meta.storage_offset()]
        shares = of.untyped_storage()._cdata == meta.untyped_storage()._cdata  # reshape may have copied
        if shares and of.storage_offset() == 0 and representable(place):
            arguments = (Register(self._registers[base]), *place)
            self._steps.append(Instruction(name_of(aten.as_strided.default), (self._new(node),), arguments))
        else:
            self._add(cast(fx.Node, node.args[0]) if node.target is operator.getitem else node)


def _join(graph: fx.Graph, run: _Run) -> None:
    exposed = run.exposed()
    outputs = [node for node in (*run.operators, *run.views) if node in exposed and run.computes(node)]
    if not outputs or (run.written and len(outputs) > MOST_OUTPUTS):
        return
    writer = _Writer(run)
    text = writer.program(outputs).to_text()
    tensors = (writer.inputs, writer.written) if run.written else (writer.inputs,)
    with graph.inserting_after(run.operators[-1]):
        op = program_op(len(outputs), writes=bool(run.written))
        joined = graph.call_function(op, (*tensors, writer.sizes, text))
    values = [node.meta["val"] for node in outputs]
    last = joined
    if len(outputs) == 1:
        joined.meta["val"] = values[0]
        outputs[0].replace_all_uses_with(joined)
    else:
        joined.meta["val"] = values
        for i, node in enumerate(outputs):
            with graph.inserting_after(last):
                last = graph.call_function(operator.getitem, (joined, i))
            last.meta = dict(node.meta)
            node.replace_all_uses_with(last)
    for view in run.views:
        if view in exposed and view not in outputs:
            last.append(view)
            last = view
    for node in reversed([node for node in graph.nodes if node in run.inside]):
        if not node.users and (node in run.operators or node not in exposed):
            graph.erase_node(node)
