"""Write products by a sparse constant that have another form as a linear layer's.

    y = einsum("bsd,dhk->bshk", x, w)          ->    y = unflatten(linear(x, reshape(permute(w))), -1, [h, k])
    y = w @ x  |  mv  |  inner  |  tensordot   ->    y = permute(linear(permute(x), w))
    y = addmm(b, x, w, beta=2, alpha=3)        ->    y = add(mm(x, w) * 3, b * 2)
    y = linear(x, w, b), b of one element      ->    y = linear(x, w, repeat(b))

Each is a contraction: what both operands have is summed over, what one of them has stays. Where the weight shares a
dimension that stays, as that of experts, and in operators of several products, there is no condensed form, and it is
named. A constant counts as sparse if it has a mask, or zeros by half: others are taken for operands like any.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import bind_arguments, constant_name, renew_value, tensor_meta
from fanin_compile.moves import laid_out_alike
from fanin_compile.pipeline import Context, PassResult
from fanin_compile.records import Rewrite, Skip

aten = torch.ops.aten
MATMULS = (aten.mm.default, aten.matmul.default, aten.mv.default, aten.bmm.default)
PAIRS = (*MATMULS, aten.inner.default, aten.tensordot.default)  # of two operands, the first arguments
SUMS = {aten.addmm.default: aten.mm.default, aten.addmv.default: aten.mv.default}  # and the product in them
# the arguments of other products that may be weights
OTHERS: dict[object, tuple[int, ...]] = {
    **dict.fromkeys((aten.baddbmm.default, aten.addbmm.default), (1, 2)),
    aten.bilinear.default: (2,),
    aten.convolution.default: (1,),
}

_BIASES: dict[object, tuple[int, int]] = {
    aten.linear.default: (2, 1),
    aten.addmm.default: (0, 2),
}  # and weights

Letters = list[str]  # the dimensions of a tensor, by name


def write_as_linears(gm: fx.GraphModule, ctx: Context) -> PassResult:
    rewritten: list[Rewrite] = []
    skipped: list[Skip] = []
    evaluate = Evaluator(gm)
    writer = _Writer()
    for node in list(gm.graph.nodes):
        _write_out_bias(node)
        weights = [w for w in _operands(node) if _sparsity(w, evaluate, ctx) > 0]
        if not weights or evaluate.is_constant(node) or _is_linear(node, weights[0]):
            continue  # what is of a linear's form is found as it is
        weight, what, product = weights[0], str(node.target), node
        name = constant_name(weight, ctx.names) or weight.name
        alike = (
            len({m.dtype for n in (node, *node.all_input_nodes) if (m := tensor_meta(n)) is not None}) == 1
        )
        if alike and node.target in SUMS:
            product = _without_sum(node)
        # under autocast a linear, or a sum, may not do what the product does
        if alike and (_is_linear(product, weight) or writer.write(product, weight)):
            rewritten.append(Rewrite(name, "linear", detail=f"{what} written as a linear"))
            continue
        shape = "x".join(map(str, weight.meta["val"].shape))
        sparsity = f"{_sparsity(weight, evaluate, ctx):.0%}"
        skipped.append(Skip(name, "no condensed form", {"op": what, "shape": shape, "sparsity": sparsity}))
    return PassResult(tuple(rewritten), tuple(skipped))


def _write_out_bias(node: fx.Node) -> None:
    """Give a bias that is broadcast, or is some view, an element for each neuron, as passes expect of a linear."""
    place, weight = _BIASES.get(node.target, (0, 0))
    bias = node.args[place] if place < len(node.args) else None
    if node.target not in _BIASES or not isinstance(bias, fx.Node):
        return
    out, value = node.meta["val"].shape[-1], bias.meta["val"]
    if _rank(node.args[weight]) != 2 or _rank(bias) not in (0, 1):
        return
    shaped = tuple(value.shape) == (out,)
    if shaped and value.is_contiguous():
        return
    with node.graph.inserting_before(node):
        if shaped:
            layout: dict[str, Any] = {"memory_format": torch.contiguous_format}
            whole = node.graph.call_function(aten.clone.default, (bias,), layout)
        else:
            whole = node.graph.call_function(aten.repeat.default, (bias, [out]))
    whole.meta = dict(bias.meta)
    renew_value(node.graph, whole)
    node.update_arg(place, whole)


def _operands(node: fx.Node) -> list[fx.Node]:
    """The factors of a product, whatever its form, that have at least two dimensions."""
    args: Any = node.args
    if node.target in (aten.einsum.default, aten.linalg_multi_dot.default):
        found = args[node.target is aten.einsum.default]
    elif node.target in PAIRS:
        found = args[:2]
    elif node.target in SUMS:
        found = args[1:3]
    else:
        found = [args[i] for i in OTHERS.get(node.target, ())]
    return [arg for arg in found if (meta := tensor_meta(arg)) is not None and meta.ndim > 1]


def _sparsity(node: fx.Node, evaluate: Evaluator, ctx: Context) -> float:
    """The share that a sparse constant leaves out, 0 for any other node."""
    value = evaluate(node)
    if value is None or not value.is_floating_point() or value.layout != torch.strided or not value.numel():
        return 0.0
    mask = ctx.masks.get(str(node.target)) if node.op == "get_attr" else None
    share = float(((value == 0) if mask is None else ~mask).double().mean())
    return share if mask is not None or share >= 0.5 else 0.0


def _is_linear(node: fx.Node, weight: fx.Node) -> bool:
    """Whether `node` is of the forms that are found as they are."""
    args: Any = node.args
    if node.target is aten.addmm.default:
        return args[2] is weight and not node.kwargs and _rank(args[0]) == 1
    if node.target in (aten.mm.default, aten.matmul.default):
        return args[1] is weight and _rank(weight) == 2
    if node.target is not aten.einsum.default or "->" not in args[0] or (found := _letters(node)) is None:
        return False
    (a, b), out = found
    x, w = (b, a) if args[1][0] is weight else (a, b)
    if len(w) != 2 or x[:-1] != out[:-1] or set(w) != {x[-1], out[-1]} or x[-1] == out[-1]:
        return False
    source: fx.Node = args[1][args[1][0] is weight]
    return _same_size(source.meta["val"].shape[-1], weight.meta["val"].shape[w.index(x[-1])])


def _without_sum(node: fx.Node) -> fx.Node:
    """Part the product from what is added to it; returns the product."""
    bound = bind_arguments(node)
    added, a, b = node.args
    graph, target = node.graph, SUMS[node.target]  # type: ignore[index]
    with graph.inserting_before(node):
        product = total = graph.call_function(target, (a, b))
        made = [product]
        if bound["alpha"] != 1:
            total = graph.call_function(aten.mul.Tensor, (total, bound["alpha"]))
            made.append(total)
        if bound["beta"] not in (0, 1):
            added = graph.call_function(aten.mul.Tensor, (added, bound["beta"]))
            made.append(added)
        if bound["beta"] != 0:  # else what is added is not read: neither its NaN
            # the product first, so that the sum lies in memory as it did
            total = graph.call_function(aten.add.Tensor, (total, added))
            made.append(total)
    for new in made:
        new.meta = dict(node.meta)
        renew_value(graph, new)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
    return product


def _letters(node: fx.Node) -> tuple[list[Letters], Letters] | None:
    """The dimensions of both operands of a product and of its output; None unless it has two operands."""
    args: Any = node.args
    operands = args[1] if node.target is aten.einsum.default else args[:2]
    ranks = [_rank(arg) for arg in operands]
    if len(ranks) != 2 or -1 in ranks:
        return None
    if node.target is aten.einsum.default:
        return _einsum(args[0], ranks)
    a, b = ([f"{side}{i}" for i in range(rank)] for side, rank in zip("ab", ranks, strict=True))
    if node.target in MATMULS:
        at = max(ranks[1] - 2, 0)
        b[at] = a[-1]
        # leading dimensions are the same, counted from the right
        for i in range(min(ranks) - 2):
            b[-3 - i] = a[-3 - i]
        longer = a if ranks[0] >= ranks[1] else b
        out = longer[: max(*ranks, 2) - 2] + a[-2:-1] + b[at + 1 :]
    elif node.target is aten.inner.default:
        b[-1] = a[-1]
        out = a[:-1] + b[:-1]
    elif node.target is aten.tensordot.default:
        for i, j in zip(args[2], args[3], strict=True):
            b[j] = a[i]
        out = [letter for letter in (*a, *b) if (letter in a) != (letter in b)]
    else:
        return None
    return [a, b], out


def _einsum(equation: str, ranks: list[int]) -> tuple[list[Letters], Letters]:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    sides: list[Letters] = []
    longest: Letters = []  # what the dots stand for, counted from the right
    for term, rank in zip(inputs.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        hidden = [f".{i}" for i in range(rank - len(before) - len(after), 0, -1)] if dots else []
        longest = max(longest, hidden, key=len)
        sides.append([*before, *hidden, *after])
    if not arrow:
        every = [letter for side in sides for letter in side if letter not in longest]
        return sides, longest + sorted(letter for letter in every if every.count(letter) == 1)
    before, dots, after = output.partition("...")
    return sides, [*before, *(longest if dots else ()), *after]


def _same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """For einsum, which broadcasts a dimension of size 1."""
    return statically_known_true(a == b)


def _rank(value: object) -> int:
    meta = tensor_meta(value)
    return -1 if meta is None else meta.ndim


class _Writer:
    def __init__(self) -> None:
        self._weights: dict[object, fx.Node] = {}  # written once, however many products read them

    def write(self, node: fx.Node, weight: fx.Node) -> bool:
        """Put a linear in the place of a product by `weight`, if it can be one and lie in memory as the product did."""
        found = _letters(node)
        if found is None:
            return False
        operands: Any = node.args[1] if node.target is aten.einsum.default else node.args[:2]
        first = operands[0] is weight
        source: fx.Node = operands[first]
        (a, b), out = found
        x, w = (b, a) if first else (a, b)
        stay, common = [n for n in x if n not in w], [n for n in x if n in w]
        rows = [n for n in out if n in w and n not in x]
        sides = (set(stay + rows) == set(out), set(rows + common) == set(w), not set(common) & set(out))
        if not all(sides) or not rows or not common or any(len(set(t)) != len(t) for t in (x, w, out)):
            return False
        x_meta, w_meta, meta = (tensor_meta(n) for n in (source, weight, node))
        if x_meta is None or w_meta is None or meta is None:
            return False
        size = dict(zip(w, w_meta.shape, strict=True))
        if not all(_same_size(x_meta.shape[x.index(n)], size[n]) for n in common):
            return False
        new = [source]

        def call(target: Any, *args: Any) -> None:
            with node.graph.inserting_before(node):
                new.append(node.graph.call_function(target, (new[-1], *args)))
            new[-1].meta = dict(node.meta)
            renew_value(node.graph, new[-1])

        self._permute(call, x, stay + common)
        if len(common) > 1:
            call(aten.flatten.using_ints, len(stay), -1)
        call(aten.linear.default, self._weight(weight, w, rows, common))
        if len(rows) > 1:
            call(aten.unflatten.int, len(stay), [size[n] for n in rows])
        self._permute(call, stay + rows, out)
        if not laid_out_alike(new[-1].meta["val"], meta):
            call(aten.contiguous.default)
        value = new[-1].meta["val"]
        if value.dtype != meta.dtype or not laid_out_alike(value, meta):
            for made in reversed(new[1:]):
                node.graph.erase_node(made)
            return False
        node.replace_all_uses_with(new[-1])
        node.graph.erase_node(node)
        return True

    @staticmethod
    def _permute(call: Any, before: Letters, after: Letters) -> None:
        if before != after:
            call(aten.permute.default, [before.index(n) for n in after])

    def _weight(self, weight: fx.Node, w: Letters, rows: Letters, common: Letters) -> fx.Node:
        """The node of `weight` as [rows, common], each of them flattened."""
        order = [w.index(n) for n in rows + common]
        key = (weight, *order, len(rows))
        if key not in self._weights:
            node, sizes = weight, [weight.meta["val"].shape[i] for i in order]
            with weight.graph.inserting_after(weight):
                if order != sorted(order):
                    node = weight.graph.call_function(aten.permute.default, (weight, order))
                    renew_value(weight.graph, node)
            if len(order) > 2:
                shape = [math.prod(sizes[: len(rows)]), math.prod(sizes[len(rows) :])]
                with weight.graph.inserting_after(node):
                    node = weight.graph.call_function(aten.reshape.default, (node, shape))
                    renew_value(weight.graph, node)
            self._weights[key] = node
        return self._weights[key]
