"""A layer of attention over a cache, for the passes that lower it: masked projections around a body of each test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.compile_support import assert_equals_model, randn, sparse_linear

HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE
# (query, cached keys, new keys, cached values, new values) -> y [2, HEADS, queries, SIZE] and what else is returned
Body = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Any]


class Step(nn.Module):
    """A masked projection, split into heads, and a body between the heads and what reads them."""

    def __init__(self, body: Body, *, key_heads: int = HEADS) -> None:
        super().__init__()
        self.sizes = [WIDTH, key_heads * SIZE, key_heads * SIZE]
        self.qkv, self.out = sparse_linear(24, sum(self.sizes), 6), sparse_linear(WIDTH, 24, 8, seed=1)
        self.body = body

    def forward(self, x: Tensor, cached_keys: Tensor, cached_values: Tensor) -> Any:
        q, k, v = (
            part.view(*x.shape[:2], -1, SIZE).transpose(1, 2) for part in self.qkv(x).split(self.sizes, 2)
        )
        y, *kept = self.body(q, cached_keys, k, cached_values, v)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], WIDTH)), *kept


def step_inputs(*, length: int, queries: int = 1, key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """x, and keys and values of a cache of this length."""
    shape = (2, key_heads, length, SIZE)
    return randn(2, queries, 24), randn(*shape, seed=1), randn(*shape, seed=2)


def assert_writes_like(f: Callable[..., Any], model: nn.Module, *given: Tensor) -> None:
    """f(*given) is what the model computes in fp64, and leaves in the given tensors what the model would."""
    expected = [t.clone() for t in given]
    with torch.no_grad():
        y = f(*given)
        assert_equals_model(y, model, *(t.clone() for t in expected))
        model(*expected)
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
