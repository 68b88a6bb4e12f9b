"""Drop the neurons that no later layer reads, throughout the chain of pointwise operations between them.

    h = relu(linear(x, w1 [n, in], b1))          h = relu(linear(x, w1[read], b1[read]))     n' = len(read)
    y = linear(h, w2 [out, n], b2)         ->    y = linear(h, w2[:, read], b2)

After fold_constant_channels nobody reads an ablated neuron. Tensors that must agree in their channels (both sides of a
residual add or of a gate, everything in between) form one group: a networkx component. A group with a member that is
seen whole, such as a graph output, a layer norm or an attention head, stays as it is. Where a flatten merges the
channels with what is behind them, [N, C, H, W] -> [N, C*H*W], each neuron covers H*W positions from there on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from fanin_compile.channels import (
    AVG_POOLS,
    BINARY,
    MAX_POOLS,
    POINTWISE,
    SAME_VALUE,
    SPATIAL_MEANS,
    channel_dim,
    pool_dims,
)
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
    use_layer_weight,
)
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
POOLS = (*MAX_POOLS, *AVG_POOLS, *SPATIAL_MEANS)
TRANSPARENT = {*POINTWISE, *SAME_VALUE, *BINARY, *POOLS, aten.batch_norm.default}
VIEWS = (aten.view.default, aten.reshape.default)  # with their sizes written out


# (weight, bias, rows, columns) -> the weight and bias nodes selected from them, and that weight
_Selected = dict[object, tuple[tuple[Any, ...], CondensedWeight]]


@dataclass(frozen=True)
class _Place:
    """Where a tensor keeps the neurons: neuron c at [c * inner, (c + 1) * inner) of dimension `dim` from the left."""

    dim: int
    inner: int = 1


@dataclass(frozen=True)
class _Group:
    """Nodes whose channels are the same neurons.

    Attributes:
        members: the nodes which compute them, in graph order, each with the place of its channels.
        readers: the masked layers which take them as inputs, each with the inputs that stand for one neuron.
        pinned: why the channels must stay, if they must.
    """

    members: dict[fx.Node, _Place]
    readers: dict[fx.Node, int]
    pinned: str


def remove_unread_neurons(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    selected: _Selected = {}
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
        read = torch.stack([_neurons_read(*reader) for reader in group.readers.items()]).any(0)
        if not bool(read.any()):
            read[:1] = True  # a convolution needs a neuron, and view(-1, 0) is ambiguous
        if bool(read.all()):
            continue
        for node, place in group.members.items():
            _narrow(gm, node, place, read, evaluate, selected)
        for reader, inner in group.readers.items():
            _select(gm, reader, evaluate, selected, columns=read.repeat_interleave(inner))
        detail = f"{len(read)} -> {int(read.sum())} neurons"
        rewritten += [Rewrite(node.meta[LAYER].name, "narrowed", detail=detail) for node in producers]
    return PassResult(tuple(rewritten), tuple(skipped))


def _groups(graph: fx.Graph, evaluate: Evaluator) -> Iterator[_Group]:
    """Connected components of the nodes that share a channel dimension, each starting at a masked layer."""
    channels: dict[fx.Node, _Place] = {}
    ties = nx.Graph()
    pinned: dict[fx.Node, str] = {}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if CONDENSED in node.meta and (dim := channel_dim(node)) is not None:
            channels[node] = _Place(dim)
            ties.add_node(node)
            if not _bias_is_known(node, evaluate):
                pinned[node] = f"the bias of {node.name} is not constant"
        elif (place := _flattened(node, channels)) is not None:
            channels[node] = place
            ties.add_edge(node, node.args[0])
        elif node.target in TRANSPARENT:
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
            if _reads(user, node, channels[node]) and _bias_is_known(user, evaluate):
                readers.setdefault(node, []).append(user)
            else:
                pinned[node] = f"{node.name} is read whole by {user.name} ({_op_name(user)})"
    for component in nx.connected_components(ties):
        members = {node: place for node, place in channels.items() if node in component}
        reasons = [pinned[node] for node in members if node in pinned]
        reading = {r: place.inner for node, place in members.items() for r in readers.get(node, ())}
        if not reading:
            reasons.append("no layer reads them")
        yield _Group(members, reading, reasons[0] if reasons else "")


def _flattened(node: fx.Node, channels: dict[fx.Node, _Place]) -> _Place | None:
    """The channels of a flatten or view which leaves them alone or merges them with what is behind, of known size."""
    if node.target not in (*VIEWS, aten.flatten.using_ints) or node.kwargs:
        return None
    place = channels.get(node.args[0])  # type: ignore[arg-type]
    before, after = tensor_meta(node.args[0]), tensor_meta(node)
    if place is None or before is None or after is None or after.ndim <= place.dim:
        return None
    if statically_known_true(
        sym_eq(tuple(before.shape[: place.dim + 1]), tuple(after.shape[: place.dim + 1]))
    ):
        return place
    dim, end = place.dim, before.ndim - (after.ndim - place.dim) + 1  # dimensions [dim, end) become one
    merged = before.shape[dim:end]
    if not merged or not all(isinstance(size, int) for size in merged):
        return None
    expected = (*before.shape[:dim], math.prod(merged), *before.shape[end:])
    if not statically_known_true(sym_eq(expected, tuple(after.shape))):
        return None
    return _Place(dim, place.inner * math.prod(merged[1:]))


def _bias_is_known(layer: fx.Node, evaluate: Evaluator) -> bool:
    bias = bind_arguments(layer)["bias"]
    return bias is None or evaluate(bias) is not None


def _op_name(node: fx.Node) -> str:
    return "graph output" if node.op == "output" else str(node.target)


def _reads(user: fx.Node, node: fx.Node, place: _Place) -> bool:
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
    return not grouped and place.dim == meta.ndim - (len(user.meta[CONDENSED].shape) - 1)


def _breaks_channels(node: fx.Node, channels: dict[fx.Node, _Place], evaluate: Evaluator) -> str:
    """Why a transparent node does not keep each channel to itself, if so."""
    out, place = tensor_meta(node), channels[node]
    for arg in node.args if node.target in BINARY else ():
        meta = tensor_meta(arg)
        if meta is None or out is None or not isinstance(arg, fx.Node):
            continue
        dim = place.dim - (out.ndim - meta.ndim)
        constant = evaluate(arg) is not None and arg not in channels
        if constant and (dim < 0 or meta.shape[dim] == 1):
            continue  # broadcast along the channels
        aligned = constant or channels.get(arg) == _Place(dim, place.inner)
        if aligned and meta.shape[dim] == out.shape[place.dim]:
            continue
        return f"{node.name} combines them with a tensor that is not a layer's"
    if node.target is aten.batch_norm.default and bind_arguments(node)["training"]:
        return f"{node.name} is a batch norm in training mode"
    if node.target in POOLS and (out is None or place.dim >= out.ndim - pool_dims(node)):
        return f"{node.name} pools over them"
    return ""


def _neurons_read(reader: fx.Node, inner: int) -> Tensor:
    """bool [in / inner]: the neurons of which the layer reads one of the `inner` inputs at least."""
    mask: Tensor = reader.meta[CONDENSED].mask()
    return mask.transpose(0, 1).flatten(1).any(1).view(-1, inner).any(1)


def _narrow(
    gm: fx.GraphModule,
    node: fx.Node,
    place: _Place,
    read: Tensor,
    evaluate: Evaluator,
    selected: _Selected,
) -> None:
    """Restrict a member of a group to the neurons in `read`: its weight or constants, and the value it stands for."""
    if CONDENSED in node.meta:
        _select(gm, node, evaluate, selected, rows=read)
    else:
        out = tensor_meta(node)
        assert out is not None
        kept = read.repeat_interleave(place.inner)
        for arg in node.all_input_nodes if node.target not in VIEWS else ():
            value = evaluate(arg)
            if value is None:
                continue
            # a binary operand is aligned from the right, batch norm's constants are vectors of dimension 1
            position = place.dim - (out.ndim - value.ndim)
            if node.target is aten.batch_norm.default:
                position = place.dim - 1
            if 0 <= position < value.ndim and value.shape[position] == len(kept):
                narrow = value.index_select(position, kept.nonzero().flatten())
                node.replace_input_with(arg, add_constant(gm, node, f"{node.name}_{arg.name}", narrow))
        if node.target in VIEWS:
            sizes: list[Any] = list(node.args[1])  # type: ignore[arg-type]
            if sizes[place.dim] != -1:
                sizes[place.dim] = int(kept.sum())
            node.args = (node.args[0], sizes)
    renew_value(gm.graph, node)


def _select(
    gm: fx.GraphModule,
    node: fx.Node,
    evaluate: Evaluator,
    selected: _Selected,
    *,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
) -> None:
    """Keep only these neurons (bool [out]) or these inputs (bool [in]) of a masked layer, once however often called."""
    weight: CondensedWeight = node.meta[CONDENSED]
    bias = bind_arguments(node)["bias"]
    key = (node.args[1], bias, *(None if kept is None else tuple(kept.tolist()) for kept in (rows, columns)))
    if key in selected:
        use_layer_weight(node, *selected[key])
        return
    dense, mask = weight.to_dense(), weight.mask()
    bias_value = None if bias is None else evaluate(bias)
    if rows is not None:
        dense, mask = dense[rows], mask[rows]
        bias_value = None if bias_value is None else bias_value[rows]
    if columns is not None:
        dense, mask = dense[:, columns], mask[:, columns]
    set_layer_weight(gm, node, CondensedWeight.from_dense(dense, mask), bias_value)
    selected[key] = node.args[1:3], node.meta[CONDENSED]
    first = next(n for n in gm.graph.nodes if n.op != "placeholder")
    for constant in node.args[1:3]:
        if isinstance(constant, fx.Node):
            first.prepend(constant)  # before whichever call takes it next
