"""Compute a dense layer's active neurons alone where its ablated ones must stay in the output.

    y = linear(x, w [out, in], b)   ->   a = linear(x, w[active], b[active])
                                         y = index_copy(b.expand(..., out), -1, active, a)

    y = conv2d(x, w, b, ...)        ->   a = conv2d(x, w[active], b[active], ...)
                                         y = where(is_active, index_select(a, 1, position), b)

What nobody reads went with remove_unread_neurons; a graph output, a layer norm or a residual stream keeps the others.
Left dense, the layer would compute them in full, only to find their bias. Grouped convolutions stay as they are.

Images that are channels_last are written as linears are, theirs being the innermost dimension in memory: an inner
index_select is slow in eager (1235 us, index_copy 589), an index_copy of planes in inductor (8.4 ms, where 5.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fanin_compile.condensed import CondensedWeight
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import (
    CONDENSED,
    CONVOLUTIONS,
    LAYER,
    REFUSAL,
    add_constant,
    after_inputs,
    bind_arguments,
    renew_value,
    set_layer_weight,
    size_hint,
    tensor_meta,
    use_layer_weight,
)
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten


def compute_active(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    calls: dict[object, fx.Node] = {}  # the first of each weight: it is selected from once
    for node in list(gm.graph.nodes):
        refusal = node.meta.get(REFUSAL)
        if refusal is None or not refusal.active:
            continue
        layer, weight, bound = node.meta[LAYER], node.meta[CONDENSED], bind_arguments(node)
        y, bias = tensor_meta(node), evaluate(bound["bias"])
        assert y is not None
        if bound["bias"] is not None and bias is None:
            skipped.append(Skip(layer.name, "ablated neurons are computed: its bias is not constant"))
            continue
        dim = y.ndim - 1 - CONVOLUTIONS.get(node.target, 0)
        last_order = [*(d for d in range(y.ndim) if d != dim), dim]
        innermost = _lies_in(y, last_order)
        if not innermost and not _lies_in(y, range(y.ndim)):
            values = {"strides": y.stride()}
            skipped.append(Skip(layer.name, "ablated neurons are computed: its output is strided", values))
            continue
        first = calls.setdefault((bound["weight"], bound["bias"]), node)
        if first is node:
            _select(gm, node, bias)
        else:
            use_layer_weight(node, first.args[1:3], first.meta[CONDENSED])
        renew_value(gm.graph, node)
        _put_in_place(gm, node, weight, bias, dim, last_order if innermost else None)
        detail = f"{weight.n_active} of {weight.out_features} neurons computed"
        rewritten.append(Rewrite(layer.name, "active", detail=detail))
    return PassResult(tuple(rewritten), tuple(skipped))


def _lies_in(y: Tensor, order: Sequence[int]) -> bool:
    """Whether the dimensions of y are laid out in this order, outermost first, at the sizes of the example inputs."""
    shape = [size_hint(y.shape[d]) for d in order]
    return [size_hint(y.stride(d)) for d in order] == list(torch.empty(shape, device="meta").stride())


def _select(gm: fx.GraphModule, node: fx.Node, bias: Tensor | None) -> None:
    """Give a layer the active rows of its weight and bias."""
    weight: CondensedWeight = node.meta[CONDENSED]
    assert weight.rows is not None
    rows = weight.rows.long()
    active = CondensedWeight.from_dense(weight.to_dense()[rows], weight.mask()[rows])
    set_layer_weight(gm, node, active, None if bias is None else bias[rows])
    before = after_inputs(gm.graph)
    for constant in node.args[1:3]:
        if isinstance(constant, fx.Node):
            before.prepend(constant)  # whichever call takes it next


def _put_in_place(
    gm: fx.GraphModule,
    node: fx.Node,
    weight: CondensedWeight,
    bias: Tensor | None,
    dim: int,
    order: Sequence[int] | None,
) -> None:
    """Hand the users of `node`, which computes the active neurons of `weight` along `dim`, all neurons of it.

    Args:
        order: of the dimensions with `dim` last, if they lie in memory so; None if in their own order.
    """
    out, end, users = weight.out_features, node.next, list(node.users)
    a, rows = node.meta["val"], weight.rows
    assert rows is not None
    carried = {key: value for key, value in node.meta.items() if key not in (LAYER, CONDENSED, REFUSAL)}

    def call(target: torch._ops.OpOverload, *args: Any) -> fx.Node:
        with gm.graph.inserting_before(end):
            new = gm.graph.call_function(target, args)
        new.meta = dict(carried)
        renew_value(gm.graph, new)
        return new

    def constant(name: str, value: Tensor) -> fx.Node:
        return add_constant(gm, node, f"{node.name}_{name}", value)

    values = torch.zeros(out, dtype=a.dtype, device=a.device) if bias is None else bias
    if order is not None:
        moved = node if dim == a.ndim - 1 else call(aten.permute.default, node, order)
        lead = moved.meta["val"].shape[:-1]
        sizes = [n if isinstance(n, int) else call(aten.sym_size.int, moved, d) for d, n in enumerate(lead)]
        ablated = call(aten.expand.default, constant("ablated", values), [*sizes, out])
        placed = call(aten.index_copy.default, ablated, a.ndim - 1, constant("rows", rows.long()), moved)
        if moved is not node:
            placed = call(aten.permute.default, placed, [order.index(d) for d in range(a.ndim)])
    else:
        is_active, position = torch.zeros(out, dtype=torch.bool), torch.zeros(out, dtype=torch.int64)
        is_active[rows.long()], position[rows.long()] = True, torch.arange(len(rows))
        plane = [-1] + [1] * (a.ndim - 1 - dim)
        taken = call(aten.index_select.default, node, dim, constant("position", position))
        sides = constant("is_active", is_active.view(plane)), constant("ablated", values.view(plane))
        placed = call(aten.where.self, sides[0], taken, sides[1])
    node.replace_all_uses_with(placed, lambda user: user in users)
