"""How often each weight is used for one example: the output positions of a convolution, the tokens of a Linear."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile.train.layers import SparseLayer


def _from_output(layer: SparseLayer, found: dict[str, float], _: nn.Module, args: Any, out: Any) -> None:
    """A neuron gives one output per position: the same for Linear, convolutions and Conv1D."""
    found[layer.name] = found.get(layer.name, 0.0) + out.numel() / layer.neurons


def _from_tokens(
    layer: SparseLayer, found: dict[str, float], _: nn.Module, args: Any, kwargs: Any, out: Any
) -> None:
    """nn.MultiheadAttention never calls its projections as modules: their tokens are those of query, key, value."""
    given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
    query, key, value = (x.numel() / x.shape[-1] for x in given[:3])
    attribute = layer.owners[0][1]
    used = {"in_proj_weight": (query + key + value) / 3, "k_proj_weight": key, "v_proj_weight": value}
    found[layer.name] = found.get(layer.name, 0.0) + used.get(attribute, query)


@torch.no_grad()
def positions_per_example(
    model: nn.Module, layers: Sequence[SparseLayer], inputs: Sequence[Tensor]
) -> dict[str, float]:
    """Layer name -> positions for one example of the batch ``inputs``; runs the model once, in eval mode.

    A layer that this forward does not reach is missing from the result.
    """
    attention = {m.out_proj: m for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    found: dict[str, float] = {}
    handles = []
    for layer in layers:
        for module, _ in layer.owners:
            owner = attention.get(module, module)  # type: ignore[call-overload]  # any module may be asked for
            if isinstance(owner, nn.MultiheadAttention):
                hook = partial(_from_tokens, layer, found)
                handles.append(owner.register_forward_hook(hook, with_kwargs=True))
            else:
                handles.append(owner.register_forward_hook(partial(_from_output, layer, found)))
    was_training = model.training
    try:
        model.eval()
        model(*inputs)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: count / len(inputs[0]) for name, count in found.items()}
