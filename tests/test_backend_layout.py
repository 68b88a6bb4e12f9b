"""Which memory format inductor is told to give the dense convolutions left beside condensed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from fanin_compile.options import Options
from tests.compile_support import assert_equals_model, compiled, randn


def _pointwise(fan_in: int, out: int) -> Any:
    conv = nn.Conv2d(fan_in, out, 1)
    prune.random_unstructured(conv, "weight", 0.8)
    prune.remove(conv, "weight")
    return conv


def _patches(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What inductor is given; runs the graph as it is."""
    given: list[dict[str, object]] = []

    def finish(
        self: Options, gm: fx.GraphModule, example_inputs: object, **patches: object
    ) -> Callable[..., Any]:
        given.append(patches)
        return gm.forward

    monkeypatch.setattr(Options, "finish", finish)
    torch._dynamo.reset()
    with torch.no_grad():
        assert_equals_model(compiled(model.eval())(x), model, x)
    (patches,) = given
    return patches


def test_a_stem_stays_planar(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), _pointwise(8, 16))
    assert _patches(model, randn(2, 3, 9, 9), monkeypatch)["layout_optimization"] is False


def test_with_depthwise_layers_lowered_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(_pointwise(8, 16), nn.Conv2d(16, 16, 3, groups=16), _pointwise(16, 8))
    assert _patches(model, randn(2, 8, 9, 9), monkeypatch)["layout_optimization"] is False


def test_wide_dense_ones_may_have_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), _pointwise(8, 16), nn.Conv2d(16, 8, 3))
    assert "layout_optimization" not in _patches(model, randn(2, 3, 9, 9), monkeypatch)
