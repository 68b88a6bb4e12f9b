from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.graph import CONDENSED, LAYER
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fold_scale import fold_scale
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.pipeline import Context
from tests.compile_support import any_type, assert_equals_model, randn, sparse_linear, sparse_weight
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten
FACTORS = (*(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div_.Tensor),)


class Scaled(nn.Module):
    """`form` of a masked linear's output [3, 5, 32], of x [3, 5, 64] and of a factor for each neuron."""

    def __init__(
        self, form: Callable[..., Tensor], *, gamma: Tensor | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.a, self.form = sparse_linear(64, 32, 6, ablated=3, bias=bias), form
        self.gamma = nn.Parameter(randn(32) if gamma is None else gamma, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.a(x), x[..., :32], self.gamma)


FOLDED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "number": lambda h, x, g: h * 0.5,
    "number before": lambda h, x, g: 3 * h,
    "negative number": lambda h, x, g: h * -2.5,
    "in place": lambda h, x, g: h.mul_(0.1),
    "quotient": lambda h, x, g: h / 8,
    "quotient in place": lambda h, x, g: h.div_(0.3),
    "two factors": lambda h, x, g: (h * 0.3) / 7.0,
    "alpha": lambda h, x, g: torch.add(x, h, alpha=0.25),
    "alpha in place": lambda h, x, g: x.clone().add_(h, alpha=-2),
    "number of heads": lambda h, x, g: h.view(3, 5, 4, 8).transpose(1, 2) / 8**0.5,
    "each neuron": lambda h, x, g: g * h,
    "each neuron, quotient": lambda h, x, g: h / (g.abs() + 0.1),
    "one element": lambda h, x, g: h * g[:1],
    "of an expression": lambda h, x, g: h * g.exp(),
    "each neuron, permuted": lambda h, x, g: h.permute(2, 0, -2).mul(g.view(-1, 1, 1)),
    "before a residual": lambda h, x, g: x + (h.transpose(1, 2) * g[:, None]).transpose(1, 2),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FOLDED)
def test_folds_a_constant_factor(form: str, bias: bool) -> None:
    model, x = Scaled(FOLDED[form], bias=bias), randn(3, 5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_scale, inputs=(x,))
    assert {(r.layer, r.became, r.detail) for r in result.rewritten} == {("a", "folded", "scale folded")}
    assert not result.skipped
    assert not any(calls(gm, target) for target in FACTORS)
    (node,) = calls(gm, aten.linear.default)
    assert torch.equal(node.meta[CONDENSED].mask(), model.a.weight != 0)
    assert node.meta[LAYER].name == "a"
    assert all("alpha" not in n.kwargs for n in gm.graph.nodes)
    assert_equals_model(gm(x), model, x)


def test_factors_of_0_and_negative_ones_keep_the_structure() -> None:
    gamma = randn(32)
    gamma[:5] = 0.0
    gamma[5:9] = -1e-6
    model, x = Scaled(FOLDED["each neuron"], gamma=gamma), randn(3, 5, 64)
    gm = graph_of(model, x)
    assert len(run(gm, fold_scale, inputs=(x,)).rewritten) == 1
    (node,) = calls(gm, aten.linear.default)
    assert torch.equal(node.meta[CONDENSED].mask(), model.a.weight != 0)
    assert_equals_model(gm(x), model, x)
    assert bool((gm(x)[..., :5] == 0).all())


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_folds_into_a_convolution(dims: int, groups: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3, groups=groups)
            with torch.no_grad():
                self.a.weight.mul_(self.a.weight > 0.1)
            self.gamma = nn.Parameter(randn(6, *[1] * dims))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) * self.gamma
            return y

    model, x = Model(), randn(2, 4, *[5] * dims)
    gm = graph_of(model, x)
    assert len(run(gm, fold_scale, inputs=(x,)).rewritten) == 1
    assert not calls(gm, aten.mul.Tensor)
    assert_equals_model(gm(x), model, x)


def test_the_block_of_a_convnext_ends_in_a_fused_residual() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a = nn.Conv2d(16, 16, 3, padding=1, groups=16), sparse_linear(16, 16, 4)
            self.gamma = nn.Parameter(randn(16))

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv(x).permute(0, 2, 3, 1)
            y: Tensor = x + (self.gamma * self.a(h)).permute(0, 3, 1, 2)
            return y

    for memory_format, fused in ((torch.channels_last, True), (torch.contiguous_format, False)):
        model = any_type(nn.Sequential(Block(), Block()))
        x = randn(2, 16, 5, 7).to(memory_format=memory_format)
        gm = graph_of(model, x)
        result = run(gm, fold_scale, condense_linear, fuse_epilogue, inputs=(x,))
        # in planar images the sum would lie across the rows of the linear's output
        assert [r.detail for r in result.rewritten] == (["+ residual"] * 2 if fused else [])
        assert len(calls(gm, aten.add.Tensor)) == (0 if fused else 2)
        assert not calls(gm, aten.mul.Tensor)
        assert gm(x).stride() == model(x).stride()
        assert_equals_model(gm(x), model, x)


LEFT: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "two readers": (lambda h, x, g: h * 0.5 + h, ""),
    "not constant": (lambda h, x, g: h * x, ""),
    "alpha of what is added": (lambda h, x, g: torch.add(h, x, alpha=2), ""),
    "added to itself": (lambda h, x, g: torch.add(h, h, alpha=2), ""),
    "an activation between": (lambda h, x, g: torch.relu(h) * 0.5, ""),
    "denominator": (lambda h, x, g: 1.0 / h, ""),
    "alpha of dtype": (lambda h, x, g: torch.add(x.double(), h, alpha=2), "its factor has another dtype"),
    "fp64": (lambda h, x, g: h * g.double(), "its factor has another dtype"),
    "fp64 number": (lambda h, x, g: h * g.double()[0], "its factor has another dtype"),
    "integers": (lambda h, x, g: h * g.long(), "its factor has another dtype"),
    "positions": (lambda h, x, g: h * g[:5, None], "its factor differs within a neuron"),
    "heads": (lambda h, x, g: h.view(3, 5, 4, 8) * g[:8], "its factor differs within a neuron"),
    "permuted": (lambda h, x, g: h.transpose(1, 2) * g[:5], "its factor differs within a neuron"),
    "broadcast": (lambda h, x, g: h * g[:2].view(2, 1, 1, 1), "its factor broadcasts it"),
    "infinite": (lambda h, x, g: h * (g / 0), "its factor is not finite"),
    "quotient of 0": (lambda h, x, g: h / (g * 0), "its factor is not finite"),
    "overflow": (
        lambda h, x, g: h * (g * 0 + 3e38),
        "its factor takes its weights out of their dtype's range",
    ),
    "underflow": (lambda h, x, g: h * 1e-39, "its factor takes its weights out of their dtype's range"),
}


@pytest.mark.parametrize("form", LEFT)
def test_leaves(form: str) -> None:
    function, reason = LEFT[form]
    model, x = Scaled(function), randn(3, 5, 64)
    gm = graph_of(model, x)
    before = [str(node) for node in gm.graph.nodes if node.target in FACTORS]
    with torch.no_grad():
        result = fold_scale(gm, _found(gm))
    assert not result.rewritten
    assert [(s.layer, s.reason) for s in result.skipped] == ([("a", reason)] if reason else [])
    assert [str(node) for node in gm.graph.nodes if node.target in FACTORS] == before


def _found(gm: torch.fx.GraphModule) -> Context:
    ctx = context(gm)
    assert find_masked_layers(gm, ctx).found
    return ctx


def test_leaves_under_autocast_what_a_factor_of_another_dtype_promotes() -> None:
    x = randn(3, 5, 64)
    for form, folds in ((FOLDED["each neuron"], False), (FOLDED["quotient"], True)):
        model = Scaled(form)
        with torch.autocast("cpu", torch.bfloat16):
            gm = graph_of(model, x)
            ctx = _found(gm)
            result = fold_scale(gm, ctx)
        assert len(result.rewritten) == folds
        assert [s.reason for s in result.skipped] == ([] if folds else ["its factor has another dtype"])
        assert folds or calls(gm, aten.mul.Tensor)


def test_leaves_a_weight_that_is_used_elsewhere_and_a_bias_made_of_the_input() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = sparse_linear(64, 64, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(self.a(x)) * 0.5
            return y

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(sparse_weight(64, 64, 6))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, x[0]) * 0.5

    for model, reason in (
        (Twice(), "its weight is used elsewhere"),
        (Computed(), "its bias is not constant"),
    ):
        x = randn(5, 64)
        result = run(graph_of(model, x), fold_scale, inputs=(x,))
        assert not result.rewritten
        assert [s.reason for s in result.skipped] == [f"its factor stays: {reason}"]
