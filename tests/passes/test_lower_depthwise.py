from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.fold_batch_norm import fold_batch_norm
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.lower_depthwise import lower_depthwise
from fanin_compile.pipeline import PassResult
from tests.compile_support import randn
from tests.passes.support import calls, graph_of, run

gather_conv = torch.ops.fanin.gather_conv.default
depthwise_conv = torch.ops.fanin.depthwise_conv.default
KINDS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
Between = Callable[[Tensor], Tensor]


def _pointwise(dims: int, fan_in: int, out: int) -> Any:
    conv = KINDS[dims](fan_in, out, 1)
    prune.random_unstructured(conv, "weight", 0.7)
    prune.remove(conv, "weight")
    return conv


class _Block(nn.Module):
    """A masked pointwise layer, a depthwise one, and what stands between them and behind."""

    def __init__(
        self, between: Between, *, behind: Between = lambda h: h, dims: int = 2, **arguments: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand = _pointwise(dims, 4, 8)
        self.depthwise = KINDS[dims](8, **{"out_channels": 8, "kernel_size": 3, "groups": 8, **arguments})
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.depthwise(self.between(self.expand(x))))


def _lower(model: nn.Module, dims: int = 2, size: int = 9) -> tuple[fx.GraphModule, PassResult]:
    x = randn(2, 4, *[size] * dims)
    gm = graph_of(model, x)
    return gm, run(gm, condense_conv, lower_depthwise, inputs=(x,))


MATCHES: dict[str, tuple[Between, dict[str, Any], list[int]]] = {
    "plain": (lambda h: h, {}, [0, 0, 0, 0]),
    "behind an activation": (F.relu6, {"padding": 1}, [1, 1, 1, 1]),
    "strided, dilated, no bias": (
        F.silu,
        {"padding": (1, 2), "stride": 2, "dilation": (1, 2), "bias": False},
        [1, 1, 2, 2],
    ),
    "twice the channels": (lambda h: h, {"out_channels": 16}, [0, 0, 0, 0]),
    "'same' of an even kernel": (lambda h: h, {"padding": "same", "kernel_size": 4}, [1, 2, 1, 2]),
    "'valid'": (lambda h: h, {"padding": "valid"}, [0, 0, 0, 0]),
    "uneven pad": (lambda h: F.pad(F.relu(h), (0, 1, 2, 3)), {"stride": 2}, [2, 3, 0, 1]),
    "pad of the width": (lambda h: F.pad(h, (2, 1)), {"padding": 1}, [1, 1, 3, 2]),
    "behind a residual add": (lambda h: h + h.flip(-1), {}, [0, 0, 0, 0]),
}


@pytest.mark.parametrize("name", MATCHES)
def test_lowers(name: str) -> None:
    between, arguments, padding = MATCHES[name]
    gm, result = _lower(_Block(between, **arguments))
    (node,) = calls(gm, depthwise_conv)
    assert node.args[4] == padding
    assert not calls(gm, torch.ops.aten.pad.default)
    assert not calls(gm, torch.ops.aten.constant_pad_nd.default)
    assert [(r.layer, r.became) for r in result.rewritten] == [("depthwise", "depthwise-conv")]
    assert ("folded" in result.rewritten[0].detail) == ("pad" in name)
    assert not result.skipped


@pytest.mark.parametrize("dims", [1, 3])
def test_lowers_other_dimensions(dims: int) -> None:
    pads = (1, 0) * dims
    gm, result = _lower(_Block(lambda h: F.pad(h, pads), dims=dims, stride=2), dims, size=6)
    (node,) = calls(gm, depthwise_conv)
    assert node.args[3:6] == ([2] * dims, [1, 0] * dims, [1] * dims)
    assert len(result.rewritten) == 1


def test_a_condensed_convolution_behind_it_will_do_and_a_chain_of_them() -> None:
    torch.manual_seed(0)
    dense = [nn.Conv2d(4, 4, 3, groups=4, padding=1) for _ in range(2)]
    _, result = _lower(nn.Sequential(dense[0], nn.ReLU(), _pointwise(2, 4, 8)))
    assert [r.layer for r in result.rewritten] == ["0"]
    _, result = _lower(nn.Sequential(_pointwise(2, 4, 4), dense[0], nn.ReLU(), dense[1]))
    assert [r.layer for r in result.rewritten] == ["1", "3"]


PADS_LEFT: dict[str, Between] = {
    "of ones": lambda h: F.pad(h, (0, 1, 0, 1), value=1.0),
    "reflecting": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "that crops": lambda h: F.pad(h, (1, -1, 0, 0)),
    "of channels": lambda h: F.pad(h, (0, 0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", PADS_LEFT)
def test_a_pad_that_is_no_padding_stays(name: str) -> None:
    gm, result = _lower(_Block(PADS_LEFT[name]))
    for node in calls(gm, depthwise_conv):
        assert node.args[4] == [0, 0, 0, 0]
    assert all("folded" not in r.detail for r in result.rewritten)


def test_a_pad_with_another_reader_stays() -> None:
    class Model(_Block):
        def forward(self, x: Tensor) -> Any:
            padded = F.pad(self.expand(x), (1, 1, 1, 1))
            return self.depthwise(padded), padded

    gm, _ = _lower(Model(lambda h: h))
    (node,) = calls(gm, depthwise_conv)
    assert node.args[4] == [0, 0, 0, 0]


def test_leaves_graphs_without_a_condensed_convolution() -> None:
    gm, result = _lower(nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)))
    assert not calls(gm, depthwise_conv)
    assert result == PassResult()


def test_leaves_what_stands_alone_and_says_so() -> None:
    class Model(_Block):
        def forward(self, x: Tensor) -> Any:
            return self.expand(x), self.depthwise(torch.cat([x, x], 1).softmax(1))

    gm, result = _lower(Model(lambda h: h))
    assert not calls(gm, depthwise_conv)
    (skip,) = result.skipped
    assert (skip.layer, skip.reason) == ("depthwise", "depthwise: beside no condensed convolution")


def test_leaves_grouped_ones() -> None:
    gm, result = _lower(_Block(lambda h: h, groups=4))
    assert not calls(gm, depthwise_conv)
    assert not result.skipped


def test_leaves_other_dtypes_and_says_so() -> None:
    model = _Block(lambda h: h.double())
    model.depthwise.double()
    gm, result = _lower(model)
    assert not calls(gm, depthwise_conv)
    (skip,) = result.skipped
    assert (skip.layer, skip.reason) == ("depthwise", "depthwise: the planar kernel knows float32 alone")
    assert set(skip.values.values()) == {torch.float64}


def test_is_named_as_its_module_after_a_batch_norm_was_folded_and_takes_epilogues() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        _pointwise(2, 4, 8),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        _pointwise(2, 8, 4),
    )
    x = randn(2, 4, 8, 8)
    gm = graph_of(model, x)
    result = run(gm, fold_batch_norm, condense_conv, lower_depthwise, fuse_epilogue, inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("0", "+ relu6"), ("4", "+ relu6")]
    operators = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert operators == [gather_conv, depthwise_conv, gather_conv]


def test_takes_a_residual_as_its_own() -> None:
    class Model(_Block):
        def forward(self, x: Tensor) -> Tensor:
            h = self.expand(x)
            return F.relu(h + self.depthwise(h))

    x = randn(2, 4, 9, 9)
    gm = graph_of(Model(lambda h: h, padding=1), x)
    result = run(gm, condense_conv, lower_depthwise, fuse_epilogue, inputs=(x,))
    assert [r.detail for r in result.rewritten] == ["+ residual", "+ relu"]
    assert all(r.layer == "depthwise" for r in result.rewritten)
