from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.passes.recognise_activations import recognise_activations
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten
C = math.sqrt(2 / math.pi)


class _After(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor], *, masked: bool = True) -> None:
        super().__init__()
        self.a, self.function = sparse_linear(64, 32, 6 if masked else 64), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.a(x))


def _recognised(function: Callable[[Tensor], Tensor], *, masked: bool = True) -> list[str]:
    x = randn(5, 64)
    gm = graph_of(_After(function, masked=masked), x)
    result = run(gm, recognise_activations, inputs=(x,))
    named = [n for t in (aten.gelu.default, aten.silu.default) for n in calls(gm, t)]
    assert len(named) == len(result.rewritten)
    return [r.detail.removeprefix("its activation recognised as ") for r in result.rewritten]


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "GPT-2's": (
        lambda z: 0.5 * z * (1.0 + torch.tanh(C * (z + 0.044715 * torch.pow(z, 3.0)))),
        "gelu_tanh",
    ),
    "fast": (
        lambda z: 0.5 * z * (1.0 + torch.tanh(z * 0.7978845608 * (1.0 + 0.044715 * z * z))),
        "gelu_tanh",
    ),
    "factored": (lambda z: (torch.tanh(C * z * (1 + 0.044715 * z**2)) + 1) * (z / 2), "gelu_tanh"),
    "BERT's": (lambda z: z * 0.5 * (1.0 + torch.erf(z / math.sqrt(2.0))), "gelu"),
    "silu": (lambda z: z * torch.sigmoid(z), "silu"),
    "silu by exp": (lambda z: z * torch.reciprocal(1 + torch.exp(-z)), "silu"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, activation = SPELLINGS[name]
    assert _recognised(function) == [activation]


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "another constant": lambda z: 0.5 * z * (1 + torch.tanh(C * (z + 0.0447 * z**3))),
    "another tensor": lambda z: z * torch.sigmoid(z.flip(0)),
    "cut off": lambda z: z * torch.sigmoid(z.clamp(-9, 9)),
    "linear": lambda z: z * 0.5 * 2.0,
    "another reader": lambda z: (z * (s := torch.sigmoid(z))) + s,
    "broadcast": lambda z: z * torch.sigmoid(z[:1]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay(name: str) -> None:
    assert _recognised(OTHERS[name]) == []


def test_only_what_follows_a_masked_layer() -> None:
    assert _recognised(SPELLINGS["silu"][0], masked=False) == []


def test_one_after_another() -> None:
    def twice(z: Tensor) -> Tensor:
        z = z * torch.sigmoid(z)
        return z * torch.sigmoid(z)

    assert _recognised(twice) == ["silu"]  # the second follows no layer


def test_a_variable_that_changes_on_the_way() -> None:
    def changes(z: Tensor) -> Tensor:
        s = torch.sigmoid(z)
        z.view(-1).add_(1.0)
        return z * s

    assert _recognised(changes) == []


def test_on_a_product_of_the_layers_output() -> None:
    """What is left of the expression's variable is no part of it."""
    x = randn(5, 64)
    gm = graph_of(nn.Sequential(sparse_linear(64, 32, 6), _Doubled()), x)
    assert run(gm, recognise_activations, inputs=(x,)).rewritten == ()


class _Doubled(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        z = 2.0 * z
        return z * torch.sigmoid(z)
