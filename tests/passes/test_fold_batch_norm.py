from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fanin_compile.graph import CONDENSED, LAYER
from fanin_compile.passes.fold_batch_norm import fold_batch_norm
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, graph_of, run

aten = torch.ops.aten


def _trained(norm: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=generator) + 0.5
            tensor.copy_(-value if name == "running_mean" else value)
    return norm


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_folds_into_a_sparse_linear(affine: bool, bias: bool) -> None:
    model = nn.Sequential(
        sparse_linear(64, 32, 6, ablated=3, bias=bias), _trained(nn.BatchNorm1d(32, affine=affine))
    )
    x = randn(5, 64)
    gm = graph_of(model, x)
    result = run(gm, fold_batch_norm, inputs=(x,))
    assert not calls(gm, aten.batch_norm.default)
    (node,) = calls(gm, aten.linear.default)
    assert node.meta[LAYER].name == "0"
    assert torch.equal(node.meta[CONDENSED].mask(), model[0].weight != 0)  # type: ignore[arg-type]
    assert [(r.layer, r.detail) for r in result.rewritten] == [("0", "batch norm folded")]


def test_folds_into_a_sparse_convolution() -> None:
    conv = nn.Conv2d(4, 8, 3)
    prune.random_unstructured(conv, "weight", 0.9)
    prune.remove(conv, "weight")
    x = randn(2, 4, 7, 7)
    gm = graph_of(nn.Sequential(conv, _trained(nn.BatchNorm2d(8))), x)
    assert len(run(gm, fold_batch_norm, inputs=(x,)).rewritten) == 1
    assert not calls(gm, aten.batch_norm.default)


def _sparse_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, 8, 1)
    prune.random_unstructured(conv, "weight", 0.8)
    prune.remove(conv, "weight")
    return conv


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_folds_into_dense_convolutions_beside_a_masked_layer(
    bias: bool, groups: int, memory_format: torch.memory_format
) -> None:
    dense = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias)
    model: Any = nn.Sequential(dense, _trained(nn.BatchNorm2d(4)), nn.ReLU6(), _sparse_conv(4))
    model, x = model.to(memory_format=memory_format), randn(2, 4, 7, 7)
    gm = graph_of(model, x)
    result = run(gm, fold_batch_norm, inputs=(x,))
    assert not calls(gm, aten.batch_norm.default)
    assert [(r.layer, r.became, r.bytes, r.detail) for r in result.rewritten] == [
        ("0", "folded", None, "batch norm folded")
    ]
    folded = calls(gm, aten.conv2d.default)[0]
    assert CONDENSED not in folded.meta
    assert folded.args[1].meta["val"].stride() == dense.weight.stride()  # type: ignore[union-attr]


def test_leaves_dense_convolutions_of_other_graphs_and_shared_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.sparse = nn.Conv2d(4, 4, 3, padding=1), _sparse_conv(4)
            self.norm = _trained(nn.BatchNorm2d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.sparse(self.norm(self.dense(self.dense(x))))
            return y

    class Unbatched(nn.Module):
        """Batch norm of the rows of one image."""

        def __init__(self) -> None:
            super().__init__()
            self.dense, self.sparse = nn.Conv2d(4, 4, 3, padding=1), _sparse_conv(4)
            self.norm = _trained(nn.BatchNorm1d(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.sparse(self.norm(self.dense(x)))
            return y

    no_mask = nn.Sequential(nn.Conv2d(4, 4, 3), _trained(nn.BatchNorm2d(4)))
    for model, x in (
        (Shared(), randn(2, 4, 7, 7)),
        (Unbatched(), randn(4, 4, 7)),
        (no_mask, randn(2, 4, 7, 7)),
    ):
        gm = graph_of(model, x)
        assert run(gm, fold_batch_norm, inputs=(x,)).rewritten == ()
        assert len(calls(gm, aten.batch_norm.default)) == 1


def test_a_scale_of_0_keeps_the_structure() -> None:
    norm = _trained(nn.BatchNorm1d(32))
    with torch.no_grad():
        norm.weight[3] = 0.0
    x = randn(5, 64)
    gm = graph_of(nn.Sequential(sparse_linear(64, 32, 6), norm), x)
    run(gm, fold_batch_norm, inputs=(x,))
    assert calls(gm, aten.linear.default)[0].meta[CONDENSED].n_ablated == 0


def test_leaves_dense_layers_other_readers_and_other_dimensions() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = sparse_linear(64, 32, 6), _trained(nn.BatchNorm1d(32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.a(x)
            y: torch.Tensor = self.norm(h) + h
            return y

    dense = nn.Sequential(nn.Linear(64, 32), _trained(nn.BatchNorm1d(32)))
    # [batch, 32, 32]: the norm's channels are not the linear's
    rows = nn.Sequential(sparse_linear(64, 32, 6), _trained(nn.BatchNorm1d(32)))
    for model, x in ((Read(), randn(5, 64)), (dense, randn(5, 64)), (rows, randn(5, 32, 64))):
        gm = graph_of(model, x)
        assert run(gm, fold_batch_norm, inputs=(x,)).rewritten == ()
        assert len(calls(gm, aten.batch_norm.default)) == 1
