"""The keyword arguments that every method takes, and the model inside a user's wrappers."""

from __future__ import annotations

from torch import nn

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


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner
