from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.graph import CONDENSED, LAYER
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.write_as_linears import write_as_linears
from fanin_compile.pipeline import run_pipeline
from tests.compile_support import assert_equals_model, fan_in_mask, randn, sparse_linear, sparse_weight
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten


def test_finds_sparse_layers_beside_a_dense_one() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=3), nn.Linear(32, 16))
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, inputs=(x,))
    sparse, dense = calls(gm, aten.linear.default)
    layer = sparse.meta[LAYER]
    assert (layer.name, layer.op, layer.shape, layer.fan_in, layer.ablated) == (
        "0",
        "linear",
        (32, 64),
        (6, 6),
        3,
    )
    assert (layer.nnz, layer.batch, layer.dense_macs, layer.sparse_macs) == (
        29 * 6,
        5,
        5 * 32 * 64,
        5 * 29 * 6,
    )
    assert torch.equal(sparse.meta[CONDENSED].to_dense(), model[0].weight.detach())  # type: ignore[operator]
    assert CONDENSED not in dense.meta
    assert [layer.name for layer in result.found] == ["0", "1"]
    assert [str(s) for s in result.skipped] == ["every weight is active (shape 16x32)"]


class _Product(nn.Module):
    """weight * mask in the graph, the weight itself without zeros but one inside the mask."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.mask = nn.Buffer(fan_in_mask(32, 64, 6))
        self.other = nn.Buffer(fan_in_mask(32, 64, 60, seed=1))
        self.weight = nn.Parameter(randn(32, 64))
        with torch.no_grad():
            self.weight[tuple((self.mask & self.other).nonzero()[0])] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        forms = {
            "mul": lambda: w * self.mask,
            "mul float": lambda: self.mask.float() * w,
            "nested": lambda: w * self.mask * self.other,
            "where": lambda: torch.where(self.mask, w, 0.0),
            "where not": lambda: torch.where(~self.mask, torch.zeros_like(w), w),
            "masked_fill": lambda: w.masked_fill(~self.mask, 0.0),
        }
        return F.linear(x, forms[self.form]())


@pytest.mark.parametrize("form", ["mul", "mul float", "nested", "where", "where not", "masked_fill"])
def test_the_mask_in_a_weights_expression_decides(form: str) -> None:
    model, x = _Product(form), randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, inputs=(x,))
    (node,) = calls(gm, aten.linear.default)
    mask = model.mask & model.other if form == "nested" else model.mask
    assert torch.equal(node.meta[CONDENSED].mask(), mask)
    assert [r.became for r in result.rewritten] == ["constant weight"]
    assert not calls(gm, aten.mul.Tensor)
    assert not calls(gm, aten.where.self)


def test_what_is_not_zero_is_active_whatever_the_mask_says() -> None:
    model, x = sparse_linear(64, 32, 6), randn(5, 64)
    gm = graph_of(model, x)
    run(gm, ctx=context(gm, masks={"weight": torch.zeros(32, 64, dtype=torch.bool)}), inputs=(x,))
    assert torch.equal(calls(gm, aten.linear.default)[0].meta[CONDENSED].mask(), model.weight != 0)


def test_a_factor_of_ones_hides_no_zeros() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(sparse_weight(32, 64, 6)), nn.Parameter(torch.ones(32, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.scale)

    model, x = Model(), randn(5, 64)
    gm = graph_of(model, x)
    run(gm, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[LAYER].fan_in == (6, 6)


def test_matmul_forms_become_linears_and_scaled_or_dynamic_ones_do_not() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(sparse_weight(32, 64, 6).t().contiguous()), nn.Parameter(randn(32))

        def forward(self, x: Tensor) -> list[Tensor]:
            matched = [torch.addmm(self.b, x, self.w), torch.mm(x, self.w), x @ self.w, x[0] @ self.w]
            left = [
                torch.addmm(self.b, x, self.w, alpha=2),
                x @ x.t(),
                (x[:, :1] * self.w[:1]) @ self.w.t()[:, :3],
            ]
            return matched + left

    model, x = Model(), randn(5, 64)
    gm = graph_of(model, x)
    run(gm, inputs=(x,))
    assert len(calls(gm, aten.linear.default)) == 5  # the four, and the last by its constant slice
    assert len(calls(gm, aten.addmm.default)) == 1
    names = [node.meta[LAYER].name for node in calls(gm, aten.linear.default)]
    assert len(set(names)) == 5


def test_a_weight_used_twice_counts_its_bytes_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = sparse_linear(64, 64, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(self.a(x))
            return y

    x = randn(5, 64)
    result = run(graph_of(Model(), x), inputs=(x,))
    assert [(layer.name, layer.dense_bytes) for layer in result.found] == [
        ("a", 64 * 64 * 4),
        ("a (use 2)", 0),
    ]


def test_a_weight_made_of_the_input_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(sparse_weight(32, 64, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * x.mean())

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    result = find_masked_layers(gm, context(gm))
    assert result.found == ()
    assert [s.reason for s in result.skipped] == ["its weight changes inside the graph"]


@pytest.mark.parametrize(
    ("equation", "swapped"),
    [
        ("bsi,oi->bso", False),
        ("bsi,io->bso", False),
        ("... i, oi -> ...o", False),
        ("oi,bsi->bso", True),
        ("io,...i->...o", True),
    ],
)
def test_an_einsum_of_a_linear_layer(equation: str, swapped: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = sparse_weight(32, 64, 6)
            self.w = nn.Parameter(weight.t().contiguous() if "io" in equation else weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, *((self.w, x) if swapped else (x, self.w)))

    x = randn(2, 5, 64)
    gm = graph_of(Model(), x)
    (layer,) = run(gm, inputs=(x,)).found
    assert (layer.shape, layer.fan_in, layer.batch) == ((32, 64), (6, 6), 10)
    assert not calls(gm, aten.einsum.default)


def test_an_einsum_that_broadcasts_its_sum_is_no_linear_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(sparse_weight(8, 8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bi,oi->bo", x, self.w)

    x = randn(5, 1)
    assert run(graph_of(Model(), x), inputs=(x,)).found == ()


@pytest.mark.parametrize(
    ("equation", "condensed"),
    [
        ("bsi,si->bs", False),
        ("bsi,oi->bos", True),
        ("bsi,oi->bo", False),
        ("bsi,oi", True),
        ("bis,oi->bso", True),
        ("bbi,oi->bo", False),
    ],
)
def test_other_einsums_are_found_or_named(equation: str, condensed: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(sparse_weight(8, 8, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x, self.w)

    model, x = Model(), randn(8, 8, 8)
    gm = graph_of(model, x)
    result = run_pipeline(gm, (write_as_linears, find_masked_layers), context(gm))
    assert [layer.name for layer in result.found] == (["w"] if condensed else [])
    assert [str(skip) for skip in result.skipped] == (
        [] if condensed else ["no condensed form (op aten.einsum.default, shape 8x8, sparsity 75%)"]
    )
    assert len(calls(result.graph_module, aten.einsum.default)) == (not condensed)
    assert_equals_model(result.graph_module(x), model, x)
