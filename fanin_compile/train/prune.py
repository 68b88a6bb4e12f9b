"""One-shot pruning of a trained model to a constant fan-in: the quick way in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from fanin_compile.errors import OptionError
from fanin_compile.train.allocation import fan_in
from fanin_compile.train.layers import SparseLayer, unwrap
from fanin_compile.train.plan import LayerOptions, Plan, make_plan
from fanin_compile.train.ranking import largest_per_row
from fanin_compile.train.shards import from_first_rank, local, mean_gradient

Criterion = Literal["magnitude", "gradient"]


@torch.no_grad()
def prune_to_fan_in(
    model: nn.Module,
    sparsity: float,
    *,
    criterion: Criterion = "magnitude",
    closure: Callable[[], object] | None = None,
    **layer_options: Unpack[LayerOptions],
) -> Plan:
    """Keep the k most important inputs of each neuron, in place, and register the ``<weight>_mask`` buffers.

    k = floor((1 - sparsity) * dense fan-in), the same for all neurons of a layer, so that the compiler's constant
    fan-in kernels apply. Fine-tune with ``SRigL(model, optimizer, ...)``, which starts from these masks, or with
    ``Static`` to leave them as they are.

    Args:
        model: a trained model; pruned in place.
        sparsity: 0 <= s < 1, of each layer under "uniform", of all together under "erk".
        criterion: "magnitude", |w|; or "gradient", |w dL/dw|: how much the loss would change, to first order,
            if the weight were set to 0 (Molchanov et al. 2017).
        closure: for "gradient": computes the loss on calibration data and calls backward, once or for several
            batches; gradients that were there are put back.
        **layer_options: allocation, erk_power, dense_first, include, exclude and overrides as in
            SparseTraining, but that allocation is "uniform" and dense_first False unless said otherwise.

    Returns:
        the Plan: which layers were pruned, and why others were left dense.

    Raises:
        OptionError: an option out of its range, a layer left without inputs, "gradient" without a closure, a
            layer that no gradient reached, or whose scores are not finite. The model is unchanged then.
    """
    model = unwrap(model)
    if criterion not in ("magnitude", "gradient"):
        raise OptionError(f"criterion is {criterion!r}; expected 'magnitude' or 'gradient'")
    if (closure is not None) != (criterion == "gradient"):
        given = "none" if closure is None else "one"
        raise OptionError(
            f"criterion {criterion!r} with closure: {given}; a closure goes with 'gradient' only"
        )
    defaults: LayerOptions = {"allocation": "uniform", "dense_first": False}
    choices = defaults | layer_options
    plan = make_plan(model, sparsity=sparsity, blocks="matrix", keep_masks=False, **choices)
    fan_ins = [fan_in(layer.name, layer.budgets[0], layer.block_neurons) for layer in plan.sparse]
    scores = [layer.weight_rows().abs() for layer in plan.sparse]
    if closure is not None:
        gradients = _gradients(model, plan, closure)
        scores = [score * gradient.abs() for score, gradient in zip(scores, gradients, strict=True)]
    for layer, score in zip(plan.sparse, scores, strict=True):
        if not score.isfinite().all():  # ranking takes no NaN, and inf * 0 is one
            count = int((~score.isfinite()).sum())
            raise OptionError(
                f"layer {layer.name!r}: {count} of its {criterion} scores are infinite or NaN; expected none"
            )
    for layer, k, score in zip(plan.sparse, fan_ins, scores, strict=True):
        layer.set_mask(from_first_rank(largest_per_row(score, k)))
        layer.zero_inactive(layer.param)
    return plan


def _gradients(model: nn.Module, plan: Plan, closure: Callable[[], object]) -> list[Tensor]:
    """[neurons, dense fan-in] of each layer; the model's gradients are left as they were."""
    before = {param: param.grad for param in model.parameters()}
    try:
        for param in before:
            param.grad = None
        with torch.enable_grad():
            closure()
        return [_gradient(layer) for layer in plan.sparse]
    finally:
        for param, grad in before.items():
            param.grad = grad


def _gradient(layer: SparseLayer) -> Tensor:
    if layer.param.grad is None:
        raise OptionError(
            f"layer {layer.name!r}: no gradient after closure(); expected it to call backward()"
        )
    return layer.rows(mean_gradient(local(layer.param.grad).clone(), layer.param))
