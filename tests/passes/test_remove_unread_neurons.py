from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fanin_compile.condense import condense
from fanin_compile.export import _drop_asserts
from fanin_compile.graph import CONDENSED
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.pipeline import PassResult, run_pipeline
from tests.compile_support import (
    any_type,
    assert_equals_dense,
    assert_equals_model,
    compiled,
    fan_in_mask,
    randn,
    recorded,
    sparse_linear,
)
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten


class _Residual(nn.Module):
    """Two layers whose outputs are added: both must be free of a neuron before it can go."""

    def __init__(self, *, ablated: tuple[int, int], tail: nn.Module) -> None:
        super().__init__()
        self.a, self.b = (sparse_linear(64, 32, 6, ablated=n, seed=n) for n in ablated)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x)) + self.b(x)
        y: Tensor = self.tail(h)
        return y


def _shapes(gm: torch.fx.GraphModule) -> list[tuple[int, ...]]:
    return [node.meta[CONDENSED].shape for node in calls(gm, aten.linear.default)]


def test_drops_ablated_neurons_from_both_layers() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.SiLU(), sparse_linear(32, 16, 20))
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("0", "32 -> 28 neurons")]
    assert _shapes(gm) == [(28, 64), (16, 28)]
    (silu,) = calls(gm, aten.silu.default)
    assert tuple(silu.meta["val"].shape) == (5, 28)


def test_a_residual_add_binds_its_neurons() -> None:
    x = randn(5, 64)
    gm = graph_of(_Residual(ablated=(6, 3), tail=sparse_linear(32, 16, 20)), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(29, 64), (29, 64), (16, 29)]  # ablated in both: the last 3


def test_what_is_seen_whole_stays_and_says_so() -> None:
    x = randn(5, 64)
    for tail in (nn.Identity(), nn.Sequential(nn.LayerNorm(32), sparse_linear(32, 16, 20)), nn.Softmax(-1)):
        gm = graph_of(_Residual(ablated=(4, 4), tail=tail), x)
        result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
        assert result.rewritten == ()
        assert {(s.layer, s.values["ablated"]) for s in result.skipped} == {("a", 4), ("b", 4)}
        assert all(s.reason.startswith("ablated neurons stay: ") for s in result.skipped)


def _ablated_conv(channels: int, *, ablated: int) -> nn.Conv2d:
    conv = nn.Conv2d(8, channels, 3)
    with torch.no_grad():
        conv.weight.flatten(1).mul_(fan_in_mask(channels, 72, 9, ablated=ablated))
    return conv


class _Classifier(nn.Module):
    """A convolution, 4 of its 32 neurons ablated, pooled to size x size, flattened as asked, for a linear layer."""

    def __init__(
        self, size: int, flatten: Callable[[Tensor], Tensor], between: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.conv, self.pool = _ablated_conv(32, ablated=4), nn.AdaptiveAvgPool2d(size)
        self.flatten, self.between = flatten, between or nn.Identity()
        self.head = sparse_linear(32 * size**2, 16, 20 * size**2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.between(self.flatten(self.pool(torch.relu(self.conv(x))))))
        return y


def _shape_of(node: torch.fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


FLATTENS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": lambda h: h.flatten(1),
    "flatten in two steps": lambda h: h.flatten(2).flatten(1),
    "view, sizes written out": lambda h: h.view(2, 32 * h.shape[2] * h.shape[3]),
    "view, batch inferred": lambda h: h.view(-1, 32 * h.shape[2] * h.shape[3]),
    "view, features inferred": lambda h: h.view(h.shape[0], -1),
    "reshape": lambda h: h.reshape(h.shape[0], -1),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS)
def test_neurons_go_through_pooling_and_flatten(flatten: Callable[[Tensor], Tensor], size: int) -> None:
    x = randn(2, 8, 9, 9)
    gm = graph_of(_Classifier(size, flatten), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("conv", "32 -> 28 neurons")]
    assert _shapes(gm) == [(16, 28 * size**2)]
    (head,) = calls(gm, aten.linear.default)
    assert _shape_of(head.args[0]) == (2, 28 * size**2)  # type: ignore[arg-type]
    (conv,) = calls(gm, aten.conv2d.default)
    assert conv.meta[CONDENSED].shape == (28, 8, 3, 3)


def test_a_channel_is_read_if_any_of_its_positions_is() -> None:
    x = randn(2, 8, 9, 9)
    model = _Classifier(2, FLATTENS["flatten"])
    with torch.no_grad():
        model.head.weight[:, :20] = 0  # the first 5 channels
        model.head.weight[3, 6] = 1.0  # but for one position of the second
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(16, (32 - 4 - 4) * 4)]


@pytest.mark.parametrize("name", ["flatten", "view, batch inferred", "view, features inferred"])
def test_one_neuron_stays_if_none_is_read(name: str) -> None:
    x = randn(2, 8, 9, 9)
    model = _Classifier(2, FLATTENS[name])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, 31 * 4 :] = 1.0  # an ablated channel alone
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(16, 4)]


@pytest.mark.parametrize(
    "between",
    [nn.Tanh(), nn.Dropout(), nn.BatchNorm1d(128), nn.Sequential(nn.Hardswish(), nn.Dropout(0.2))],
    ids=["tanh", "dropout", "batch norm", "two"],
)
def test_what_follows_the_flatten_is_narrowed_as_well(between: nn.Module) -> None:
    x = randn(2, 8, 9, 9)
    if isinstance(between, nn.BatchNorm1d):
        between.running_mean, between.running_var = randn(128, seed=1), randn(128, seed=2).abs() + 0.5
    gm = graph_of(_Classifier(2, FLATTENS["flatten"], between), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(16, 112)]
    (head,) = calls(gm, aten.linear.default)
    assert _shape_of(head.args[0]) == (2, 112)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3), nn.AvgPool2d(3)], ids=["max", "average"])
def test_pools_between_convolution_and_classifier(pool: nn.Module) -> None:
    x = randn(2, 8, 8, 8)
    model = _Classifier(2, FLATTENS["flatten"])
    model.pool = pool  # type: ignore[assignment]
    gm = graph_of(model, x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(16, 112)]


AFFINE = randn(32), randn(32, seed=1)
FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "selu": F.selu,
    "celu": F.celu,
    "celu in place": lambda h: F.celu(h, inplace=True),
    "threshold": lambda h: F.threshold(h, 0.1, 0.2),
    "clamp_min": lambda h: h.clamp_min(0.0),
    "clamp_max in place": lambda h: h.clamp_max_(0.5),
    "square": torch.square,
    "sqrt": lambda h: h.abs().sqrt(),
    "log sigmoid": F.logsigmoid,
    "soft shrink": F.softshrink,
    "hard shrink": F.hardshrink,
    "reciprocal": lambda h: (h.square() + 1).reciprocal(),
    "prelu": lambda h: F.prelu(h, AFFINE[0].to(h)),
    "prelu of one": lambda h: F.prelu(h, AFFINE[0][:1].to(h)),
    "roll": lambda h: h.roll(2, -1),
    "mT": lambda h: h.mT.exp().mT,
    "rsub": lambda h: 1.5 - h,
    "rsub with alpha": lambda h: torch.rsub(h, 2.0, alpha=3),
    "sub_": lambda h: h.sub_(0.3, alpha=2),
    "div_": lambda h: h.div_(0.7),
    "maximum": lambda h: torch.maximum(h, h.neg()),
    "minimum": lambda h: torch.minimum(h, h.square()),
    "flip": lambda h: h.flip(-1, 1).flip(1),
    "flip of channels": lambda h: h.flip(1),
    "stack": lambda h: torch.stack([h, h.clone()], 2).amax(2),
    "nearest upsampling": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear upsampling": lambda h: F.interpolate(h, size=(13, 15), mode="bilinear"),
    "instance norm": F.instance_norm,
    "instance norm with weights": lambda h: F.instance_norm(h, weight=AFFINE[0].to(h), bias=AFFINE[1].to(h)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_neurons_are_followed_through(name: str) -> None:
    x = randn(2, 8, 9, 9)
    model = _Classifier(2, FLATTENS["flatten"])
    model.pool = any_type(_Then(FOLLOWED[name]))
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("conv", "32 -> 28 neurons")]
    assert_equals_model(gm(x), model, x)


class _Then(nn.Module):
    """The function, then a pool; before them neurons get values other than 0."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.pool = function, nn.AdaptiveAvgPool2d(2)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.pool(self.function(h - 0.25))
        return y


def test_an_instance_norm_with_statistics_is_left() -> None:
    x = randn(2, 8, 9, 9)
    model = _Classifier(2, FLATTENS["flatten"])
    norm = nn.InstanceNorm2d(32, track_running_stats=True)
    model.pool = any_type(nn.Sequential(norm, nn.AdaptiveAvgPool2d(2)))
    gm = graph_of(model, x)
    assert not run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,)).rewritten


class _Reshaped(nn.Module):
    """_Classifier's convolution and pool with a head of `features` inputs behind any reshape."""

    def __init__(self, reshape: Callable[[Tensor], Tensor], features: int) -> None:
        super().__init__()
        self.conv, self.reshape = _ablated_conv(32, ablated=4), reshape
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), sparse_linear(features, 16, features // 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.reshape(self.pool(torch.relu(self.conv(x)))))
        return y


@pytest.mark.parametrize(
    ("reshape", "features"),
    [
        (lambda h: h.reshape(1, -1), 256),  # channels with the batch
        (lambda h: h.transpose(1, 2).flatten(1), 128),  # channels inside the rows
        (lambda h: h.view(1, -1, 4).flatten(1), 256),
    ],
    ids=["batch", "permuted", "two steps"],
)
def test_a_reshape_may_mix_channels_with_others(reshape: Callable[[Tensor], Tensor], features: int) -> None:
    x = randn(2, 8, 9, 9)
    gm = graph_of(_Reshaped(reshape, features), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(16, features * 28 // 32)]


@pytest.mark.parametrize(
    ("reshape", "features"),
    [
        (lambda h: h.view(4, 64), 64),  # half of the channels each
        (lambda h: h.flatten(0, 1), 2),  # positions are the features
        (lambda h: h.view(2, 16, 8), 8),  # split
    ],
    ids=["halves", "positions", "split"],
)
def test_a_reshape_that_gives_rows_other_channels_pins_them(
    reshape: Callable[[Tensor], Tensor], features: int
) -> None:
    x = randn(2, 8, 9, 9)
    gm = graph_of(_Reshaped(reshape, features), x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert result.rewritten == ()
    assert ["is read whole by" in s.reason for s in result.skipped] == [True]
    (conv,) = calls(gm, aten.conv2d.default)
    assert conv.meta[CONDENSED].shape[0] == 32


def _run_dynamic(model: nn.Module, x: Tensor, dims: dict[int, Any]) -> tuple[fx.GraphModule, PassResult]:
    """The graph of `model` with symbolic `dims` of x after the passes, and the result of the last."""
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (x,), dynamic_shapes=(dims,), strict=False)
        gm = exported.module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    _drop_asserts(gm)
    passes = (find_masked_layers, fold_constant_channels, remove_unread_neurons)
    done = run_pipeline(gm, passes, context(gm))
    return done.graph_module, dict(done.results)["remove_unread_neurons"]


@pytest.mark.parametrize("name", [n for n in FLATTENS if n != "view, sizes written out"])
def test_the_batch_of_a_flatten_may_be_dynamic(name: str) -> None:
    x = randn(3, 8, 9, 9)
    model = _Classifier(2, FLATTENS[name])
    gm, _ = _run_dynamic(model, x, {0: torch.export.Dim("batch")})
    assert _shapes(gm) == [(16, 112)]
    (head,) = calls(gm, aten.linear.default)
    batch, features = head.args[0].meta["val"].shape  # type: ignore[union-attr]
    assert (isinstance(batch, torch.SymInt), features) == (True, 112)
    other = randn(7, 8, 9, 9, seed=3)
    with torch.no_grad():
        assert_equals_dense(gm(other), model, other, k=72 + 128)


def test_a_flatten_of_dynamic_positions_pins_the_channels() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = _ablated_conv(32, ablated=4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x)).flatten(1)

    x = randn(2, 8, 9, 9)
    _, result = _run_dynamic(Model(), x, {2: torch.export.Dim("height", min=4)})
    assert result.rewritten == ()
    assert ["flatten" in s.reason for s in result.skipped] == [True]


def test_a_pool_over_the_features_of_a_linear_pins_them() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=4), nn.MaxPool1d(2), sparse_linear(16, 8, 10))
    x = randn(3, 5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert ["is read whole by max_pool1d" in s.reason for s in result.skipped] == [True]
    assert _shapes(gm) == [(32, 64), (8, 16)]


def test_alpha_of_an_addition_neither_hides_constants_nor_pins() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (sparse_linear(64, 32, 6, ablated=4, seed=n) for n in range(2))
            self.c = sparse_linear(32, 16, 20)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.add(self.a(x), self.b(x), alpha=-3)
            y: Tensor = self.c(torch.sub(h, 1.5, alpha=2).relu())
            return y

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(28, 64), (28, 64), (16, 28)]


@pytest.mark.parametrize("shape", [(1, 7, 32), (7, 32), (7, 1), (3, 7, 1), (32,)])
def test_a_constant_that_varies_over_positions_is_narrowed_along_the_channels(shape: tuple[int, ...]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 32, 6, ablated=4), sparse_linear(32, 16, 20)
            self.positions = nn.Parameter(randn(*shape, seed=1))
            with torch.no_grad():
                self.b.weight[:, 28:] = 0  # unread: what they hold is not constant over positions

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.relu(self.a(x) + self.positions))
            return y

    x = randn(3, 7, 64)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shapes(gm) == [(28, 64), (16, 28)]
    (add,) = calls(gm, aten.add.Tensor)
    assert _shape_of(add) == (3, 7, 28)
    assert _shape_of(add.args[1]) == tuple(28 if size == 32 else size for size in shape)  # type: ignore[arg-type]


def test_nothing_ablated_nothing_removed() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6), nn.ReLU(), sparse_linear(32, 16, 30))
    x = randn(5, 64)
    gm = graph_of(model, x)
    assert run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,)).rewritten == ()
    assert _shapes(gm) == [(32, 64), (16, 32)]


def test_layers_called_twice_are_narrowed_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 32, 6, ablated=4), sparse_linear(32, 24, 20, ablated=2)
            self.c = sparse_linear(24, 8, 15)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            once, again = self.a(x), self.a(-x)
            return self.c(self.b(again.relu()).relu()), self.c(self.b(once.relu()).relu())

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, condense_linear, inputs=(x,))
    packed = calls(gm, torch.ops.fanin.gather_matmul.default)
    assert [node.args[4] for node in packed] == [28, 28, 22, 8, 22, 8]
    for part in (1, 2, 3):  # values, structure, bias
        assert len({str(node.args[part]) for node in packed}) == 3


@pytest.mark.parametrize(("of", "kept"), [("a", [48, 32]), ("b", [45, 32])])
def test_a_bias_that_is_computed_stays_and_pins(of: str, kept: list[int]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 48, 6, ablated=10), sparse_linear(48, 32, 5, seed=1)
            with torch.no_grad():
                self.b.weight[:, 45:] = 0  # what nobody reads goes
                self.b.weight[0, :45] = 1.0

        def forward(self, x: Tensor) -> Tensor:
            scale = {of: x.mean()}
            h = F.linear(x, self.a.weight, self.a.bias * scale.get("a", 1)).relu()
            return F.linear(h, self.b.weight, self.b.bias * scale.get("b", 1))

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, condense_linear, inputs=(x,))
    assert [node.args[4] for node in calls(gm, torch.ops.fanin.gather_matmul.default)] == kept


def test_both_doors_narrow_through_a_flatten() -> None:
    x = randn(3, 8, 9, 9)
    model = _Classifier(2, FLATTENS["view, batch inferred"]).eval()
    with recorded() as compilations:
        actual = compiled(model, dynamic=True)(x)
    assert_equals_dense(actual, model, x, k=72 + 128)
    (compilation,) = compilations
    assert compilation.result is not None
    assert [r.layer for r in compilation.result.rewritten if r.became == "narrowed"] == ["conv"]
    condensed = condense(model, example_inputs=(x,))
    with torch.no_grad():
        assert_equals_dense(condensed(x), model, x, k=72 + 128)
    assert condensed.conv2d_bias.shape == (28,)
