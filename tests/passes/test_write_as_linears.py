from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.passes import PIPELINE
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.write_as_linears import write_as_linears
from fanin_compile.pipeline import Context, PassResult, run_pipeline
from tests.compile_support import assert_equals_model, randn
from tests.helpers import assert_close_at_scale
from tests.passes.support import calls, context, graph_of

aten = torch.ops.aten
gather_matmul = torch.ops.fanin.gather_matmul.default
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


class Product(nn.Module):
    """A product of x and a weight with 4 entries in 5 zero, and perhaps of b [5, 6]."""

    def __init__(self, form: Form, shape: tuple[int, ...], *, sparsity: float = 0.8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(shape, generator=generator) >= sparsity
        self.w, self.form = nn.Parameter(randn(*shape) * kept, requires_grad=False), form
        self.b = nn.Parameter(randn(5, 6, seed=1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.w, self.b)


def _einsum(equation: str, *, swapped: bool = False) -> Form:
    return lambda x, w, b: torch.einsum(equation, *((w, x) if swapped else (x, w)))


# the product, the shape of x, that of the weight
WRITTEN: dict[str, tuple[Form, tuple[int, ...], tuple[int, ...]]] = {
    "bi,oi": (_einsum("bi,oi"), (5, 8), (6, 8)),
    "implicit, sorted": (_einsum("zi,ai"), (5, 8), (6, 8)),
    "implicit, dots": (_einsum("...i,ai"), (2, 5, 8), (6, 8)),
    "bi,oi->ob": (_einsum("bi,oi->ob"), (5, 8), (6, 8)),
    "bsi,oi->bos": (_einsum("bsi,oi->bos"), (2, 5, 8), (6, 8)),
    "bis,oi->bso": (_einsum("bis,oi->bso"), (2, 8, 5), (6, 8)),
    "into heads": (_einsum("bsd,dhk->bshk"), (2, 5, 8), (8, 3, 4)),
    "into heads first": (_einsum("bsd,hdk->bhsk"), (2, 5, 8), (3, 8, 4)),
    "into heads, parted": (_einsum("bsd,dhk->bhsk"), (2, 5, 8), (8, 3, 4)),
    "out of heads": (_einsum("bshk,hkd->bsd"), (2, 5, 3, 4), (3, 4, 8)),
    "out of heads first": (_einsum("bhsk,hkd->bsd"), (2, 3, 5, 4), (3, 4, 8)),
    "dots": (_einsum("... d, d h k -> ... h k"), (2, 5, 8), (8, 3, 4)),
    "weight first": (_einsum("dhk,bsd->bshk", swapped=True), (2, 5, 8), (8, 3, 4)),
    "each expert": (_einsum("bsi,eoi->bseo"), (2, 5, 8), (3, 6, 8)),
    "w @ x": (lambda x, w, b: w @ x, (8, 5), (6, 8)),
    "w @ images": (lambda x, w, b: w @ x, (2, 8, 5), (6, 8)),
    "w @ vector": (lambda x, w, b: w @ x, (8,), (6, 8)),
    "mm": (lambda x, w, b: torch.mm(w, x), (8, 5), (6, 8)),
    "mv": (lambda x, w, b: torch.mv(w, x), (8,), (6, 8)),
    "inner": (lambda x, w, b: torch.inner(x, w), (2, 5, 8), (6, 8)),
    "inner, weight first": (lambda x, w, b: torch.inner(w, x), (5, 8), (6, 8)),
    "tensordot": (lambda x, w, b: aten.tensordot(x, w, [2], [1]), (2, 5, 8), (6, 8)),
    "tensordot of two": (lambda x, w, b: aten.tensordot(w, x, [0, 1], [-1, 1]), (2, 4, 3), (3, 4, 6)),
    "addmm with alpha": (lambda x, w, b: torch.addmm(b[0], x, w, alpha=0.5), (5, 8), (8, 6)),
    "addmm with both": (lambda x, w, b: torch.addmm(b, x, w, alpha=3, beta=-2), (5, 8), (8, 6)),
    "addmm without a sum": (lambda x, w, b: torch.addmm(b / 0, x, w, alpha=3, beta=0), (5, 8), (8, 6)),
    "addmm of rows": (lambda x, w, b: torch.addmm(b, x, w), (5, 8), (8, 6)),
    "addmm, expanded": (lambda x, w, b: torch.addmm(b[:, :1], x, w), (5, 8), (8, 6)),
    "addmm, weight first": (lambda x, w, b: torch.addmm(b.t(), w, x), (8, 5), (6, 8)),
    "addmv": (lambda x, w, b: torch.addmv(b[0], w, x, beta=2), (8,), (6, 8)),
}
NAMED: dict[str, tuple[Form, tuple[int, ...], tuple[int, ...]]] = {
    "common and kept": (_einsum("bsi,si->bs"), (4, 5, 8), (5, 8)),
    "summed alone": (_einsum("bsi,oi->bo"), (4, 5, 8), (6, 8)),
    "weight summed alone": (_einsum("bsi,oi->bs"), (4, 5, 8), (6, 8)),
    "diagonal": (_einsum("bbi,oi->bo"), (4, 4, 8), (6, 8)),
    "experts": (_einsum("ebi,eoi->ebo"), (3, 5, 8), (3, 6, 8)),
    "broadcast": (_einsum("bi,oi->bo"), (5, 1), (6, 8)),
    "outer": (_einsum("b,oi->boi"), (5,), (6, 8)),
    "three": (lambda x, w, b: torch.einsum("bi,oi,bo->bo", x, w, b), (5, 8), (6, 8)),
    "bmm": (lambda x, w, b: torch.bmm(x, w), (2, 5, 8), (2, 8, 6)),
    "experts of each": (lambda x, w, b: x.unsqueeze(1) @ w, (2, 5, 8), (3, 8, 6)),
    "baddbmm": (lambda x, w, b: torch.baddbmm(b, x, w), (2, 5, 8), (2, 8, 6)),
    "addbmm": (lambda x, w, b: torch.addbmm(b, x, w), (2, 5, 8), (2, 8, 6)),
    "bilinear": (lambda x, w, b: F.bilinear(x, x, w), (5, 8), (6, 8, 8)),
    "multi_dot": (lambda x, w, b: torch.linalg.multi_dot([x, w]), (5, 8), (8, 6)),
    "convolution": (
        lambda x, w, b: torch.convolution(x, w, None, [1], [0], [1], False, [0], 1),
        *((2, 8, 5), (6, 8, 3)),
    ),
}


def _operators(gm: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def _write(gm: torch.fx.GraphModule, ctx: Context) -> PassResult:
    result = write_as_linears(gm, ctx)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return result


@pytest.mark.parametrize("name", WRITTEN)
def test_a_product_by_a_sparse_weight_becomes_a_linear(name: str) -> None:
    form, x_shape, w_shape = WRITTEN[name]
    model, x = Product(form, w_shape), randn(*x_shape)
    gm = graph_of(model, x)
    before = gm(x)
    done = _write(gm, context(gm))
    assert [r.layer for r in done.rewritten] == ["w"]
    assert not done.skipped
    assert_equals_model(gm(x), model, x)
    assert gm(x).stride() == before.stride()
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")
    (layer,) = find_masked_layers(gm, context(gm)).found
    assert (layer.name, layer.nnz) == ("w", int((model.w != 0).sum()))
    result = run_pipeline(graph_of(model, x), PIPELINE, context(gm))
    assert len(calls(result.graph_module, gather_matmul)) == 1
    assert_equals_model(result.graph_module(x), model, x)


@pytest.mark.parametrize("name", NAMED)
def test_a_product_without_condensed_form_is_named(name: str) -> None:
    form, x_shape, w_shape = NAMED[name]
    model, x = Product(form, w_shape), randn(*x_shape)
    gm = graph_of(model, x)
    ops = _operators(gm)
    done = _write(gm, context(gm))
    assert _operators(gm) == ops
    assert not done.rewritten
    (skip,) = done.skipped
    assert (skip.layer, skip.reason) == ("w", "no condensed form")
    sparsity = 1 - float((model.w != 0).double().mean())
    assert skip.values["shape"] == "x".join(map(str, w_shape))
    assert skip.values["sparsity"] == f"{sparsity:.0%}"
    assert not find_masked_layers(gm, context(gm)).found
    assert_equals_model(gm(x), model, x)


FOUND_AS_THEY_ARE: dict[str, Form] = {
    "einsum": _einsum("bi,oi->bo"),
    "matmul": lambda x, w, b: x @ w.t(),
    "addmm": lambda x, w, b: torch.addmm(b[0], x, w.t()),
}


@pytest.mark.parametrize("name", FOUND_AS_THEY_ARE)
def test_leaves_what_is_found_as_it_is(name: str) -> None:
    model, x = Product(FOUND_AS_THEY_ARE[name], (6, 8)), randn(5, 8)
    gm = graph_of(model, x)
    assert _write(gm, context(gm)) == PassResult()
    assert len(find_masked_layers(gm, context(gm)).found) == 1


@pytest.mark.parametrize("name", ["into heads", "w @ x", "bmm"])
def test_leaves_dense_products_and_constants_alone(name: str) -> None:
    form, x_shape, w_shape = (WRITTEN | NAMED)[name]
    x = randn(*x_shape)
    gm = graph_of(Product(form, w_shape, sparsity=0.1), x)
    assert _write(gm, context(gm)) == PassResult()
    frozen = randn(*x_shape)
    gm = graph_of(Product(lambda x, w, b: form(frozen, w, b) + x.sum(), w_shape), x)
    assert _write(gm, context(gm)) == PassResult()


def test_a_mask_decides_also_where_the_weight_is_reshaped() -> None:
    form, x_shape, w_shape = WRITTEN["into heads"]
    model, x = Product(form, w_shape, sparsity=0.0), randn(*x_shape)
    mask = torch.rand(w_shape, generator=torch.Generator().manual_seed(3)) < 0.3
    gm = graph_of(model, x)
    ctx = context(gm, masks={"w": mask}, masks_decide=True)
    result = run_pipeline(gm, PIPELINE, ctx)
    (layer,) = result.found
    assert layer.nnz == int(mask.sum())
    exact = torch.einsum("bsd,dhk->bshk", x.double(), (model.w * mask).double())
    assert_close_at_scale(result.graph_module(x), exact)


def test_a_weight_in_two_products_is_written_once() -> None:
    heads, x = _einsum("bsd,dhk->bshk"), randn(2, 5, 8)
    model = Product(lambda x, w, b: heads(x, w, b) + heads(x.neg(), w, b), (8, 3, 4))
    gm = graph_of(model, x)
    _write(gm, context(gm))
    found = find_masked_layers(gm, context(gm)).found
    assert [(layer.name, layer.dense_bytes > 0) for layer in found] == [("w", True), ("w (use 2)", False)]


@pytest.mark.parametrize("name", ["mv", "addmv", "inner", "tensordot", "into heads", "addmm with both"])
def test_keeps_the_dtype_under_autocast(name: str) -> None:
    form, x_shape, w_shape = WRITTEN[name]
    model, x = Product(form, w_shape), randn(*x_shape)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        gm = graph_of(model, x)
        result: Any = run_pipeline(gm, PIPELINE, context(gm))
        y = result.graph_module(x)
    assert y.dtype == expected.dtype
    assert_close_at_scale(y.float(), expected.float(), share=2e-2)
    assert result.found or [s.reason for s in result.skipped] == ["no condensed form"]


@pytest.mark.parametrize("shape", [(1,), ()], ids=["one element", "scalar"])
@pytest.mark.parametrize(
    "form", [F.linear, lambda x, w, b: torch.addmm(b, x, w.t())], ids=["linear", "addmm"]
)
def test_a_bias_for_all_neurons_at_once(form: Form, shape: tuple[int, ...]) -> None:
    model, x = Product(lambda x, w, b: torch.relu(form(x, w, b)), (6, 8)), randn(5, 8)
    model.w[4:] = 0  # ablated: constants, which the bias alone makes
    model.b = nn.Parameter(randn(1, seed=2).view(shape), requires_grad=False)
    gm = graph_of(model, x)
    result = run_pipeline(gm, PIPELINE, context(gm))
    assert len(calls(result.graph_module, gather_matmul)) == 1
    assert_close_at_scale(result.graph_module(x), model(x))
