"""Weights of whole models: how strong they are, which of them sparse training covers, random masks on those."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fanin_compile.mask import masked_weights


def scale_weights(model: nn.Module) -> None:
    """Give the weights of every layer a variance of 2 / fan-in, in place.

    Initialised for training at 0.02, a masked layer may be wrong as a whole without a trace in the output.
    """
    with torch.no_grad():
        for _, module, found in masked_weights(model):
            weight = getattr(module, found.name)
            fan_in = (weight.t() if found.transposed else weight).flatten(1).shape[1]
            weight.mul_(math.sqrt(2.0 / fan_in) / weight.std())


def maskable(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor, bool]]:
    """(name, module, weight, transposed) of the layers that sparse training covers: all but stems and heads."""
    for name, module, found in masked_weights(model):
        head = any(part in name for part in ("head", "classifier", "pooler")) or not name
        weight = getattr(module, found.name)
        stem = weight.ndim > 2 and weight.shape[1] <= 3
        if not head and not stem:
            yield name, module, weight, found.transposed


def mask_constant_fan_in(
    model: nn.Module, sparsity: float, *, ablate: float = 0.0, seed: int = 0
) -> dict[str, Tensor]:
    """Zero all but a random constant fan-in of every maskable layer, in place; returns the masks by weight name.

    What stays of a neuron grows by the root of its fan-in before over that after, so that outputs keep their scale.

    Args:
        ablate: share of the neurons of each hidden layer (is_hidden) to ablate, at equal non-zeros: their budget
            goes to the other neurons, as SRigL does. Other layers keep all neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, module, weight, transposed in maskable(model):
        by_neuron = weight.t() if transposed else weight
        flat = by_neuron.flatten(1)
        out, fan_in = flat.shape
        dead = torch.zeros(out, dtype=torch.bool)
        if ablate and is_hidden(name):
            dead[torch.randperm(out, generator=generator)[: round(ablate * out)]] = True
        budget = (1.0 - sparsity) * out * fan_in
        k = min(fan_in, max(1, round(budget / max(1, int((~dead).sum())))))
        columns = torch.rand(out, fan_in, generator=generator).topk(k, dim=1).indices
        mask = torch.zeros(out, fan_in, dtype=torch.bool).scatter_(1, columns, True)
        mask[dead] = False
        mask = mask.view(by_neuron.shape)
        with torch.no_grad():
            by_neuron.mul_(mask).mul_(math.sqrt(fan_in / k))
        parameter = next(key for key, value in module.named_parameters(recurse=False) if value is weight)
        masks[f"{name}.{parameter}"] = mask.t() if transposed else mask
    return masks


HIDDEN = (
    *("intermediate.dense", "c_fc", "fc1", "gate_proj", "up_proj", "wi", "pwconv1", "lin1"),  # transformers
    *(".layer.0.convolution", ".layer.1.convolution"),  # ResNet's bottlenecks: all but the widening one
    "expand_1x1.convolution",  # MobileNetV2's inverted ones
    *("hidden1", "hidden2"),  # the MLP's
)


def is_hidden(name: str) -> bool:
    """A layer whose neurons only the next layer of its block reads, by the names that models use."""
    return name.endswith(HIDDEN)
