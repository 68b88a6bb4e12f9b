from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fanin_compile.graph import LAYER
from fanin_compile.passes.condense_conv import condense_conv
from tests.compile_support import randn
from tests.passes.support import calls, graph_of, run

gather_conv = torch.ops.fanin.gather_conv.default
KINDS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def _sparse(conv: nn.Module) -> nn.Module:
    prune.random_unstructured(conv, "weight", 0.9)
    prune.remove(conv, "weight")
    return conv


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"padding": 1, "stride": 2, "bias": False},
        {"padding": "same", "groups": 2},
        {"padding": "valid", "dilation": 2},
    ],
)
def test_swaps_a_sparse_convolution(dims: int, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = randn(2, 4, *[7] * dims)
    gm = graph_of(_sparse(KINDS[dims](4, 6, 3, **arguments)), x)
    result = run(gm, condense_conv, inputs=(x,))
    (node,) = calls(gm, gather_conv)
    assert node.meta[LAYER].op == f"conv{dims}d"
    assert [(r.layer, r.became) for r in result.rewritten] == [("", "gather-conv")]
    assert result.rewritten[0].bytes is not None


def test_leaves_dense_and_transposed_and_unevenly_padded_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3), _sparse(nn.ConvTranspose1d(6, 4, 3)), _sparse(nn.Conv1d(4, 6, 4, padding="same"))
    )
    x = randn(2, 4, 9)
    gm = graph_of(model, x)
    result = run(gm, condense_conv, inputs=(x,))
    assert not calls(gm, gather_conv)
    assert not result.rewritten
    (skip,) = result.skipped
    assert (skip.layer, skip.reason) == ("2", "'same' padding is uneven")
    assert skip.values == {"kernel": (4,), "dilation": [1]}


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sparse_transposed_convolutions_are_named_and_dense_ones_are_not(dims: int) -> None:
    kinds: dict[int, type[Any]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    x = randn(2, 4, *[5] * dims)
    gm = graph_of(nn.Sequential(_sparse(kinds[dims](4, 6, 3)), kinds[dims](6, 2, 3)), x)
    found = run(gm, inputs=(x,))
    assert not found.found
    (skip,) = found.skipped
    assert (skip.layer, skip.reason) == ("0", "transposed convolutions stay dense")
    assert skip.values["shape"] == "x".join(map(str, (4, 6, *[3] * dims)))
