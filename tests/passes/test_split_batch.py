from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.lower_depthwise import lower_depthwise
from fanin_compile.passes.split_batch import split_batch
from fanin_compile.pipeline import PassResult
from tests.compile_support import randn
from tests.passes.support import calls, graph_of, run

module = importlib.import_module(
    "fanin_compile.passes.split_batch"
)  # the package holds the function of that name
gather_conv = torch.ops.fanin.gather_conv.default
depthwise_conv = torch.ops.fanin.depthwise_conv.default
cat, slices = torch.ops.aten.cat.default, torch.ops.aten.slice.Tensor
IMAGE = 4 * 8 * 6 * 6  # bytes of eight channels of an image


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of eight channels are as much as fits."""
    monkeypatch.setattr(module, "MOST_BYTES", 2 * IMAGE)


def _pointwise(fan_in: int, out: int) -> nn.Module:
    torch.manual_seed(fan_in)
    conv = nn.Conv2d(fan_in, out, 1)
    prune.random_unstructured(conv, "weight", 0.7)
    prune.remove(conv, "weight")
    return conv


class _Model(nn.Module):
    """Three images of 4 channels are small, of 8 they are large."""

    def __init__(self, tail: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.first, self.expand, self.reduce = _pointwise(4, 4), _pointwise(4, 8), _pointwise(8, 4)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last, self.tail = _pointwise(4, 4), tail

    def forward(self, x: Tensor) -> Any:
        x = F.relu6(self.first(x))
        h = self.depthwise(F.relu6(self.expand(x)))
        return self.last(self.tail(x + self.reduce(F.relu6(h))))


def _split(model: nn.Module, batch: int) -> tuple[fx.GraphModule, PassResult]:
    x = randn(batch, 4, 6, 6)
    gm = graph_of(model, x)
    result = run(gm, condense_conv, lower_depthwise, fuse_epilogue, split_batch, inputs=(x,))
    return gm, result


@pytest.mark.parametrize(("batch", "parts", "large"), [(3, 2, 3), (4, 2, 3), (5, 3, 5), (8, 4, 5)])
def test_splits_what_is_large_and_nothing_else(batch: int, parts: int, large: int) -> None:
    gm, result = _split(_Model(), batch)
    assert len(calls(gm, depthwise_conv)) == parts
    # up to batch 4, first and last read and write small images
    assert len(calls(gm, gather_conv)) == (2 + 2 * parts if large == 3 else 4 * parts)
    assert len(calls(gm, cat)) == 1
    (what,) = result.rewritten
    assert (what.layer, what.became) == ("expand" if large == 3 else "first", "split")
    assert what.detail == f"{large} operators in {parts} parts of {batch} images"


def test_the_order_is_part_by_part() -> None:
    gm, _ = _split(_Model(), 4)
    order = [n.target for n in gm.graph.nodes if n.target in (gather_conv, depthwise_conv)]
    assert order == [gather_conv, *[gather_conv, depthwise_conv, gather_conv] * 2, gather_conv]


@pytest.mark.parametrize("batch", [1, 2])
def test_leaves_what_fits(batch: int) -> None:
    gm, result = _split(_Model(), batch)
    assert not calls(gm, cat)
    assert result == PassResult()


def test_several_outputs_of_a_stretch_are_put_together_each() -> None:
    class Model(_Model):
        def forward(self, x: Tensor) -> Any:
            h = F.relu(self.expand(x))
            return self.reduce(self.depthwise(h)).softmax(1) + h[:, :4].cumsum(1)

    gm, result = _split(Model(), 4)
    assert len(calls(gm, cat)) == 2
    assert len(result.rewritten) == 1


def test_ends_at_what_mixes_images() -> None:
    class Model(_Model):
        def forward(self, x: Tensor) -> Any:
            h = F.relu6(self.expand(x))
            return self.reduce(self.depthwise(h - h.mean(0, keepdim=True)))

    gm, result = _split(Model(), 4)
    assert len(result.rewritten) == 1  # of the two behind; the one before writes for others alone
    assert len(calls(gm, torch.ops.aten.mean.dim)) == 1
    assert len(calls(gm, gather_conv)) == 3


def test_leaves_layers_whose_outputs_none_of_them_reads() -> None:
    """Parts would have to be put together, a copy that nothing pays for."""

    class Model(_Model):
        def forward(self, x: Tensor) -> Any:
            return self.expand(x), self.expand(x + 1)

    gm, result = _split(Model(), 8)
    assert not calls(gm, cat)
    assert result == PassResult()


class _Unbatched(nn.Module):
    """One image of ten channels, which are not a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = _pointwise(10, 10)

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.conv(x).cumsum(0))


def test_channels_of_one_image_are_no_batch() -> None:
    x = randn(10, 6, 6)
    gm = graph_of(_Unbatched(), x)
    assert run(gm, condense_conv, split_batch, inputs=(x,)) == PassResult()


def test_dense_stems_and_pads_go_along() -> None:
    class Stem(_Model):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Any:
            return self.reduce(F.relu(self.stem(F.pad(x, (1, 1, 1, 1)))))

    gm, _ = _split(Stem(), 4)
    assert len(calls(gm, torch.ops.aten.conv2d.default)) == 2
    assert len(calls(gm, gather_conv)) == 2


def test_a_batch_is_not_cut_into_more_parts_than_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PARTS", 3)
    gm, _ = _split(_Model(), 20)
    assert len(calls(gm, depthwise_conv)) == 3
    bounds = [node.args[2:4] for node in calls(gm, slices)]
    assert bounds == [(0, 6), (6, 13), (13, 20)]


def test_leaves_graphs_without_our_convolutions() -> None:
    x = randn(9, 4, 6, 6)
    gm = graph_of(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), x)
    assert run(gm, split_batch, inputs=(x,)) == PassResult()


def test_leaves_symbolic_batches_and_images() -> None:
    x = randn(6, 4, 6, 6)
    for dims in ({0: torch.export.Dim.DYNAMIC}, {2: torch.export.Dim.DYNAMIC}):
        with torch.no_grad():
            program = torch.export.export(_Model().eval(), (x,), dynamic_shapes=(dims,), strict=False)
        gm = program.module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        result = run(gm, condense_conv, lower_depthwise, fuse_epilogue, split_batch, inputs=(x,))
        assert calls(gm, gather_conv)
        assert result == PassResult()
