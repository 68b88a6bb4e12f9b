"""What a checkpoint holds of sparse layers: masks, budgets and gradients recorded so far."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile.errors import FaninError, OptionError
from fanin_compile.train.layers import SparseLayer
from fanin_compile.train.shards import local, of_all_ranks


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
    """The reverse of ``save``. Before anything is changed, raises OptionError when it was saved of other layers or
    blocks, and FaninError when the states of other ranks are of another step or have other masks."""
    saved = {name: tuple(entry["mask"].shape) for name, entry in state["layers"].items()}
    here = {layer.name: tuple(layer.param.shape) for layer in layers}
    if saved != here:
        raise OptionError(f"the state is of layers {saved}; expected {here}")
    for layer in layers:
        blocks = len(state["layers"][layer.name]["budgets"])
        if blocks != layer.blocks:
            raise OptionError(
                f"layer {layer.name!r}: the state is of {blocks} blocks; expected {layer.blocks} (mha_blocks)"
            )
    _refuse_other_ranks(state, layers[0].param)
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


def _refuse_other_ranks(state: Mapping[str, Any], like: Tensor) -> None:
    """Ranks that stand at different steps would wait for each other, or mix their masks."""
    digest = hashlib.sha256()
    for entry in state["layers"].values():
        digest.update(entry["mask"].cpu().numpy().tobytes())
    ranks = of_all_ranks([state["steps"], int.from_bytes(digest.digest()[:6])], like)
    if any(rank != ranks[0] for rank in ranks):
        found = ", ".join(f"{i}: step {steps}, masks {masks:012x}" for i, (steps, masks) in enumerate(ranks))
        raise FaninError(f"the states of ranks differ ({found}); expected one step and the same masks")


def _on(param: Tensor, saved: Tensor | None) -> Tensor | None:
    """A copy of ``saved`` where ``param`` is, which may be another device than the checkpoint's."""
    return None if saved is None else saved.to(param.device, copy=True)
