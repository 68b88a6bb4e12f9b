"""The dense gradient that an update ranks by: recorded before it is masked, over micro-batches, steps and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fanin_compile.train.layers import SparseLayer
from fanin_compile.train.shards import local, mean_gradient, of_all_ranks


def record(layer: SparseLayer, grad: Tensor) -> None:
    """Keep ``grad``, this rank's ``.grad`` after a backward of the optimizer step in progress, dense as it is yet.

    Autograd adds up active entries over micro-batches; inactive ones were masked since, and add up here.
    """
    before = layer.gradient
    if before is None:
        layer.gradient = grad.clone()
    else:
        layer.gradient = torch.where(layer.multiplier() > 0, grad, before + grad)


def close_step(layer: SparseLayer) -> None:
    """The optimizer step is over and the window goes on."""
    if layer.gradient is not None:
        layer.earlier = layer.gradient if layer.earlier is None else layer.earlier + layer.gradient
        layer.gradient = None


def forget(layer: SparseLayer) -> None:
    """The window is over."""
    layer.gradient = layer.earlier = None


def all_finite(layers: Sequence[SparseLayer]) -> bool:
    """Whether every entry recorded on any rank is; both extremes of a tensor are NaN if any entry is."""
    parts = [part for layer in layers for part in (layer.gradient, layer.earlier) if part is not None]
    finite = [torch.stack(part.aminmax()).isfinite().all() for part in parts if part.numel()]
    return all(ok for (ok,) in of_all_ranks([all(finite)], layers[0].param))


def dense_gradient(layer: SparseLayer) -> Tensor:
    """[neurons, dense fan-in], of all steps of the window and all ranks; 0 where no backward came by."""
    parts = [part for part in (layer.gradient, layer.earlier) if part is not None]
    total = sum(parts[1:], start=parts[0]) if parts else torch.zeros_like(local(layer.param))
    return layer.rows(mean_gradient(total, layer.param))
