"""RigL, SET and static sparse training: what SRigL is compared with, each a small override."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fanin_compile.train.allocation import fan_in
from fanin_compile.train.base import SparseTraining
from fanin_compile.train.dynamic import Block, DynamicTraining
from fanin_compile.train.layers import SparseLayer
from fanin_compile.train.topology import random_unstructured, unstructured_update


class RigL(DynamicTraining):
    """Unstructured: the layer's smallest weights go, its largest gradients grow (Evci et al. 2020)."""

    def _check_layers(self) -> None:
        for layer in self.layers:
            fan_in(layer.name, min(layer.budgets), 1)  # refuses a layer without any weight

    def _first_mask(self, layer: SparseLayer, budget: int, generator: torch.Generator) -> Tensor:
        return random_unstructured(layer.block_neurons, layer.dense_fan_in, budget, generator)

    def _next_mask(self, block: Block) -> Tensor:
        return unstructured_update(
            block.weight, self._growth_score(block), block.mask, fraction=block.fraction
        )

    def _growth_score(self, block: Block) -> Tensor:
        return block.gradient.abs()


class SET(RigL):
    """Unstructured: the layer's smallest weights go, random ones grow (Mocanu et al. 2018).

    Its drop fraction follows the same cosine as the others', where the paper keeps it constant.
    """

    needs_gradient: ClassVar[bool] = False

    def _growth_score(self, block: Block) -> Tensor:
        return torch.rand(block.mask.shape, generator=block.generator).to(block.weight.device)


class Static(SparseTraining):
    """A random constant fan-in mask that never changes: it takes none of the options about updates."""
