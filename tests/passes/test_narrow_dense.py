"""Dense layers among masked ones: their neurons and inputs go if that saves an eighth of their arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from fanin_compile.graph import CONDENSED
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from tests.compile_support import assert_equals_model, compiled, fan_in_mask, randn, recorded, sparse_linear
from tests.passes.support import calls, graph_of, narrowed, run

aten = torch.ops.aten


def _shape_of(node: object) -> tuple[int, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ablated", "left"), [(3, 32), (4, 28)])
def test_a_dense_reader_is_narrowed_if_that_saves_an_eighth(ablated: int, left: int, bias: bool) -> None:
    first = sparse_linear(64, 32, 6, ablated=ablated)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(32, 16, bias=bias))
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    (dense,) = (n for n in calls(gm, aten.linear.default) if CONDENSED not in n.meta)
    assert _shape_of(dense.args[1]) == (16, left)
    assert _shape_of(dense) == (5, 16)
    assert ["is dense and would save 9%" in s.reason for s in result.skipped] == (
        [True] if left == 32 else []
    )


def test_a_dense_producer_loses_what_nobody_reads() -> None:
    reader = sparse_linear(32, 16, 20)
    with torch.no_grad():
        reader.weight[:, ::2] = 0
    x = randn(5, 64)
    gm = graph_of(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), reader), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert [_shape_of(n) for n in calls(gm, aten.linear.default)] == [(5, 16), (5, 16)]


def test_a_dense_layer_called_twice_folds_the_constants_of_each_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.dense = sparse_linear(64, 32, 6, ablated=8), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.a(x)
            return self.dense(h.relu()), self.dense(h.tanh()), self.dense(torch.relu(h))

    x = randn(5, 64)
    gm = graph_of(Model(), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    first, second, third = (n.args[1:3] for n in calls(gm, aten.linear.default)[1:])
    assert first == third
    assert first[1] is not second[1]
    assert _shape_of(first[0]) == (16, 24)


@pytest.mark.parametrize(("padding", "zero", "left"), [(0, False, 28), (1, False, 32), (1, True, 28)])
def test_a_dense_convolution_that_pads_loses_inputs_of_zero_alone(
    padding: int, zero: bool, left: int
) -> None:
    first = nn.Conv2d(8, 32, 3)
    assert first.bias is not None
    with torch.no_grad():
        first.weight.flatten(1).mul_(fan_in_mask(32, 72, 9, ablated=4))
        first.bias.copy_(torch.full((32,), -1.0 if zero else 1.0))
    x = randn(2, 8, 9, 9)
    gm = graph_of(nn.Sequential(first, nn.ReLU(), nn.Conv2d(32, 4, 3, padding=padding)), x)
    run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))
    assert _shape_of(calls(gm, aten.conv2d.default)[1].args[1]) == (4, left, 3, 3)


@pytest.mark.usefixtures("dynamo")
def test_a_dense_head_follows_its_weights() -> None:
    model = nn.Sequential(sparse_linear(64, 32, 6, ablated=8), nn.Tanh(), nn.Linear(32, 16)).eval()
    x = randn(5, 64)
    run_compiled = compiled(model)
    with recorded() as compilations:
        assert_equals_model(run_compiled(x), model, x)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert_equals_model(run_compiled(x), model, x)
    (compilation,) = compilations  # packed anew, not compiled
    assert narrowed(compilation.result) == {"0": "32 -> 24 neurons"}
