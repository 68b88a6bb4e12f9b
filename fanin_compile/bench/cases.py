"""What is benchmarked: masked linear layers and stacks of them, with the same weights for every contender."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearCase:
    """One setting: a layer out x fan_in, or `pairs` times (fan_in -> out -> fan_in) with GELU between all."""

    out: int
    fan_in: int
    sparsity: float
    batch: int
    threads: int
    pairs: int = 0

    @property
    def name(self) -> str:
        if self.pairs:
            return f"mlp {self.pairs} x ({self.fan_in}-{self.out}-{self.fan_in})"
        return f"linear {self.fan_in}->{self.out}"

    @property
    def dense_macs(self) -> int:
        return self.batch * self.out * self.fan_in * max(1, 2 * self.pairs)


def masked_linear(fan_in: int, out: int, sparsity: float, generator: torch.Generator) -> nn.Linear:
    """A Linear of constant fan-in round((1 - sparsity) * fan_in), random columns, no ablated neuron, in eval mode."""
    layer = nn.Linear(fan_in, out)
    mask = constant_fan_in_mask(out, fan_in, sparsity, generator)
    with torch.no_grad():
        k = int(mask[0].sum())
        layer.weight.copy_(torch.randn(out, fan_in, generator=generator) * (2.0 / max(k, 1)) ** 0.5 * mask)
        layer.bias.copy_(torch.randn(out, generator=generator) * 0.1)
    return layer.eval().requires_grad_(False)


def constant_fan_in_mask(out: int, fan_in: int, sparsity: float, generator: torch.Generator) -> Tensor:
    k = max(1, round((1.0 - sparsity) * fan_in))
    columns = torch.rand(out, fan_in, generator=generator).topk(k, dim=1).indices
    return torch.zeros(out, fan_in, dtype=torch.bool).scatter_(1, columns, True)


def build(case: LinearCase, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The masked dense model of a case and an input [batch, fan_in]."""
    generator = torch.Generator().manual_seed(seed)
    if case.pairs:
        layers: list[nn.Module] = []
        for _ in range(case.pairs):
            layers += [masked_linear(case.fan_in, case.out, case.sparsity, generator), nn.GELU()]
            layers += [masked_linear(case.out, case.fan_in, case.sparsity, generator), nn.GELU()]
        model: nn.Module = nn.Sequential(*layers[:-1]).eval()
    else:
        model = masked_linear(case.fan_in, case.out, case.sparsity, generator)
    return model, torch.randn(case.batch, case.fan_in, generator=generator)
