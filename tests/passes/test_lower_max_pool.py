from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fanin_compile
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.lower_depthwise import lower_depthwise
from fanin_compile.passes.lower_max_pool import lower_max_pool
from fanin_compile.passes.reuse_residuals import reuse_residuals
from fanin_compile.passes.split_batch import split_batch
from fanin_compile.pipeline import PassResult
from tests.compile_support import (
    any_type,
    assert_equals_model,
    compiled,
    no_warning_of_ours,
    randn,
    recorded,
)
from tests.passes.support import calls, context, graph_of, position, run
from tests.passes.test_lower_depthwise import KINDS, _pointwise

aten = torch.ops.aten
max_pool = torch.ops.fanin.max_pool.default
TORCH_POOLS = (
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default),
)
Body = Callable[["_Model", Tensor], Any]


class _Model(nn.Module):
    """A dense stem and a masked layer, for a body to pool between them."""

    def __init__(self, body: Body, *, dims: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = KINDS[dims](4, 4, 3, padding=1)
        self.masked = _pointwise(dims, 4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _lower(model: nn.Module, dims: int = 2, size: int = 11) -> tuple[fx.GraphModule, PassResult]:
    x = 8 * randn(2, 4, *[size] * dims)
    gm = graph_of(model, x)
    return gm, run(gm, condense_conv, lower_max_pool, inputs=(x,))


# the activation folded, then kernel, stride, padding, dilation and ceil_mode
MATCHES: dict[str, tuple[Body, list[Any]]] = {
    "of a residual network": (
        lambda m, x: m.masked(F.max_pool2d(F.relu(m.stem(x)), 3, 2, 1)),
        ["relu", [3, 3], [2, 2], [1, 1], [1, 1], False],
    ),
    "in place": (
        lambda m, x: m.masked(F.max_pool2d(F.relu_(m.stem(x)), 3, 2, 1)),
        ["relu", [3, 3], [2, 2], [1, 1], [1, 1], False],
    ),
    "relu6, the stride left out": (
        lambda m, x: m.masked(F.max_pool2d(F.relu6(m.stem(x)), (2, 3))),
        ["relu6", [2, 3], [2, 3], [0, 0], [1, 1], False],
    ),
    "a clamp": (
        lambda m, x: m.masked(F.max_pool2d(F.hardtanh(m.stem(x), 0.0, 6.0), 3, (2, 1), (1, 0))),
        ["relu6", [3, 3], [2, 1], [1, 0], [1, 1], False],
    ),
    "behind a condensed one, dilated, rounded up": (
        lambda m, x: F.max_pool2d(F.relu(m.masked(x)), 2, 2, 0, 2, ceil_mode=True),
        ["relu", [2, 2], [2, 2], [0, 0], [2, 2], True],
    ),
    "without an activation": (
        lambda m, x: m.masked(F.max_pool2d(m.stem(x), 2)),
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "an activation that may decrease": (
        lambda m, x: m.masked(F.max_pool2d(F.silu(m.stem(x)), 2)),
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "a clamp at other bounds": (
        lambda m, x: m.masked(F.max_pool2d(F.hardtanh(m.stem(x)), 2)),
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "an activation that others read": (
        lambda m, x: (h := F.relu(m.stem(x)), m.masked(F.max_pool2d(h, 2)) + h.mean())[1],
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "in place of what others read": (
        lambda m, x: (h := m.stem(x), y := m.masked(F.max_pool2d(F.relu_(h), 2)), y + h.mean())[2],
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "in place of a view": (
        lambda m, x: (h := m.stem(x), y := m.masked(F.max_pool2d(F.relu_(h[1:]), 2)), y + h.mean())[2],
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "written to after the activation": (
        lambda m, x: (h := m.stem(x), a := F.relu(h), h.mul_(-1), m.masked(F.max_pool2d(a, 2)) + h.mean())[3],
        ["none", [2, 2], [2, 2], [0, 0], [1, 1], False],
    ),
    "windows that may hold nothing": (
        lambda m, x: F.max_pool2d(F.relu(m.masked(x)), 2, 1, 1, (5, 1)),
        ["none", [2, 2], [1, 1], [1, 1], [5, 1], False],
    ),
    "indices that nobody reads": (
        lambda m, x: m.masked(F.max_pool2d(F.relu(m.stem(x)), 3, 2, 1, return_indices=True)[0]),
        ["relu", [3, 3], [2, 2], [1, 1], [1, 1], False],
    ),
}


@pytest.mark.parametrize("name", MATCHES)
def test_lowers(name: str) -> None:
    body, expected = MATCHES[name]
    gm, result = _lower(_Model(body))
    (node,) = calls(gm, max_pool)
    assert [node.args[6], *node.args[1:6]] == expected
    assert not any(calls(gm, target) for target in TORCH_POOLS)
    (done,) = result.rewritten
    folded = "" if expected[0] == "none" else f", {expected[0]} folded"
    assert (done.became, done.detail) == ("max-pool", f"planar kernel{folded}")
    assert done.layer.startswith("max_pool2d")
    assert not result.skipped


OTHER_DIMENSIONS: dict[str, tuple[int, Body]] = {
    "1d": (1, lambda m, x: m.masked(F.max_pool1d(F.relu(m.stem(x)), 3, 2, 1))),
    "3d": (3, lambda m, x: m.masked(F.max_pool3d(F.relu(m.stem(x)), 3, 2, 1))),
    "3d, indices that nobody reads": (
        3,
        lambda m, x: m.masked(F.max_pool3d(F.relu(m.stem(x)), 3, 2, 1, return_indices=True)[0]),
    ),
}


@pytest.mark.parametrize("name", OTHER_DIMENSIONS)
def test_lowers_other_dimensions(name: str) -> None:
    dims, body = OTHER_DIMENSIONS[name]
    gm, result = _lower(_Model(body, dims=dims), dims, size=6)
    (node,) = calls(gm, max_pool)
    assert node.args[1:] == ([3] * dims, [2] * dims, [1] * dims, [1] * dims, False, "relu")
    assert len(result.rewritten) == 1


def test_pools_and_depthwise_layers_pass_the_neighbourhood_on_to_each_other() -> None:
    torch.manual_seed(0)
    dense = [nn.Conv2d(4, 4, 3, groups=4, padding=1) for _ in range(2)]
    for layers in (
        (_pointwise(2, 4, 4), dense[0], nn.MaxPool2d(2), dense[1]),
        (nn.MaxPool2d(2), dense[1], nn.MaxPool2d(2), _pointwise(2, 4, 4)),
        (_pointwise(2, 4, 4), nn.MaxPool2d(2), dense[1], nn.MaxPool2d(2)),
    ):
        x = randn(2, 4, 12, 12)
        gm = graph_of(nn.Sequential(*layers), x)
        run(gm, condense_conv, lower_depthwise, lower_max_pool, inputs=(x,))
        count = {kind: sum(isinstance(layer, kind) for layer in layers) for kind in (nn.MaxPool2d, nn.Conv2d)}
        assert len(calls(gm, max_pool)) == count[nn.MaxPool2d]
        assert len(calls(gm, torch.ops.fanin.depthwise_conv.default)) == count[nn.Conv2d] - 1


LEFT: dict[str, tuple[Body, str]] = {
    "alone": (
        lambda m, x: (m.masked(x), F.max_pool2d(m.stem(x).softmax(1), 2)),
        "beside no condensed convolution",
    ),
    "indices that are read": (
        lambda m, x: F.max_pool2d(m.masked(x), 2, return_indices=True),
        "its indices are read",
    ),
    "other dtypes": (
        lambda m, x: F.max_pool2d(m.masked(x).relu().double(), 2),
        "the planar kernel knows float32 alone",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves_and_says_so(name: str) -> None:
    body, reason = LEFT[name]
    gm, result = _lower(_Model(body))
    assert not calls(gm, max_pool)
    (skip,) = result.skipped
    assert (skip.layer.startswith("max_pool2d"), skip.reason) == (True, f"max pool: {reason}")
    assert skip.values


def test_leaves_graphs_without_a_condensed_convolution() -> None:
    gm, result = _lower(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.MaxPool2d(2)))
    assert not calls(gm, max_pool)
    assert result == PassResult()


def test_takes_the_activation_behind_it_but_no_residual() -> None:
    x = randn(2, 4, 8, 8)
    gm = graph_of(_Model(lambda m, x: m.masked(F.silu(F.max_pool2d(m.stem(x), 2)))), x)
    result = run(gm, condense_conv, lower_max_pool, fuse_epilogue, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("max_pool_default", "+ silu")]
    gm = graph_of(_Model(lambda m, x: m.masked(F.max_pool2d(m.stem(x), 2) + x[..., :4, :4])), x)
    result = run(gm, condense_conv, lower_max_pool, fuse_epilogue, inputs=(x,))
    assert not result.rewritten


def test_stretches_of_a_large_batch_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(split_batch.__globals__, "MOST_BYTES", 4 * 4 * 8 * 8)  # one image
    x = randn(3, 4, 8, 8)
    model = _Model(lambda m, x: m.masked(F.max_pool2d(F.relu(m.stem(x)), 3, 1, 1)))
    gm = graph_of(model, x)
    (done,) = run(gm, condense_conv, lower_max_pool, split_batch, inputs=(x,)).rewritten
    assert done.detail == "3 operators in 3 parts of 3 images"
    assert len(calls(gm, max_pool)) == 3


def test_its_output_may_be_written_over() -> None:
    x = randn(2, 4, 8, 8)
    model = _Model(
        lambda m, x: (h := F.max_pool2d(F.relu(m.stem(x)), 2), F.relu(m.masked(m.masked(h)) + h))[1]
    )
    gm = graph_of(model, x)
    passes = (condense_conv, lower_max_pool, fuse_epilogue, reuse_residuals)
    run(gm, *passes, ctx=context(gm, in_place=True), inputs=(x,))
    assert len(calls(gm, torch.ops.fanin.gather_conv_.default)) == 1


def test_stands_where_layers_are_known_and_epilogues_are_not_yet_fused() -> None:
    assert position(condense_conv) < position(lower_max_pool) < position(fuse_epilogue)
    assert position(lower_max_pool) < position(split_batch)


class _ResNet(nn.Module):
    """A stem and two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.a, self.b = _pointwise(2, 16, 32), _pointwise(2, 32, 16)
        self.c, self.d = _pointwise(2, 16, 32), _pointwise(2, 32, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = F.relu(h + self.b(F.relu(self.a(h))))
        return F.relu(h + self.d(F.relu(self.c(h))))


def test_a_residual_network_pools_by_it_in_both_doors(dynamo: None) -> None:
    model, x = _ResNet().eval(), randn(2, 3, 37, 41)
    with recorded() as compilations, no_warning_of_ours():
        y = compiled(model, options={"cost_gate": False})(x)
    assert_equals_model(y, model, x)
    (compilation,) = compilations
    assert compilation.result is not None
    done = [r for r in compilation.result.rewritten if r.became == "max-pool"]
    assert [r.detail for r in done] == ["planar kernel, relu folded"]
    with torch.no_grad():
        small = any_type(fanin_compile.condense(model, example_inputs=(x,)))
        assert len(calls(small, max_pool)) == 1
        assert_equals_model(small(x), model, x)
