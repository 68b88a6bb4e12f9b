"""Models to condense and compile, and what their outputs are judged by."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fanin_compile.backend import Compilation, record
from tests.helpers import assert_close_at_scale, assert_close_fp64

# No fallback may hide a failure, and every masked layer is rewritten however small.
STRICT: dict[str, Any] = {"strict": True, "cost_gate": False}


def compiled(model: nn.Module, *, options: dict[str, Any] | None = None, **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="fanin", options=STRICT | (options or {}), **kwargs)


def fan_in_mask(out: int, fan_in: int, k: int, *, ablated: int = 0, seed: int = 0) -> Tensor:
    """bool [out, fan_in] with k inputs for each neuron, none for the last `ablated`."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.rand(out, fan_in, generator=generator).topk(k).indices
    mask = torch.zeros(out, fan_in, dtype=torch.bool).scatter_(1, columns, True)
    mask[out - ablated :] = False
    return mask


def sparse_linear(
    fan_in: int, out: int, k: int, *, bias: bool = True, ablated: int = 0, seed: int = 0
) -> nn.Linear:
    """A Linear whose mask is the zeros of its weight."""
    layer = nn.Linear(fan_in, out, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(sparse_weight(out, fan_in, k, ablated=ablated, seed=seed))
        if bias:
            layer.bias.copy_(torch.randn(out, generator=torch.Generator().manual_seed(seed)))
    return layer


def sparse_weight(out: int, fan_in: int, k: int, *, ablated: int = 0, seed: int = 0) -> Tensor:
    weight = torch.randn(out, fan_in, generator=torch.Generator().manual_seed(seed))
    return weight * fan_in_mask(out, fan_in, k, ablated=ablated, seed=seed)


class MLP(nn.Module):
    """64 -> 48 -> 10 with fan-in 6 and 5, two of the hidden neurons ablated."""

    def __init__(self, *, k: int = 6, seed: int = 0) -> None:
        super().__init__()
        self.a = sparse_linear(64, 48, k, ablated=2, seed=seed)
        self.b = sparse_linear(48, 10, 5, seed=seed + 1)

    def forward(self, x: Tensor) -> Any:  # subclasses return more
        return self.b(torch.relu(self.a(x)))


def any_type(value: object) -> Any:
    """For what pruning and nn.Sequential put behind attributes and items, which types do not know."""
    return value


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equals_dense(actual: Tensor, dense: nn.Module, x: Tensor, *, k: int = 64) -> None:
    """`actual` is what `dense` computes of x, within the rounding of sums of k terms (over all its layers) in fp32.

    `dense` holds linear and convolution layers and activations of slope at most 1 alone, so that running it on absolute
    values bounds every intermediate result.
    """
    exact = copy.deepcopy(dense).double()
    with torch.no_grad():
        expected = exact(x.double())
        for parameter in exact.parameters():
            parameter.abs_()
        magnitude = exact(x.double().abs())
    assert_close_fp64(actual, expected, magnitude, k=k)


def in_fp64(tree: Any) -> Any:
    """A copy of a tree with its floating tensors in fp64."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, tree)


def model_in_fp64(model: nn.Module) -> nn.Module:
    """A copy in fp64, with the products that pruning hooks left on its modules, which .double() does not know."""
    exact = copy.deepcopy(model).double()
    for module in exact.modules():
        vars(module).update(in_fp64({k: v for k, v in vars(module).items() if isinstance(v, Tensor)}))
    return exact


def assert_equals_model(actual: Any, model: nn.Module, *inputs: Any, share: float = 1e-5) -> None:
    """`actual`, a tensor or a tree, is what `model` computes of the inputs in fp64, by assert_close_at_scale."""
    with torch.no_grad():
        exact = model_in_fp64(model)(*in_fp64(inputs))
    assert_close_at_scale(actual, exact, share=share)


def rewritten(compilations: list[Compilation]) -> list[set[str]]:
    """The layers rewritten in each graph."""
    return [compilation.rewritten_layers for compilation in compilations]


@contextmanager
def recorded() -> Iterator[list[Compilation]]:
    """No grad, and what the backend compiles in this block."""
    with torch.no_grad(), record() as compilations:
        yield compilations


@contextmanager
def no_warning_of_ours() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fanin.*")
        yield
