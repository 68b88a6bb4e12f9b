"""Drop the neurons that no later layer reads, from every tensor that holds them.

    h = relu(linear(x, w1 [n, in], b1))          h = relu(linear(x, w1[read], b1[read]))     n' = len(read)
    y = linear(h, w2 [out, n], b2)         ->    y = linear(h, w2[:, read], b2)

After fold_constant_channels nobody reads an ablated neuron. Neurons are followed through residual adds and gates, views
and slices, attention heads, concatenations, pools and depthwise convolutions (labels.py); what must stay is decided for
the whole graph at once (liveness.py). What sees them whole, such as a graph output or a layer norm, keeps them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.attention import ATTENTION
from fanin_compile.axes import Spread
from fanin_compile.channels import with_constants
from fanin_compile.condensed import CondensedWeight
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    CONDENSED,
    LAYER,
    add_constant,
    after_inputs,
    bind_arguments,
    in_format_of,
    renew_value,
    replace_node,
    set_layer_weight,
    tensor_meta,
    use_layer_weight,
)
from fanin_compile.labels import NORMS, PRELU
from fanin_compile.liveness import Neurons, live_neurons
from fanin_compile.moves import NARROW, PIECES, SLICE, SQUEEZES, VIEWS, cut_of
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.pointwise import BINARY
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
SIZED = (*VIEWS, aten.expand.default, aten.unflatten.int)  # with sizes of their output as last argument
CONSTANTS = (*BINARY, aten.masked_fill.Scalar, *NORMS, PRELU)  # which may have constant operands


def remove_unread_neurons(gm: fx.GraphModule, ctx: Context) -> PassResult:
    if not any(CONDENSED in node.meta for node in gm.graph.nodes):
        return PassResult()
    evaluate = Evaluator(gm)
    neurons = live_neurons(gm.graph, evaluate)
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    for node, labels in neurons.labels.layers.items():
        before, after = len(labels.rows), int(neurons.live[labels.rows].sum())
        if CONDENSED in node.meta:
            skipped += _staying(node, labels.rows, neurons)
        if after < before:
            name = _name(node, ctx)
            rewritten.append(Rewrite(name, "narrowed", detail=f"{before} -> {after} neurons"))
    if rewritten:
        _Narrowing(gm, neurons, evaluate).run()
    return PassResult(tuple(rewritten), tuple(skipped))


def _name(node: fx.Node, ctx: Context) -> str:
    if LAYER in node.meta:
        return str(node.meta[LAYER].name)
    return ctx.names.get(str(bind_arguments(node)["weight"].target), node.name)


def _staying(node: fx.Node, rows: Tensor, neurons: Neurons) -> list[Skip]:
    """Why ablated neurons of a layer stay, where that is known."""
    ablated = torch.ones(len(rows), dtype=torch.bool)
    if (active := node.meta[CONDENSED].rows) is None:
        return []
    ablated[active.long()] = False
    ablated &= neurons.live[rows]
    reasons = Counter(neurons.why[label] for label in rows[ablated].tolist() if label in neurons.why)
    return [
        Skip(node.meta[LAYER].name, f"ablated neurons stay: {reason}", {"ablated": count})
        for reason, count in reasons.items()
    ]


class _Narrowing:
    """The rewriting of one graph: each node whose tensor or whose inputs get shorter."""

    def __init__(self, gm: fx.GraphModule, neurons: Neurons, evaluate: Evaluator) -> None:
        self._gm, self._neurons, self._evaluate = gm, neurons, evaluate
        # by weight, bias and neurons kept: a layer called twice is selected from once
        self._selected: dict[object, tuple[tuple[Any, ...], CondensedWeight | None]] = {}

    def run(self) -> None:
        # all arguments first: what is cut and squeezed depends on the sizes as they were
        changed = {node for node in self._gm.graph.nodes if self._changes(node)}
        for node in list(self._gm.graph.nodes):
            if node in changed:
                changed.add(self._rewrite(node))
        for node in self._gm.graph.nodes:
            if node in changed:
                renew_value(self._gm.graph, node)

    def _changes(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is aten.sym_size.int:  # of a dimension that stays
            return False
        inputs = node.all_input_nodes if (cut := cut_of(node)) is None else [cut.source]
        return any(map(self._neurons.narrows, (node, *inputs)))

    def _rewrite(self, node: fx.Node) -> fx.Node:
        """Fit a node to its shorter inputs and output; returns it or what replaces it."""
        target = node.target
        if node in self._neurons.labels.layers:
            self._layer(node)
        elif target in PIECES:
            return self._pieces(node)
        elif target in (SLICE, NARROW):
            self._slice(node)
        elif target in SQUEEZES:
            node.target, node.args = aten.squeeze.dims, (node.args[0], _squeezed(node))
        elif target in SIZED:
            self._resize(node)
        elif target in CONSTANTS:
            self._constants(node)
        elif target is ATTENTION and (bound := bind_arguments(node))["scale"] is None:
            query = tensor_meta(bound["query"])
            assert query is not None
            node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(query.shape[-1])}
        return node

    def _shortened(self, node: fx.Node) -> tuple[int, Tensor] | None:
        """The dimension of a node's tensor that gets shorter, and what is kept along it for the first index of all
        others, as many as for any: bool [size]."""
        kept = self._neurons.kept(node)
        if kept is None or not self._neurons.narrows(node):
            return None
        dim = kept.dim_of(kept.varying[-1])
        merged = kept.merged(dim)
        assert merged is not None
        (axis,) = merged.span(dim)
        return dim, merged.data.movedim(axis, -1).reshape(-1, merged.data.shape[axis])[0]

    def _pieces(self, node: fx.Node) -> fx.Node:
        source: Any = node.args[0]
        shortened, meta = self._shortened(source), tensor_meta(source)
        assert shortened is not None
        assert meta is not None
        dim, kept = shortened
        if int(bind_arguments(node)["dim"]) % meta.ndim != dim:
            return node
        sizes = [int(piece.sum()) for piece in kept.split([part.shape[dim] for part in node.meta["val"]])]
        return replace_node(node, aten.split_with_sizes.default, (source, sizes, dim))

    def _slice(self, node: fx.Node) -> None:
        cut = cut_of(node)
        shortened = None if cut is None else self._shortened(cut.source)
        if cut is None or shortened is None or shortened[0] != cut.dim:
            return
        assert isinstance(cut.indices, range)
        kept = shortened[1]
        start = int(kept[: cut.indices.start].sum())
        node.target = SLICE
        node.args = (cut.source, cut.dim, start, start + int(kept[list(cut.indices)].sum()))
        node.kwargs = {}

    def _resize(self, node: fx.Node) -> None:
        """The sizes a view, an expand or an unflatten is given; one that is inferred stays so."""
        shortened = self._shortened(node)
        assert shortened is not None
        dim, kept = shortened
        *others, given = node.args
        assert isinstance(given, list | tuple)
        sizes: list[Any] = list(given)
        if node.target is aten.unflatten.int:
            meta = tensor_meta(node.args[0])
            assert meta is not None
            dim -= bind_arguments(node)["dim"] % meta.ndim
        if 0 <= dim < len(sizes) and sizes[dim] != -1:
            sizes[dim] = int(kept.sum())
        node.args = (*others, sizes)

    def _constants(self, node: fx.Node) -> None:
        """The constant operands of a binary operator, the constants of a norm."""
        out, shortened, kept = tensor_meta(node), self._shortened(node), self._neurons.kept(node)
        assert out is not None
        assert shortened is not None
        assert kept is not None
        for arg in node.all_input_nodes:
            value = None if arg in self._neurons.labels.spreads else self._evaluate(arg)
            if value is None:
                continue
            if node.target is PRELU and value.numel() == 1:
                continue
            per_channel = node.target in (*NORMS, PRELU)
            narrow = value[shortened[1]] if per_channel else narrowed(value, kept, out.ndim, *shortened)
            if narrow is not value:
                node.replace_input_with(arg, add_constant(self._gm, node, f"{node.name}_{arg.name}", narrow))

    def _layer(self, node: fx.Node) -> None:
        """Keep only the neurons and the inputs of a layer that are kept, once however often it is called."""
        labels, live = self._neurons.labels.layers[node], self._neurons.live
        rows = live[labels.rows]
        columns = None if labels.columns is None else live[labels.columns]
        bound = bind_arguments(node)
        bias, groups = bound["bias"], bound.get("groups", 1)
        if labels.columns is labels.rows:  # depthwise
            columns, groups = None, int(rows.sum())
            set_argument(node, "groups", groups)
        folded = None  # what the inputs that go from a dense layer are, 0 for those which stay
        if columns is not None and labels.constants is not None:
            folded = labels.constants.masked_fill(columns, 0.0)
        kept = tuple(None if side is None else str(side.tolist()) for side in (rows, columns, folded))
        constants, weight = self._selected.get((bound["weight"], bias, kept), (None, None))
        if constants is None:
            self._select(node, rows, columns, groups, folded)
            self._selected[bound["weight"], bias, kept] = node.args[1:3], node.meta.get(CONDENSED)
            first = after_inputs(self._gm.graph)
            for constant in node.args[1:3]:
                if isinstance(constant, fx.Node) and constant.op == "get_attr":
                    first.prepend(constant)  # before whichever call takes it next
        elif weight is not None:
            use_layer_weight(node, constants, weight)
        else:
            node.args = (node.args[0], *constants, *node.args[3:])
        if LAYER in node.meta:
            node.meta[LAYER] = dataclasses.replace(node.meta[LAYER], groups=groups)

    def _select(
        self, node: fx.Node, rows: Tensor, columns: Tensor | None, groups: int, folded: Tensor | None
    ) -> None:
        """Give a layer its rows and columns that are kept; to its bias what the inputs `folded` [in] contribute."""
        bound = bind_arguments(node)
        weight: CondensedWeight | None = node.meta.get(CONDENSED)
        parts = [self._evaluate(bound["weight"])] if weight is None else [weight.to_dense(), weight.mask()]
        bias = None if bound["bias"] is None else self._evaluate(bound["bias"])
        if folded is not None and bool(folded.any()):
            assert parts[0] is not None
            bias = with_constants(parts[0], folded.view(groups, -1), bias)
        parts = [_kept_part(part, rows, columns, groups) for part in parts if part is not None]
        bias = None if bias is None else bias[rows]
        if weight is not None:
            computed = bound["bias"] if bias is None else None
            set_layer_weight(self._gm, node, CondensedWeight.from_dense(*parts), bias)
            if computed is not None:
                node.update_arg(2, computed)
            return
        narrow = in_format_of(parts[0], bound["weight"].meta["val"])
        constants = [add_constant(self._gm, node, f"{node.name}_weight", narrow)]
        if bias is not None:
            constants.append(add_constant(self._gm, node, f"{node.name}_bias", bias))
        node.args = (node.args[0], *constants, *node.args[1 + len(constants) :])


def _kept_part(weight: Tensor, rows: Tensor, columns: Tensor | None, groups: int) -> Tensor:
    """weight [out, in/groups, ...] for rows kept [out] and columns kept [in], as many in each group."""
    weight = weight[rows]
    if columns is None or bool(columns.all()):
        return weight
    blocks = zip(weight.chunk(groups), columns.chunk(groups), strict=True)
    return torch.cat([block[:, kept] for block, kept in blocks])


def narrowed(value: Tensor, kept: Spread, ndim: int, dim: int, first: Tensor) -> Tensor:
    """A constant that is broadcast to a tensor, for the elements of it that are kept.

    Args:
        kept: of the tensor's elements; `ndim` its dimensions, of which `dim` gets shorter.
        first: bool, what is kept along `dim` for the first index of all others.
    """
    position = dim - (ndim - value.ndim)
    if position < 0 or value.shape[position] == 1:
        return value
    rows = kept.data.reshape(-1, kept.data.shape[kept.varying[-1]])
    if bool((rows == rows[0]).all()):
        return value.index_select(position, first.nonzero().flatten())
    every = kept.by_dim()
    assert every is not None
    every = every.movedim(dim, -1)  # [..., size]: other indices are kept for other heads
    indices = every.nonzero()[:, -1].reshape(*every.shape[:-1], -1).movedim(-1, dim)
    return torch.take_along_dim(value.reshape((1,) * (ndim - value.ndim) + value.shape), indices, dim)


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    position = list(bind_arguments(node)).index(name)
    if position < len(node.args):
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _squeezed(node: fx.Node) -> list[int]:
    """The dimensions of size 1 that a squeeze takes away."""
    meta = tensor_meta(node.args[0])
    assert meta is not None
    dims: Any = range(meta.ndim) if len(node.args) == 1 else node.args[1]
    dims = [dims] if isinstance(dims, int) else dims
    return [dim % meta.ndim for dim in dims if statically_known_true(meta.shape[dim] == 1)]
