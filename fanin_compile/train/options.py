"""Keyword arguments that methods pass on to what they share."""

from __future__ import annotations

from fanin_compile.train.initialise import InitScheme
from fanin_compile.train.layers import MhaBlocks
from fanin_compile.train.plan import LayerOptions


class MaskOptions(LayerOptions, total=False):
    """SparseTraining's."""

    sparsity: float
    init: InitScheme
    seed: int


class UpdateOptions(MaskOptions, total=False):
    """DynamicTraining's."""

    total_steps: int
    alpha: float
    delta_t: int
    t_end: int | None
    grad_steps: int
    mha_blocks: MhaBlocks
