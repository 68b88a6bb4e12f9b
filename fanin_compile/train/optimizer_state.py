"""Optimizer state of inactive weights: cleared, so that a weight that grows starts as a new one would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fanin_compile.errors import OptionError
from fanin_compile.train.layers import SparseLayer

# An update of these is a function of one entry's own gradient, weight and state, and 0 where all three are 0
# (Adafactor's factored state only scales it), so that inactive weights stay 0 without being touched.
_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.ASGD, torch.optim.Rprop,
    torch.optim.Adafactor,
)  # fmt: skip
# State that does not start at 0: where its first value stands in the param group.
_STARTS_AT = {"sum": "initial_accumulator_value", "step_size": "lr"}


def is_elementwise(optimizer: Optimizer) -> bool:
    """Whether masked gradients alone keep inactive weights at 0; others (Muon, LBFGS) need them masked
    again, and so do subclasses, whose step may do anything."""
    return type(optimizer) in _ELEMENTWISE


def group_of(optimizer: Optimizer, layer: SparseLayer) -> dict[str, Any]:
    """The param group that holds the layer's weight."""
    for group in optimizer.param_groups:
        if any(param is layer.param for param in group["params"]):
            return dict(group)
    raise OptionError(
        f"layer {layer.name!r} is not among the optimizer's parameters; pass them all, or exclude it"
    )


def clear_inactive_state(optimizer: Optimizer, layer: SparseLayer) -> None:
    """Reset every per-element state of ``layer``'s weight to its first value off the mask."""
    state = optimizer.state.get(layer.param)
    if not state:
        return
    group = group_of(optimizer, layer)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == layer.param.shape:
            layer.zero_inactive(value, float(group.get(_STARTS_AT.get(key, ""), 0.0)))
