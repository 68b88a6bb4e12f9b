"""Methods that move connections: when they update, the dense gradient they rank by, and one update.

A method overrides two pure choices, the first mask of a block of neurons and its next one: srigl.py, baselines.py.
"""

from __future__ import annotations

import abc
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fanin_compile.errors import OptionError
from fanin_compile.train.base import SparseTraining
from fanin_compile.train.gradient import all_finite, close_step, dense_gradient, forget, record
from fanin_compile.train.layers import MhaBlocks, SparseLayer
from fanin_compile.train.options import MaskOptions
from fanin_compile.train.schedule import UpdateSchedule
from fanin_compile.train.shards import from_first_rank, local


@dataclass(frozen=True)
class Block:
    """Neurons that are ranked together, at an update: a layer, or one head of an attention projection."""

    layer: SparseLayer
    weight: Tensor  # [n, f], 0 off the mask
    gradient: Tensor  # [n, f], dense; empty where the method needs none
    mask: Tensor  # bool [n, f]
    budget: int  # active weights that it may hold
    fraction: float  # share of the active weights to drop
    generator: torch.Generator  # on the CPU, the same on every rank


class DynamicTraining(SparseTraining, abc.ABC):
    """Sparse training that drops and grows connections every ``delta_t`` steps until ``t_end``.

    When an update is near, the dense gradient is recorded before it is masked.

    Args:
        total_steps: optimizer steps of the whole training.
        alpha: share of the active weights dropped at the start, decayed to 0 by a cosine at ``t_end``.
        delta_t: optimizer steps from one topology update to the next.
        t_end: step from which the topology is final; by default 75 % of ``total_steps``.
        grad_steps: optimizer steps over which the dense gradient is summed before an update.
        mha_blocks: nn.MultiheadAttention's input projection as one "matrix", or each "projection" or "head"
            of it ranked and given its budget by itself.
        **options: SparseTraining's.
    """

    needs_gradient: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        total_steps: int,
        alpha: float = 0.3,
        delta_t: int = 100,
        t_end: int | None = None,
        grad_steps: int = 1,
        mha_blocks: MhaBlocks = "matrix",
        **options: Unpack[MaskOptions],
    ) -> None:
        for option, value in (("total_steps", total_steps), ("grad_steps", grad_steps)):
            if value < 1:
                raise OptionError(f"{option} is {value}; expected at least 1")
        if grad_steps != 1 and not self.needs_gradient:
            raise OptionError(
                f"grad_steps is {grad_steps}; expected none, as {type(self).__name__} looks at no gradient"
            )
        self.schedule = UpdateSchedule(alpha, delta_t, total_steps * 3 // 4 if t_end is None else t_end)
        if self.schedule.next_update(0) is None:
            warnings.warn(
                f"delta_t={delta_t} is not below t_end={self.schedule.t_end}: the topology will never change",
                stacklevel=2,
            )
        self.grad_steps = grad_steps
        self._mha_blocks = mha_blocks
        self._due = False  # an update that waits for a finite gradient
        super().__init__(model, optimizer, **options)
        self._collecting = self._collects()

    @abc.abstractmethod
    def _next_mask(self, block: Block) -> Tensor:
        """The mask of a block of neurons after an update."""

    # Every step.

    def _collects(self) -> bool:
        """Whether the dense gradient of the coming optimizer step is part of an update."""
        if not self.needs_gradient:
            return False
        coming = self.schedule.next_update(self.steps)
        return self._due or (coming is not None and self.steps + self.grad_steps >= coming)

    @property
    def dense_gradient_share(self) -> float:
        final = self.schedule.next_update(self.steps) is None
        if final or not self.needs_gradient:
            return 0.0
        return min(1.0, self.grad_steps / self.schedule.delta_t)

    @torch.no_grad()
    def _on_gradient(self, layer: SparseLayer, param: Tensor) -> None:
        if self._collecting and param.grad is not None:
            record(layer, local(param.grad))
        super()._on_gradient(layer, param)

    def _after_step(self) -> bool:
        updated = False
        if self._due or self.schedule.updates_at(self.steps):
            updated = self._update()
            self._due = not updated and self.steps < self.schedule.t_end
        elif self._collecting:
            for layer in self.layers:
                close_step(layer)
        self._collecting = self._collects()
        return updated

    # An update.

    def _update(self) -> bool:
        if not all_finite(self.layers):
            for layer in self.layers:
                forget(layer)
            return False
        fraction = self.schedule.fraction(self.steps)
        for index, layer in enumerate(self.layers):
            self._update_layer(layer, fraction, self._generator(index))
        return True

    def _update_layer(self, layer: SparseLayer, fraction: float, generator: torch.Generator) -> None:
        layer.check_zeros()
        mask, weight = layer.rows(layer.mask), layer.weight_rows()
        gradient = dense_gradient(layer) if self.needs_gradient else weight.new_empty(layer.blocks, 0)
        forget(layer)
        if self.needs_gradient and not any(gradient.aminmax()):
            return  # unused since the last update: nothing to rank by
        per_block = (x.chunk(layer.blocks) for x in (weight, gradient, mask))
        new = [
            self._next_mask(Block(layer, w, g, m, budget, fraction, generator))
            for w, g, m, budget in zip(*per_block, layer.budgets, strict=True)
        ]
        layer.set_mask(from_first_rank(torch.cat(new)))
        self._apply_mask(layer)

    # Checkpoints.

    def state_dict(self, *, grads: bool = False) -> dict[str, Any]:
        return super().state_dict(grads=grads) | {"due": self._due}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._due = state["due"]
        self._collecting = self._collects()

    def _more(self) -> str:
        return f", {self.schedule}"
