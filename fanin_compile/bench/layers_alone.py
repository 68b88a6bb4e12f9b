"""The masked layers of a model without what stands between them, on the inputs they get in one call of the model.

Attention, caches and norms bound what a whole model can gain; this tells what its layers gain.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fanin_compile.bench.contenders import CONTENDERS
from fanin_compile.bench.measure import expect_agreement
from fanin_compile.timing import Timing, interleaved, threads


class LayersAlone(nn.Module):
    """Layers side by side, each on an input of its own."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def layers_alone(
    model: nn.Module, x: Tensor, layers: Iterable[nn.Module]
) -> tuple[LayersAlone, list[Tensor]]:
    """Those of `layers` that model(x) calls, in that order and as often, each with its input."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((layer, args[0].detach().clone(memory_format=torch.preserve_format)))

    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return LayersAlone(layer for layer, _ in calls), [given for _, given in calls]


def time_alone(
    alone: LayersAlone, inputs: list[Tensor], *, threads_used: int, contenders: Iterable[str], seconds: float
) -> dict[str, Timing]:
    """All layers once in each contender's way, in turn, after comparing every output with fp64.

    Raises: DisagreementError.
    """
    torch._dynamo.reset()
    with threads(threads_used), torch.no_grad():
        # contenders hand their input on to the model as it is
        built = {name: CONTENDERS[name](alone, inputs) for name in contenders}  # type: ignore[arg-type]
        runs = {name: run for name, run in built.items() if run is not None}
        _check(alone, inputs, {name: run() for name, run in runs.items()})
        timings = interleaved(list(runs.values()), seconds)
    return dict(zip(runs, timings, strict=True))


def _check(alone: LayersAlone, inputs: list[Tensor], outputs: Mapping[str, object]) -> None:
    """On the first element of each batch: the relative error of fp32 sums this long stays below 1e-4."""
    for i, (layer, x) in enumerate(zip(alone.layers, inputs, strict=True)):
        exact = copy.deepcopy(layer).double()(x[:1].double())
        for name, output in outputs.items():
            assert isinstance(output, list)
            expect_agreement(f"layer {i} of {name} alone", output[i][:1], exact)
