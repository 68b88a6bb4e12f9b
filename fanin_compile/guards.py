"""What the backend asks of Dynamo: when a compiled graph still fits, and for how long it is kept.

Every entry in Dynamo's cache counts against the recompile limit of its code object (8, then eager without a word in
the result), so each reason to compile anew is chosen here.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.guards import DeletedGuardManagerWrapper, GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, ImportSource, LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, GuardsSet, Source, TracingContext
from torch.utils._ordered_set import OrderedSet

from fanin_compile import attributes

# Of each graph in use, guarded by Dynamo: raising it makes the next call compile anew.
epochs: dict[int, int] = {}
_graph_ids = itertools.count()
_ELSEWHERE: weakref.ref[object] = weakref.ref(torch)  # an object that no local named "" is


def compiling() -> bool:
    """Whether Dynamo is compiling a frame; without that there is nothing to guard."""
    return TracingContext.try_get() is not None


def open_epoch() -> int:
    """Guard the graph in compilation on a number of its own; returns the key for raise_epoch and close_epoch."""
    graph = next(_graph_ids)
    epochs[graph] = 0
    if compiling():
        module = AttrSource(ImportSource("fanin_compile"), "guards")
        source = DictGetItemSource(AttrSource(module, "epochs"), graph)
        install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
    return graph


def raise_epoch(graph: int) -> None:
    epochs[graph] += 1


def close_epoch(graph: int) -> None:
    epochs.pop(graph, None)


def bind_to(roots: Iterable[LocalSource]) -> None:
    """Tie the graph in compilation to the very modules at these sources.

    Models of one class share their code and so Dynamo's cache: without this they would take turns packing their weights
    into one graph. Each gets a recompile limit of its own by it, and its graphs, with all they hold, go when it does.
    """
    if compiling():
        for root in set(roots):
            install_guard(root.make_guard(GuardBuilder.ID_MATCH))


def keep_tensors(sources: Iterable[Source]) -> None:
    """Tie the graph in compilation to the very tensors at these sources and to their sizes, strides and dtypes.

    Of a tensor that its graph holds itself, Dynamo guards one of both.
    """
    if compiling():
        guards = TracingContext.get().guards_context.dynamo_guards
        present = {(guard.originating_source, guard.create_fn_name()) for guard in guards}
        for source in set(sources):
            for kind in (GuardBuilder.ID_MATCH, GuardBuilder.TENSOR_MATCH):
                if (source, kind.__name__) not in present:  # twice, a tensor would be taken for a duplicate
                    install_guard(source.make_guard(kind))


def leave_to_us(sources: Iterable[Source]) -> None:
    """Take back Dynamo's guards on the dtypes and sizes of the tensors at these sources.

    freshness.Watch checks them, and more, for a fraction of what a walk over guards costs once a network has swept the
    caches."""
    if compiling():
        ours, kind = set(sources), GuardBuilder.TENSOR_MATCH.__name__
        _take_back(lambda guard: guard.originating_source in ours and guard.create_fn_name() == kind)


def walk_attributes(roots: Iterable[LocalSource]) -> None:
    """Take back Dynamo's guards on the attributes of the modules below these, as far as one walk checks the same."""
    if not compiling():
        return
    scope = InstructionTranslator.current_tx().output.local_scope
    for root in set(roots):
        module = scope[root.local_name]
        assert isinstance(module, nn.Module)  # or it would be no root
        guards = TracingContext.get().guards_context.dynamo_guards
        check, taken = attributes.take_over(root, module, guards)
        if check is not None:
            _take_back(taken.__contains__)
            install_guard(root.make_guard(_module_attributes(check, root.name)))


def _take_back(unwanted: Callable[[Guard], bool]) -> None:
    context = TracingContext.get().guards_context
    context.dynamo_guards = GuardsSet(OrderedSet(g for g in context.dynamo_guards if not unwanted(g)))


def _module_attributes(check: attributes.AttributeGuard, name: str) -> Callable[[GuardBuilder, Guard], None]:
    def module_attributes(builder: GuardBuilder, guard: Guard) -> None:
        parts = [f"the attributes of {name} and the modules in it, as fanin_compile.attributes found them"]
        builder.get_guard_manager(guard).add_lambda_guard(check, parts, guard.user_stack)

    return module_attributes


def discount_dropped_graphs() -> None:
    """Take graphs whose model is gone out of the count for the recompile limit of the code in compilation.

    Dynamo leaves an empty entry behind for each, which it would count for every later model of the class.
    """
    if not compiling():
        return
    root = InstructionTranslator.current_tx().output.root_tx
    for entry in () if root is None else _debug_get_cache_entry_list(root.f_code):
        manager = entry.guard_manager
        if isinstance(manager, DeletedGuardManagerWrapper):
            manager.id_matched_objs.setdefault("", _ELSEWHERE)
