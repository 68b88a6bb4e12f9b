"""Removing channels through depthwise and grouped convolutions, dense ones among them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.bench.masking import mask_constant_fan_in
from fanin_compile.bench.models import OneInput, make_model
from fanin_compile.condense import condense
from fanin_compile.graph import CONDENSED, bind_arguments
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from tests.compile_support import any_type, assert_equals_model, compiled, fan_in_mask, randn, recorded
from tests.passes.support import calls, graph_of, narrowed, run

aten = torch.ops.aten
WIDTH = 16


def sparse_conv(
    inputs: int, channels: int, *, k: int, kernel: int = 1, seed: int = 0, groups: int = 1, padding: int = 0
) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, channels, kernel, groups=groups, padding=padding)
    with torch.no_grad():
        weight = randn(*conv.weight.shape, seed=seed)
        conv.weight.copy_(weight)
        conv.weight.flatten(1).mul_(fan_in_mask(channels, weight[0].numel(), k, seed=seed))
        assert conv.bias is not None
        conv.bias.copy_(randn(channels, seed=seed + 1))
    return conv


class Inverted(nn.Module):
    """MobileNetV2's block: expand, a depthwise convolution, reduce."""

    def __init__(
        self, dead: list[int], *, padding: int = 0, zero: bool = False, masked: bool = False
    ) -> None:
        super().__init__()
        self.expand = sparse_conv(6, WIDTH, k=3)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding=padding)
        self.reduce = sparse_conv(WIDTH, 5, k=WIDTH - 2, seed=2)
        with torch.no_grad():
            self.depthwise.weight.copy_(randn(WIDTH, 1, 3, 3, seed=5))
            if masked:
                self.depthwise.weight.flatten(1).mul_(fan_in_mask(WIDTH, 9, 4))
            self.expand.weight[dead] = 0
            if zero:
                self.expand.bias[dead] = -1.0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        y: Tensor = self.reduce(h)
        return y


def _channels(gm: torch.fx.GraphModule) -> list[tuple[int, int]]:
    """(channels, groups) of each convolution."""
    nodes = calls(gm, aten.conv2d.default)
    return [(int(node.meta["val"].shape[1]), bind_arguments(node)["groups"]) for node in nodes]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("padding", "zero", "left"),
    [
        (0, False, 12),
        (0, True, 12),
        (1, True, 12),
        (1, False, 16),
    ],  # at a border less of a constant is summed
)
def test_expansion_channels_leave_the_depthwise_layer(
    padding: int, zero: bool, left: int, masked: bool
) -> None:
    x = randn(2, 6, 7, 7)
    model = Inverted([0, 5, 6, 15], padding=padding, zero=zero, masked=masked)
    if not zero:
        with torch.no_grad():
            assert model.expand.bias is not None
            model.expand.bias.abs_().add_(0.1)
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _channels(gm) == [(left, 1), (left, left), (5, 1)]
    layers = [node.meta[CONDENSED] for node in calls(gm, aten.conv2d.default) if CONDENSED in node.meta]
    assert layers[0].shape[0] == layers[-1].shape[1] == left


def test_a_dense_layer_is_copied_only_if_that_saves_an_eighth() -> None:
    x = randn(2, 6, 7, 7)
    gm = graph_of(Inverted([3]), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _channels(gm) == [(16, 1), (16, 16), (5, 1)]
    reason = "ablated neurons stay: conv2d_1 is dense and would save 6% of its multiply-adds"
    assert [(s.layer, s.reason) for s in result.skipped] == [("expand", reason)]


class Grouped(nn.Module):
    """Masked layers around a grouped one of `groups` groups."""

    def __init__(self, dead: tuple[list[int], list[int]], *, groups: int = 4, padding: int = 0) -> None:
        super().__init__()
        self.a = sparse_conv(6, WIDTH, k=3)
        self.b = sparse_conv(WIDTH, WIDTH, k=8, kernel=3, groups=groups, padding=padding, seed=2)
        self.c = sparse_conv(WIDTH, 5, k=WIDTH - 1, seed=4)
        with torch.no_grad():
            for layer, rows in zip((self.a, self.b), dead, strict=True):
                layer.weight[rows] = 0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.b(self.a(x).relu()).relu())
        return y


def test_groups_keep_equally_many_inputs_and_outputs() -> None:
    x = randn(2, 6, 7, 7)
    gm = graph_of(Grouped(([0, 1, 5, 8, 9, 10, 15], [3, 6, 9, 12, 13])), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    shapes = [node.meta[CONDENSED].shape for node in calls(gm, aten.conv2d.default)]
    assert shapes == [(12, 6, 1, 1), (12, 3, 3, 3), (5, 12, 1, 1)]


@settings(deadline=None, max_examples=25)
@given(
    st.sets(st.integers(0, WIDTH - 1)),
    st.sets(st.integers(0, WIDTH - 1)),
    st.sampled_from((1, 2, 4, 16)),
    st.sampled_from((0, 1)),
)
def test_any_channels_may_be_ablated(first: set[int], second: set[int], groups: int, padding: int) -> None:
    x = randn(2, 6, 7, 7)
    model = Grouped((sorted(first), sorted(second)), groups=groups, padding=padding)
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    with torch.no_grad():
        assert_equals_model(gm(x), model, x)


def _mobilenet() -> tuple[OneInput, Tensor]:
    """Half of the expansion channels of every second block ablated."""
    pytest.importorskip("transformers")
    case = make_model("mobilenet_v2", small=True, batch=2)
    mask_constant_fan_in(case.model, 0.8)
    for i, (name, module) in enumerate(case.model.named_modules()):
        if name.endswith("expand_1x1.convolution") and i % 2:
            with torch.no_grad():
                any_type(module).weight[::2] = 0
    return OneInput(case).eval(), next(iter(case.inputs.values()))


def test_mobilenet_loses_expansion_channels() -> None:
    model, x = _mobilenet()
    condensed = condense(model, example_inputs=(x,))
    done = [detail.split() for layer, detail in narrowed(condensed).items() if "expand" in layer]
    assert len(done) > 3
    assert sum(int(d[2]) for d in done) < 0.8 * sum(int(d[0]) for d in done)
    with torch.no_grad():
        assert_equals_model(condensed(x), model, x)
        other = torch.cat([x, -x, x])
        assert_equals_model(condensed(other), model, other)


@pytest.mark.usefixtures("dynamo")
def test_a_block_compiles_with_fewer_channels() -> None:
    model, x = Inverted([0, 5, 6, 15], padding=1, zero=True).eval(), randn(2, 6, 7, 7)
    with recorded() as compilations:
        assert_equals_model(compiled(model, dynamic=True)(x), model, x)
    (compilation,) = compilations
    assert narrowed(compilation.result)["expand"] == "16 -> 12 neurons"
