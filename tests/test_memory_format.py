"""Outputs are channels_last where torch's are, by the input's format or the weight's: views of users rely on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

import fanin_compile
from fanin_compile import condense
from tests.compile_support import any_type, compiled, randn
from tests.helpers import assert_close_at_scale

LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _sparse(conv: nn.Module, amount: float = 0.8) -> Any:
    prune.random_unstructured(conv, "weight", amount)
    prune.remove(conv, "weight")
    return conv


class _Viewed(nn.Module):
    """The pixels of an image as rows, without a copy: its channels must be innermost."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y.movedim(-3, -1).view(-1)


def _by_swap(model: nn.Module, x: Tensor) -> Callable[..., Any]:
    return condense(model)


def _by_graph(model: nn.Module, x: Tensor) -> Callable[..., Any]:
    return condense(model, example_inputs=(x,))


def _by_backend(model: nn.Module, x: Tensor) -> Callable[..., Any]:
    torch._dynamo.reset()
    return compiled(model)


DOORS = [_by_swap, _by_graph, _by_backend]

# what stands before and behind, what the padding makes of it, what is folded into it
MODELS: dict[str, Callable[[], nn.Module]] = {
    "one": lambda: _sparse(nn.Conv2d(4, 16, 3, padding=1)),
    "pointwise": lambda: _sparse(nn.Conv2d(4, 16, 1)),
    "grouped": lambda: _sparse(nn.Conv2d(4, 16, 3, groups=2)),
    "dense": lambda: nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU()),
    "folded": lambda: nn.Sequential(_sparse(nn.Conv2d(4, 16, 3)), nn.BatchNorm2d(16), nn.ReLU()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), _sparse(nn.Conv2d(4, 16, 1))),
    "onto depthwise": lambda: nn.Sequential(
        _sparse(nn.Conv2d(4, 16, 1)), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)
    ),
    "pooled": lambda: nn.Sequential(_sparse(nn.Conv2d(4, 16, 3)), nn.ReLU(), nn.MaxPool2d(2)),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("error:condense swaps layers only")
def test_a_view_of_channels_last_by_the_weight_alone(door: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = _Viewed(MODELS[kind]()).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for x in (randn(2, 4, 9, 9), randn(2, 4, 9, 9).to(memory_format=torch.channels_last)):
        with torch.no_grad():
            got = door(model, x)(x)
            assert_close_at_scale(got, copy.deepcopy(model).double()(x.double()))


# Left out: export's fake convolutions of volumes are contiguous, whatever torch's are; a condensed layer by itself
# takes an input of one channel or pixel, which is both, for contiguous.
@pytest.mark.parametrize(
    ("door", "dims", "shape", "by"),
    [
        (door, dims, shape, by)
        for door in DOORS
        for dims in ((2,) if door is _by_graph else (2, 3))
        for shape in ("batched", "unbatched", "one channel", "one pixel")
        for by in ("weight", "input")
        if not (door is _by_swap and by == "input" and shape.startswith("one"))
    ],
)
def test_strides_are_those_of_torch(door: Any, dims: int, shape: str, by: str) -> None:
    torch.manual_seed(0)
    kinds: dict[int, type[Any]] = {2: nn.Conv2d, 3: nn.Conv3d}
    channels = 1 if shape == "one channel" else 4
    model = _sparse(kinds[dims](channels, 32, 3 if channels == 4 else 5, padding=3), 0.9).eval()
    sizes = [1] * dims if shape == "one pixel" else [7] * dims
    x = randn(*([] if shape == "unbatched" else [2]), channels, *sizes)
    if by == "weight":
        model = model.to(memory_format=LAST[dims])
    elif shape == "unbatched":
        x = x.movedim(0, -1).contiguous().movedim(-1, 0)
    else:
        x = x.to(memory_format=LAST[dims])
    with torch.no_grad():
        expected, got = model(x), door(model, x)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.stride() == expected.stride()


def test_a_condensed_layer_keeps_its_format() -> None:
    torch.manual_seed(0)
    model = any_type(_Viewed(_sparse(nn.Conv2d(4, 16, 3))).eval())
    model.to(memory_format=torch.channels_last)
    x = randn(2, 4, 9, 9)
    condensed = condense(model)
    for again in (copy.deepcopy(condensed), condense(condensed), fx.symbolic_trace(condensed)):
        with torch.no_grad():
            torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)


def test_half_an_image_is_named() -> None:
    torch.manual_seed(0)
    model = any_type(_sparse(nn.Conv2d(4, 32, 3), 0.9).eval()).to(memory_format=torch.channels_last)
    (row,) = fanin_compile.explain(condense(model, example_inputs=(randn(4, 7, 7),))).layers
    assert row.reason.startswith("channels_last by its weight, an image without batch")
