"""Which neuron each element of an activation belongs to, and who reads it: what removing neurons must know.

Every layer labels its outputs; views, slices, heads and whatever keeps neurons apart carry the labels on. A residual
add or a gate ties the labels of both sides: such neurons stay or go together. A layer reads its inputs for its own
neurons, attention reads its queries and keys for its values. Whatever else sees a tensor pins its labels, by name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.attention import (
    ATTENTION,
    PRODUCTS,
    SOFTMAXES,
    averaged,
    contracted,
    feeds_softmax,
    sums_to_one,
)
from fanin_compile.axes import Spread, together
from fanin_compile.channels import channel_dim, constants, foldable, per_neuron
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import CONDENSED, CONVOLUTIONS, bind_arguments, tensor_meta
from fanin_compile.moves import CATS, PERMUTES, PIECES, cut_of, is_move, moved, permuted
from fanin_compile.neurons import Balance, Labels, LayerLabels, Reads
from fanin_compile.pointwise import BINARY, POINTWISE

aten = torch.ops.aten
PRELU = aten.prelu.default  # of each channel by itself, or of each element
NORMS = (
    aten.batch_norm.default,
    aten.instance_norm.default,
)  # of each channel by itself, the second dimension


def label_neurons(graph: fx.Graph, evaluate: Evaluator) -> Labels:
    """Label the neurons of all layers with constant weights and follow them through the graph."""
    labeller = _Labeller(graph, evaluate)
    for node in graph.nodes:
        labeller.visit(node)
    return labeller.labels


class _Labeller:
    def __init__(self, graph: fx.Graph, evaluate: Evaluator) -> None:
        self.labels = Labels()
        self._spreads = self.labels.spreads
        self._evaluate = evaluate
        self._constants = constants(graph, evaluate)

    def visit(self, node: fx.Node) -> None:
        """Label what `node` computes, and pin the labels of all inputs of which it is not known what it does."""
        known: tuple[Any, ...] = ()  # inputs that are dealt with
        if node.target in (aten.linear.default, *CONVOLUTIONS) and self._evaluate.is_constant(node.args[1]):
            known = self._layer(node)
        elif node.target in BINARY or node.target is aten.masked_fill.Scalar:
            known = self._combine(node)
        elif node.target is ATTENTION:
            known = self._attention(node)
        elif node.target in PRODUCTS:
            known = self._product(node)
        elif node.target in PIECES:
            known = self._pieces(node)
        elif node.target is aten.sym_size.int:
            known = self._size(node)
        else:
            known = self._carry(node)
        for arg in node.all_input_nodes:
            if arg in self._spreads and arg not in known:
                self._pin(arg, node)

    def _pin(self, arg: fx.Node, user: fx.Node, reason: str = "") -> None:
        op = "graph output" if user.op == "output" else user.target
        reason = reason or f"{arg.name} is read whole by {user.name} ({op})"
        self.labels.pins.append((self._spreads[arg].data.flatten(), reason))

    def _set(self, node: fx.Node, spread: Spread) -> None:
        self._spreads[node] = spread
        if spread.varying and not all(
            isinstance(size, int) for size in spread.axes[spread.dim_of(spread.varying[-1])]
        ):
            self._pin(node, node, f"{node.name} merges them with a dimension of unknown size")

    def _layer(self, node: fx.Node) -> tuple[Any, ...]:
        bound, out, dim = bind_arguments(node), tensor_meta(node), channel_dim(node)
        x, bias, groups = bound["input"], bound["bias"], bound.get("groups", 1)
        weight = tensor_meta(bound["weight"])
        if out is None or weight is None or dim is None:
            return ()
        if weight.ndim != 2 + CONVOLUTIONS.get(node.target, 0) or weight.numel() == 0:
            return ()  # a vector's output is no neuron
        source = self._spreads.get(x)
        columns = None if source is None else source.alone(dim)
        if source is not None and columns is None:
            self._pin(x, node)
        depthwise = groups > 1 and groups == out.shape[dim] and weight.shape[1] == 1
        if depthwise and columns is None:
            return (x,)
        rows = columns if depthwise and columns is not None else self.labels.new(int(out.shape[dim]))
        constants = None if columns is None or depthwise else self._dense_constants(node, dim)
        self.labels.layers[node] = LayerLabels(columns, rows, constants)
        self._set(node, Spread.along(tuple(out.shape), dim, rows))
        if bias is not None and not self._evaluate.is_constant(bias):
            self._pin(node, node, f"the bias of {node.name} is not constant")
        if depthwise:
            return (x,)
        if groups > 1:
            self._balance(node, rows.view(groups, -1))
        if columns is not None:
            columns = columns.view(groups, -1)
            self.labels.reads.append(
                Reads(columns, rows.view(groups, -1), _connections(node, groups, constants))
            )
            if groups > 1:
                self._balance(node, columns)
        return (x,)

    def _dense_constants(self, node: fx.Node, dim: int) -> Tensor | None:
        """What can be added to the bias of a dense layer; the masked ones' constants are in theirs already."""
        bound = bind_arguments(node)
        spread = self._constants.get(bound["input"])
        if CONDENSED in node.meta or spread is None:
            return None
        if bound["bias"] is not None and not self._evaluate.is_constant(bound["bias"]):
            return None
        values = per_neuron(spread, dim)
        return None if values is None else foldable(node, values)

    def _balance(self, node: fx.Node, rows: Tensor, least: int = 1) -> None:
        reason = f"{node.name} needs as many in each of {len(rows)} groups"
        self.labels.balanced.append(Balance(rows, least, reason))

    def _carry(self, node: fx.Node) -> tuple[Any, ...]:
        """Through operators that move elements or treat each by itself."""
        if is_move(node):
            return self._move(node)
        args: Any = node.args
        source = self._spreads.get(args[0]) if args and isinstance(args[0], fx.Node) else None
        if source is None:
            return ()
        ndim = source.ndim
        if node.target in SOFTMAXES and source.varies(args[1] % ndim):
            return ()
        if node.target in NORMS:
            bound = bind_arguments(node)
            others = any(source.varies(dim) for dim in range(ndim) if dim != 1)
            fixed = [bound[name] for name in ("running_mean", "running_var", "weight", "bias")]
            # an instance norm with statistics writes to them, or takes them in place of the input's
            written = bound["training"] if "training" in bound else bound["running_mean"] is not None
            if written or others or not all(arg is None or self._evaluate.is_constant(arg) for arg in fixed):
                return ()
        elif node.target is PRELU:
            slope = tensor_meta(args[1])
            others = any(source.varies(dim) for dim in range(ndim) if dim != 1)
            if slope is None or not self._evaluate.is_constant(args[1]) or (others and slope.numel() > 1):
                return ()
        elif node.target not in POINTWISE and node.target not in SOFTMAXES:
            return ()
        self._set(node, source)
        return args[:1]  # type: ignore[no-any-return]

    def _move(self, node: fx.Node) -> tuple[Any, ...]:
        cut = cut_of(node)
        origin: Any = node.args[0] if cut is None else cut.source
        if node.target not in CATS and origin not in self._spreads:
            return ()
        spread = moved(node, lambda arg: self._given(node, arg), self._tie)
        if spread is None or not self._keeps_order(node, origin):
            if cut is not None and origin in self._spreads:
                self._pin(origin, node)
            return ()
        self._set(node, spread)
        return tuple(node.all_input_nodes)

    def _given(self, node: fx.Node, arg: Any) -> Spread | None:
        """The labels of an argument; of one of several tensors put end to end that has none, a pinned one."""
        found = self._spreads.get(arg)
        meta = tensor_meta(arg)
        if found is not None or node.target not in CATS or meta is None:
            return found
        if not any(tensor in self._spreads for tensor in node.all_input_nodes):
            return None
        label = self.labels.new(1)
        self.labels.pins.append((label, f"{node.name} combines them with a tensor that is not a layer's"))
        return Spread.of(label[0]).broadcast(tuple(meta.shape))

    def _tie(self, data: list[Tensor]) -> Tensor:
        first: Tensor
        first, *others = torch.broadcast_tensors(*data)
        self.labels.ties += [(first, other) for other in others]
        return first

    def _keeps_order(self, node: fx.Node, origin: Any) -> bool:
        """Whether the axis of the neurons that gets shorter in `origin` is the one that does in what `node` makes."""
        source = self._spreads.get(origin) if isinstance(origin, fx.Node) else None
        if source is None or not source.varying:
            return True
        if node.target in PERMUTES:
            axes = [i for dim in permuted(node, source.ndim) for i in source.span(dim) if i in source.varying]
            return axes == sorted(axes)
        cut = cut_of(node)
        if cut is None or cut.dim != source.dim_of(source.varying[-1]):
            return True
        if not isinstance(cut.indices, range) or cut.indices.step != 1:
            return False
        start = cut.indices.start
        if start and len(source.varying) > 1:
            # what precedes it must get as much shorter for each index of the outer axes
            before = source.taken(cut.dim, range(start), start)
            if before is None:
                return False
            self._balance(node, before.data.reshape(-1, start), least=0)
        return True

    def _pieces(self, node: fx.Node) -> tuple[Any, ...]:
        taken = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
        return tuple(node.args[:1]) if taken else ()

    def _size(self, node: fx.Node) -> tuple[Any, ...]:
        arguments: Any = node.args
        tensor, dim = arguments
        source = self._spreads.get(tensor)
        return () if source is None or source.varies(dim % source.ndim) else (tensor,)

    def _combine(self, node: fx.Node) -> tuple[Any, ...]:
        """Both sides of an add, a gate, a mask: neurons at the same place are tied."""
        out = tensor_meta(node)
        if out is None or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
            return ()
        sides = [(arg, self._spreads[arg]) for arg in node.args[:2] if arg in self._spreads]  # type: ignore[index]
        labelled = [(arg, s.broadcast(tuple(out.shape))) for arg, s in sides if s.varying]
        if not labelled:
            return ()
        spreads = together([spread for _, spread in labelled], tuple(out.shape))
        if spreads is None:
            return ()
        spread = spreads[0].with_data(self._tie([s.data for s in spreads]))
        self._set(node, spread)
        varying = {spread.dim_of(axis) for axis in spread.varying}
        for arg in node.args[:2]:
            meta = tensor_meta(arg)
            if meta is None or arg in dict(labelled) or all(_broadcasts(meta, d - out.ndim) for d in varying):
                continue
            # a constant is selected from, if other neurons of other heads can be told apart in it
            if not self._evaluate.is_constant(arg) or spread.by_dim() is None:
                self._pin(node, node, f"{node.name} combines them with a tensor that is not a layer's")
        return tuple(arg for arg, _ in labelled)

    def _attention(self, node: fx.Node) -> tuple[Any, ...]:
        """softmax(q k^T) v: queries and keys are tied and read for the values; kernels want them of one size."""
        bound, out = bind_arguments(node), tensor_meta(node)
        query, key, value = parts = [bound[name] for name in ("query", "key", "value")]
        if out is None or bound["enable_gqa"]:
            return ()
        rows = self._contracted(out, [(query, -2), (key, -2), (value, -2)])
        values = averaged(self._spreads.get(value), out)
        if rows is None or values is None:
            return ()
        q, k, v, query_is, key_is, value_is = rows
        if not sums_to_one(node):
            reason = f"{node.name} may hide all positions from one, which is then 0"
            self.labels.lost.append((v[~value_is.isnan() & (value_is != 0)], reason))
        # a constant key adds as much to all the logits of a query, which the softmax does not see
        idle = (query_is == 0) | ~key_is.isnan()
        self.labels.ties.append((q, k))
        self.labels.reads.append(Reads(q, v, lambda: ~idle.unsqueeze(1)))
        self._balance(node, torch.cat([q, v]))
        self._set(node, values)
        return tuple(parts)

    def _product(self, node: fx.Node) -> tuple[Any, ...]:
        """a b, of three dimensions or more: scores of queries and keys, or an average of values."""
        out = tensor_meta(node)
        a, b = node.args[:2]
        if out is None or not isinstance(b, fx.Node) or not isinstance(a, fx.Node):
            return ()
        if a not in self._spreads:
            values = averaged(self._spreads.get(b), out)
            if values is None or not values.varies(out.ndim - 1):
                return ()
            self._set(node, values)
            return (b,)
        rows = self._contracted(out, [(a, -2), (b, -1)])
        if rows is None:
            return ()
        left, right, left_is, right_is = rows
        idle = (left_is == 0) | (right_is == 0)
        if feeds_softmax(node):
            idle |= ~right_is.isnan()
        self.labels.ties.append((left, right))
        self.labels.reads.append(Reads(left, None, lambda: ~idle.unsqueeze(1)))
        return (a, b)

    def _contracted(self, out: Tensor, parts: list[tuple[fx.Node, int]]) -> list[Tensor] | None:
        """[rows, n] for each of `parts`, the labels, then what is constant of it; a row for each head. None unless
        all have as many neurons, in the dimension which is not that of positions, with which they are given."""
        labels, constant, sizes = [], [], set()
        for part, positions in parts:
            meta, spread, known = tensor_meta(part), self._spreads.get(part), self._constants.get(part)
            if (
                meta is None
                or spread is None
                or meta.ndim != out.ndim
                or not spread.varies(meta.ndim - 3 - positions)
            ):
                return None
            sizes.add(meta.shape[-3 - positions])
            labels.append((spread, positions))
            varies = known is not None and known.varies(meta.ndim + positions)
            constant.append((None if varies else known, positions))
        if len(sizes) != 1:
            return None
        return contracted([*labels, *constant], out.shape[:-2], sizes.pop())


def _connections(node: fx.Node, groups: int, constants: Tensor | None) -> Callable[[], Tensor]:
    """The mask [G, o, i] of a layer, made when asked for; a dense one reads all that is not constant."""
    weight = node.meta.get(CONDENSED)
    if weight is None:
        read = torch.ones(1) if constants is None else constants.isnan()
        return lambda: read.bool().view(groups if constants is not None else 1, 1, -1)

    def connections() -> Tensor:
        mask: Tensor = weight.mask()
        mask = mask.flatten(2).any(2) if mask.ndim > 2 else mask
        return mask.view(groups, -1, mask.shape[1])

    return connections


def _broadcasts(meta: Tensor, dim: int) -> bool:
    """Whether a tensor is the same along a dimension, counted from the right, of what it is broadcast to."""
    return -dim > meta.ndim or statically_known_true(meta.shape[dim] == 1)
