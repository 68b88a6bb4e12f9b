from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fanin_compile.graph import LAYER
from fanin_compile.passes.condense_conv import condense_conv
from tests.compile_support import assert_equals_model, randn
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


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("arguments", [{}, {"dilation": 3}, {"groups": 2, "bias": False}])
def test_uneven_same_padding_is_added_before(dims: int, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kernel = (4, 3, 2)[:dims]  # even, odd, even
    conv, x = _sparse(KINDS[dims](4, 6, kernel, padding="same", **arguments)), randn(2, 4, *[9] * dims)
    gm = graph_of(conv, x)
    result = run(gm, condense_conv, inputs=(x,))
    assert [r.became for r in result.rewritten] == ["gather-conv"]
    assert not result.skipped
    (pad,) = calls(gm, torch.ops.aten.constant_pad_nd.default)
    assert LAYER not in pad.meta
    assert pad.args[1] == [0, 1, 0, 0, 0, 1][6 - 2 * dims :]
    assert gm(x).shape == conv(x).shape
    assert_equals_model(gm(x), conv, x)
    # without batch
    gm = graph_of(conv, x[0])
    run(gm, condense_conv, inputs=(x[0],))
    assert_equals_model(gm(x[0]), conv, x[0])


def test_leaves_dense_and_transposed_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3), _sparse(nn.ConvTranspose1d(6, 4, 3)))
    x = randn(2, 4, 9)
    gm = graph_of(model, x)
    result = run(gm, condense_conv, inputs=(x,))
    assert not calls(gm, gather_conv)
    assert not result.rewritten
    assert not result.skipped


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
