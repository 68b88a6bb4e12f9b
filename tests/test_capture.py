"""From Dynamo's graph to the passes' dialect and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fanin_compile.capture import Captured, capture, layer_name, static_position, static_target, unlift
from tests.compile_support import MLP, randn
from tests.helpers import assert_close_at_scale

pytestmark = pytest.mark.usefixtures("dynamo")
aten = torch.ops.aten


def _captured(
    model: Callable[..., Any], *inputs: Tensor, dynamic: bool = False
) -> tuple[Captured, fx.GraphModule]:
    """The capture, and the graph handed back to inductor, run in the place of the original."""
    seen: list[tuple[Captured, fx.GraphModule]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        back = unlift(fx.GraphModule(captured.graph_module, captured.graph_module.graph))
        seen.append((captured, back))
        return back.forward

    with torch.no_grad():
        torch._dynamo.reset()
        actual = torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
        assert_close_at_scale(actual, model(*inputs))
    (result,) = seen
    return result


def test_parameters_stand_as_constants_and_return_to_placeholders() -> None:
    model = MLP()
    captured, back = _captured(model, randn(5, 64))
    sources = {layer_name(source) for source in captured.statics.values()}
    assert sources == {"a", "b", "a.bias", "b.bias"}
    owners = {(owner.module(), owner.name) for owner in captured.owners.values()}
    assert owners == {(layer, name) for layer in (model.a, model.b) for name in ("weight", "bias")}
    assert all(owner.root is not None for owner in captured.owners.values())
    assert not list(back.graph.find_nodes(op="get_attr"))
    assert len(list(back.graph.find_nodes(op="placeholder"))) == 5
    assert not list(back.buffers())


def test_sizes_stay_symbolic() -> None:
    captured, _ = _captured(MLP(), randn(5, 64), dynamic=True)
    (first, *_) = captured.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    batch, out = first.meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert out == 48


def test_attention_is_opened() -> None:
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    captured, _ = _captured(model, randn(2, 5, 32))
    linears = list(captured.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default))
    assert len(linears) == 4


def test_inputs_that_are_no_parameters_are_no_constants() -> None:
    weight = randn(3, 64)
    captured, _ = _captured(lambda x, w: torch.nn.functional.linear(x, w), randn(5, 64), weight)
    assert captured.statics == {}


def test_tensors_of_the_graph_itself_are_constants_past_its_arguments() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = randn(3, 64), randn(3, seed=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.weight) + self.shift * y

    model = Plain()
    for tensor in (model.weight, model.shift):
        torch._dynamo.mark_static_address(tensor, guard=True)
    captured, back = _captured(model, randn(5, 64), randn(3))
    assert captured.statics == {2: "L['self'].weight", 3: "L['self'].shift"}
    assert [
        tensor is held for tensor, held in zip((model.weight, model.shift), captured.held, strict=True)
    ] == [
        True,
        True,
    ]
    assert [(owner.module(), owner.name) for owner in captured.owners.values()] == [
        (model, "weight"),
        (model, "shift"),
    ]
    for graph in (captured.graph_module.graph, back.graph):
        assert len(list(graph.find_nodes(op="placeholder"))) == 2
        assert len(list(graph.find_nodes(op="get_attr"))) == 2
    assert {id(tensor) for tensor in back.buffers()} == {id(model.weight), id(model.shift)}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['fc']._parameters['weight']", "fc"),
        ("L['self']._modules['fc']._parameters['weight_orig']", "fc"),
        ("L['self']._modules['fc']._buffers['weight_mask']", "fc"),
        ("L['self']._modules['layers']._modules['0']._parameters['bias']", "layers.0.bias"),
        ("L['self']._modules['at']._parameters['in_proj_weight']", "at.in_proj_weight"),
        ("L['self']._parameters['w1']", "w1"),
        ("L['self']._parameters['weight']", ""),
        ("L['self'].table", "table"),
        (
            "L['self']._modules['fc']._modules['parametrizations']._modules['weight']._parameters['original']",
            "fc",
        ),
    ],
)
def test_layers_are_named_as_people_name_them(source: str, name: str) -> None:
    assert layer_name(source) == name


def test_positions_round_trip() -> None:
    assert static_position(static_target(12)) == 12
    assert static_position(f"{static_target(12)}_values") is None
    assert static_position("fc.weight") is None
