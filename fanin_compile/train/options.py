"""The keyword arguments that every method takes."""

from __future__ import annotations

from fanin_compile.train.initialise import InitScheme
from fanin_compile.train.plan import LayerOptions


class Options(LayerOptions, total=False):
    """The keyword arguments of SparseTraining, for subclasses to pass on."""

    total_steps: int
    sparsity: float
    alpha: float
    delta_t: int
    t_end: int | None
    init: InitScheme
    grad_steps: int
    seed: int
