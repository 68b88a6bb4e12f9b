"""What a checkpoint holds of sparse layers: masks, budgets and gradients recorded so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile.errors import OptionError
from fanin_compile.train.layers import SparseLayer
from fanin_compile.train.shards import local


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def save(layers: Sequence[SparseLayer], model: nn.Module | None) -> dict[str, Any]:
    """The layers' part of a checkpoint and, of ``model`` when there is one, this rank's part of every
    gradient."""
    state: dict[str, Any] = {
        "layers": {
            layer.name: {
                "mask": layer.mask.clone(),
                "budgets": layer.budgets,
                "gradient": _copy(layer.gradient),
                "earlier": _copy(layer.earlier),
                "explored": _copy(layer.explored),
            }
            for layer in layers
        }
    }
    if model is not None:
        state["grads"] = {
            name: local(param.grad).clone()
            for name, param in model.named_parameters()
            if param.grad is not None
        }
    return state


@torch.no_grad()
def restore(layers: Sequence[SparseLayer], model: nn.Module, state: Mapping[str, Any]) -> None:
    """The reverse of ``save``; raises OptionError when it was saved of other layers, before changing
    anything."""
    saved = {name: tuple(entry["mask"].shape) for name, entry in state["layers"].items()}
    here = {layer.name: tuple(layer.param.shape) for layer in layers}
    if saved != here:
        raise OptionError(f"the state is of layers {saved}; expected {here}")
    for layer in layers:
        entry = state["layers"][layer.name]
        layer.set_mask(layer.rows(entry["mask"]))
        layer.budgets = tuple(entry["budgets"])
        for part in ("gradient", "earlier", "explored"):
            setattr(layer, part, _on(layer.param, entry[part]))
    grads = state.get("grads", {})
    for name, param in model.named_parameters():
        if name in grads:
            param.grad = torch.zeros_like(param)
            local(param.grad).copy_(grads[name])


def _on(param: Tensor, saved: Tensor | None) -> Tensor | None:
    """A copy of ``saved`` where ``param`` is, which may be another device than the checkpoint's."""
    return None if saved is None else saved.to(param.device, copy=True)
