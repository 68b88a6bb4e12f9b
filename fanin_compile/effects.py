"""What operators of a graph do to memory: which write, which results share storage."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from fanin_compile.graph import bind_arguments


def is_pure(target: object) -> bool:
    """Whether a call of `target` writes to nothing and gives the same for the same arguments."""
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
