from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.bench.models import OneInput, make_model
from fanin_compile.graph import bind_arguments
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.find_masked_layers import find_masked_layers
from tests.compile_support import randn
from tests.passes.support import calls, context, graph_of, run


class _Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Dropout(0.5, inplace=True)])

    def forward(self, x: Tensor) -> Tensor:
        h = x + 1
        for layer in self.layers:
            h = layer(h)
        h = F.alpha_dropout(h, 0.5, training=False).to(torch.float32)
        h.mul_(2.0)  # what the identities return is their input, so this changes it
        return h + 1


def test_all_go_and_in_place_operations_still_meet_their_tensor() -> None:
    x = randn(2, 3, 4, 4)
    gm = graph_of(_Many(), x)
    run(gm, drop_identities, inputs=(x,))
    targets = {str(n.target) for n in gm.graph.nodes if n.op == "call_function"}
    assert targets == {"aten.add.Tensor", "aten.mul_.Tensor"}


def test_what_does_something_stays() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (
                *(F.dropout(x, 0.5, training=True), x.to(torch.float64), x.to(torch.float32, copy=True)),
                *(x.clone(), x.contiguous()),
            )

    x = randn(2, 4)
    gm = graph_of(Model(), x)
    before = [n.target for n in gm.graph.nodes]
    find_masked_layers(gm, context(gm))
    drop_identities(gm, context(gm))
    assert [n.target for n in gm.graph.nodes] == before


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


def _pad(x: Tensor, mode: str = "constant") -> Tensor:
    return F.pad(x, (0, 0, 0, 0), mode=mode)


def _written_before(x: Tensor) -> Tensor:
    h = x + 1
    h.relu_()
    return _pad(h) * 2


def _copy_written(x: Tensor) -> Tensor:
    h = x + 1
    y = _pad(h)
    y.mul_(2)
    return h + y


def _view_of_copy_written(x: Tensor) -> Tensor:
    h = x + 1
    y = _pad(h)
    y.view(-1).mul_(2)
    return h + y


def _source_written(x: Tensor) -> Tensor:
    h = x + 1
    y = _pad(h)
    h.view(-1).mul_(2)
    return h + y


def _pads_left(function: Callable[[Tensor], object]) -> int:
    x = randn(2, 3, 4, 4)
    gm = graph_of(_Function(function), x)
    pads = len(calls(gm, torch.ops.aten.pad.default))
    assert pads > 0
    run(gm, drop_identities, inputs=(x,))
    return len(calls(gm, torch.ops.aten.pad.default))


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_padding_by_nothing_goes_in_every_mode(mode: str) -> None:
    assert _pads_left(lambda x: _pad(_pad(x + 1, mode), mode) * 2) == 0


def test_what_was_written_before_it_was_padded_goes() -> None:
    assert _pads_left(_written_before) == 0


@pytest.mark.parametrize(
    "function",
    [
        *(_copy_written, _view_of_copy_written, _source_written),
        lambda x: _pad(x),
        lambda x: _pad(x).view(-1),
        lambda x: (_pad(x + 1).unsqueeze(0), x * 2),
        lambda x: F.pad(x, (0, 0, 0, 1)) * 2,
        lambda x: F.pad(x, (1, -1)) * 2,
        # the copy can be viewed, its source cannot
        lambda x: _pad(x[:, :1].expand(-1, 3, -1, -1)).view(-1) * 2,
    ],
)
def test_a_copy_somebody_can_tell_from_its_source_stays(function: Callable[[Tensor], object]) -> None:
    assert _pads_left(function) == 1


def _nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or (0,), dtype=dtype)


def _cats_left(function: Callable[[Tensor], object]) -> list[int]:
    """Of how many tensors those are that stay."""
    x = randn(2, 3, 4, 5)
    gm = graph_of(_Function(function), x)
    assert calls(gm, torch.ops.aten.cat.default)
    run(gm, drop_identities, inputs=(x,))
    assert not calls(gm, torch.ops.aten.detach_.default)
    return [len(node.args[0]) for node in calls(gm, torch.ops.aten.cat.default)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([torch.tensor([]), x + 1], -2) * 2,  # as a cache begins
        lambda x: torch.cat([_nothing(2, 3, 0, 5), x + 1, _nothing()], -2) * 2,
        lambda x: torch.cat([x]) * 2,
    ],
)
def test_a_concatenation_with_nothing_goes(function: Callable[[Tensor], object]) -> None:
    assert _cats_left(function) == []


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda x: torch.cat([_nothing(), x, _nothing(), x], 1) * 2, 2),
        (lambda x: torch.cat([_nothing(2, 0, 4, 5), x, x], 1) * 2, 3),
        (lambda x: torch.cat([_nothing(), x], 1), 1),
        (lambda x: torch.cat([_nothing(), x], 1).view(-1), 1),
        # the copy can be viewed, its source cannot
        (lambda x: torch.cat([_nothing(), x.transpose(1, 2)], 1).view(-1) * 2, 1),
        (lambda x: torch.cat([_nothing(dtype=torch.float64), x], 1) * 2, 2),
        (lambda x: (y := torch.cat([_nothing(), x], 1), y.mul_(2), x + y)[2], 1),
        (lambda x: torch.cat([_nothing(), _nothing()]) * x.sum(), 2),
    ],
)
def test_other_concatenations_stay(function: Callable[[Tensor], object], tensors: int) -> None:
    assert _cats_left(function) == [tensors]


def test_mobilenets_pads_of_zero_go() -> None:
    case = make_model("mobilenet_v2", small=True, batch=1)
    model, x = OneInput(case), next(iter(case.inputs.values()))
    gm = graph_of(model, x)
    before = len(calls(gm, torch.ops.aten.pad.default))
    drop_identities(gm, context(gm))
    sizes = [bind_arguments(node)["pad"] for node in calls(gm, torch.ops.aten.pad.default)]
    assert 0 < len(sizes) < before
    assert all(any(size) for size in sizes)
