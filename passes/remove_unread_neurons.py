"""Drop the neurons that no later layer reads, throughout the chain of pointwise operations between them.

    h = relu(linear(x, w1 [n, in], b1))          h = relu(linear(x, w1[read], b1[read]))     n' = len(read)
    y = linear(h, w2 [out, n], b2)         ->    y = linear(h, w2[:, read], b2)

After fold_constant_channels nobody reads an ablated neuron. Tensors that must agree in their channels (both sides of a
residual add or of a gate, everything in between) form one group: a networkx component. A group with a member that is
seen whole, such as a graph output, a layer norm or an attention head, stays as it is. A flatten belongs to it where it
only drops dimensions of size 1, as after global pooling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.channels import BINARY, MAX_POOLS, POINTWISE, SAME_VALUE, SPATIAL_MEANS, channel_dim
from fanin_compile.condensed import CondensedWeight
from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    Context,
    Evaluator,
    PassResult,
    add_constant,
    bind_arguments,
    renew_value,
    set_layer_weight,
    tensor_meta,
)
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
TRANSPARENT = {*POINTWISE, *SAME_VALUE, *BINARY, *MAX_POOLS, *SPATIAL_MEANS, aten.batch_norm.default}


@dataclass(frozen=True)
class _Group:
    """Nodes whose channels are the same neurons.

    Attributes:
        members: the nodes which compute them, in graph order, each with its channel dimension.
        readers: the masked layers which take them as inputs.
        pinned: why the channels must stay, if they must.
    """

    members: dict[fx.Node, int]
    readers: tuple[fx.Node, ...]
    pinned: str


def remove_unread_neurons(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    for group in _groups(gm.graph, evaluate):
        producers = [node for node in group.members if CONDENSED in node.meta]
        ablated = sum(node.meta[CONDENSED].n_ablated for node in producers)
        if group.pinned:
            if ablated:
                values = {"ablated": ablated}
                skipped += [
                    Skip(n.meta[LAYER].name, f"ablated neurons stay: {group.pinned}", values)
                    for n in producers
                ]
            continue
        read = torch.stack([_columns_read(reader) for reader in group.readers]).any(0)
        if bool(read.all()):
            continue
        for node, dim in group.members.items():
            _narrow(gm, node, dim, read, evaluate)
        for reader in group.readers:
            _select(gm, reader, evaluate, columns=read)
        detail = f"{len(read)} -> {int(read.sum())} neurons"
        rewritten += [Rewrite(node.meta[LAYER].name, "narrowed", detail=detail) for node in producers]
    return PassResult(tuple(rewritten), tuple(skipped))


def _groups(graph: fx.Graph, evaluate: Evaluator) -> Iterator[_Group]:
    """Connected components of the nodes that share a channel dimension, each starting at a masked layer."""
    channels: dict[fx.Node, int] = {}  # node -> its channel dimension, counted from the left
    ties = nx.Graph()
    pinned: dict[fx.Node, str] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if CONDENSED in node.meta and (dim := channel_dim(node)) is not None:
            channels[node] = dim
            ties.add_node(node)
        elif node.target in TRANSPARENT or _flattens_ones(node, channels):
            inputs = [n for n in node.all_input_nodes if n in channels]
            if inputs:
                channels[node] = channels[inputs[0]]
                ties.add_edges_from((node, n) for n in inputs)
                if reason := _breaks_channels(node, channels, evaluate):
                    pinned[node] = reason
    for node in channels:
        for user in node.users:
            if user in channels and ties.has_edge(node, user):
                continue
            if _reads(user, node, channels[node]):
                readers.setdefault(node, []).append(user)
            else:
                pinned[node] = f"{node.name} is read whole by {user.name} ({_op_name(user)})"
    for component in nx.connected_components(ties):
        members = {node: dim for node, dim in channels.items() if node in component}
        reasons = [pinned[node] for node in members if node in pinned]
        reading = tuple(reader for node in members for reader in readers.get(node, ()))
        if not reading:
            reasons.append("no layer reads them")
        yield _Group(members, reading, reasons[0] if reasons else "")


def _flattens_ones(node: fx.Node, channels: dict[fx.Node, int]) -> bool:
    """A flatten of the dimensions from the channels on, of which all the others have size 1."""
    if node.target is not aten.flatten.using_ints or node.args[0] not in channels:
        return False
    bound, meta = bind_arguments(node), tensor_meta(node.args[0])
    if meta is None:
        return False
    dim = channels[bound["self"]]
    start, end = bound["start_dim"] % meta.ndim, bound["end_dim"] % meta.ndim
    return (
        start == dim
        and end >= dim
        and all(statically_known_true(s == 1) for s in meta.shape[dim + 1 : end + 1])
    )


def _op_name(node: fx.Node) -> str:
    return "graph output" if node.op == "output" else str(node.target)


def _reads(user: fx.Node, node: fx.Node, dim: int) -> bool:
    """`user` is a masked layer whose input channels are exactly the channels of `node`."""
    meta = tensor_meta(node)
    if (
        CONDENSED not in user.meta
        or user.args[0] is not node
        or meta is None
        or list(user.args).count(node) != 1
    ):
        return False
    grouped = user.target is not aten.linear.default and bind_arguments(user)["groups"] != 1
    return not grouped and dim == meta.ndim - (len(user.meta[CONDENSED].shape) - 1)


def _breaks_channels(node: fx.Node, channels: dict[fx.Node, int], evaluate: Evaluator) -> str:
    """Why a transparent node does not keep each channel to itself, if so."""
    out = tensor_meta(node)
    for arg in node.args if node.target in BINARY else ():
        meta = tensor_meta(arg)
        if meta is None or out is None or not isinstance(arg, fx.Node):
            continue
        dim = channels[node] - (out.ndim - meta.ndim)
        constant = evaluate(arg) is not None and arg not in channels
        if constant and (dim < 0 or meta.shape[dim] == 1):
            continue  # broadcast along the channels
        if arg in channels and channels[arg] == dim and meta.shape[dim] == out.shape[channels[node]]:
            continue
        if constant and meta.shape[dim] == out.shape[channels[node]]:
            continue
        return f"{node.name} combines them with a tensor that is not a layer's"
    if node.target is aten.batch_norm.default and bind_arguments(node)["training"]:
        return f"{node.name} is a batch norm in training mode"
    if node.target in BINARY and node.kwargs:
        return f"{node.name} scales by alpha"
    return ""


def _columns_read(reader: fx.Node) -> Tensor:
    """bool [in]: the inputs which at least one neuron of the layer reads."""
    mask: Tensor = reader.meta[CONDENSED].mask()
    return mask.transpose(0, 1).flatten(1).any(1)


def _narrow(gm: fx.GraphModule, node: fx.Node, dim: int, read: Tensor, evaluate: Evaluator) -> None:
    """Restrict a member of a group to the channels in `read`: its weight or constants, and the value it stands for."""
    if CONDENSED in node.meta:
        _select(gm, node, evaluate, rows=read)
    else:
        out = tensor_meta(node)
        assert out is not None
        for arg in node.all_input_nodes:
            value = evaluate(arg)
            if value is None:
                continue
            # batch norm's constants are vectors of channels, a binary operand is aligned from the right
            position = 0 if node.target is aten.batch_norm.default else dim - (out.ndim - value.ndim)
            if 0 <= position < value.ndim and value.shape[position] == len(read):
                kept = value.index_select(position, read.nonzero().flatten())
                node.replace_input_with(arg, add_constant(gm, node, f"{node.name}_{arg.name}", kept))
    renew_value(gm.graph, node)


def _select(
    gm: fx.GraphModule,
    node: fx.Node,
    evaluate: Evaluator,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Keep only these neurons (bool [out]) or these inputs (bool [in]) of a masked layer."""
    weight: CondensedWeight = node.meta[CONDENSED]
    dense, mask = weight.to_dense(), weight.mask()
    bias = bind_arguments(node)["bias"]
    bias_value = None if bias is None else evaluate(bias)
    if rows is not None:
        dense, mask = dense[rows], mask[rows]
        bias_value = None if bias_value is None else bias_value[rows]
    if columns is not None:
        dense, mask = dense[:, columns], mask[:, columns]
    set_layer_weight(gm, node, CondensedWeight.from_dense(dense, mask), bias_value)
