"""What removing ablated neurons gains in the feed-forward blocks of a model, over the same masks without removal."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from unittest import mock

import torch
from torch import Tensor, nn

from fanin_compile import rewriting
from fanin_compile.bench.contenders import Run, fanin
from fanin_compile.bench.layers_alone import layers_alone
from fanin_compile.bench.masking import is_hidden
from fanin_compile.bench.measure import expect_agreement
from fanin_compile.passes import PIPELINE
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.timing import Timing, interleaved, threads

AIM = 1.3
REMOVAL = (fold_constant_channels, remove_unread_neurons)


class FeedForward(nn.Module):
    """Blocks of two layers, GELU between, side by side, each on an input of its own."""

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(first, nn.GELU(), second) for first, second in pairs)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, inputs, strict=True)]


def feed_forward(
    model: nn.Module, x: Tensor, layers: Mapping[str, nn.Module]
) -> tuple[FeedForward, list[Tensor]]:
    """The feed-forward blocks that model(x) runs, each with its input: a hidden linear by its name, and the one called
    after it. Of a gated block that is what the gate is applied to."""
    names = {layer: name for name, layer in layers.items()}
    alone, inputs = layers_alone(model, x, layers.values())
    called = list(zip(alone.layers, inputs, strict=True))
    blocks = [
        ((first, second), given)
        for (first, given), (second, _) in itertools.pairwise(called)
        if is_hidden(names[first]) and not is_hidden(names[second]) and not isinstance(first, nn.Conv2d)
    ]
    return FeedForward(pair for pair, _ in blocks), [given for _, given in blocks]


def time_removal(
    blocks: FeedForward, inputs: list[Tensor], *, threads_used: int, seconds: float
) -> tuple[Timing, Timing]:
    """All blocks once without and with the removal of ablated neurons, both through the backend, compared with fp64.

    Raises: DisagreementError.
    """
    torch._dynamo.reset()
    kept = tuple(run for run in PIPELINE if run not in REMOVAL)
    with threads(threads_used), torch.no_grad():
        exact = copy.deepcopy(blocks).double()([x[:1].double() for x in inputs])
        with mock.patch.object(rewriting, "PIPELINE", kept):
            whole = _checked(copy.deepcopy(blocks), inputs, exact)
        narrow = _checked(blocks, inputs, exact)
        without, removed = interleaved([whole, narrow], seconds)
    return without, removed


def _checked(blocks: FeedForward, inputs: list[Tensor], exact: list[Tensor]) -> Run:
    run = fanin(blocks, inputs)  # type: ignore[arg-type]  # it hands its input on as it is
    outputs = run()
    assert isinstance(outputs, list)
    for i, (output, expected) in enumerate(zip(outputs, exact, strict=True)):
        expect_agreement(f"feed-forward block {i}", output[:1], expected)
    return run
