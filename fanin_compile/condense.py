"""`condense(model)`: a copy of a model whose masked layers hold condensed weights. Explicit, savable, portable."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn.utils.prune import BasePruningMethod

from fanin_compile.candidates import (
    HOOK_FLAGS,
    HOOKS,
    Candidate,
    Filter,
    candidates,
    dense_keeper,
    effective_bias,
    geometry,
    holders_of_parameters,
    stored_parameter,
    tied_skip,
    unsupported,
)
from fanin_compile.condensed import index_dtype
from fanin_compile.errors import FaninError, OptionError
from fanin_compile.export import UNSUPPORTED, export_condensed
from fanin_compile.layers import CondensedConv, CondensedLayer, CondensedLinear
from fanin_compile.liveness import LEAST_SAVING
from fanin_compile.masking import Imposer
from fanin_compile.options import VALUES_DTYPES
from fanin_compile.packed import LEAST_BYTES
from fanin_compile.packed_conv import CODE_BYTES, LEAST_CONV_BYTES
from fanin_compile.pipeline import Gate
from fanin_compile.records import Layer, Skip

log = logging.getLogger("fanin_compile")
PLACE_BYTES = 9  # beside its value: where an output comes from, and whether it is active


def condense(
    model: nn.Module,
    *,
    masks: Mapping[str, Tensor] | None = None,
    filter_fn: Filter | None = None,
    values_dtype: torch.dtype | None = None,
    progress: bool = False,
    example_inputs: tuple[Any, ...] | None = None,
) -> nn.Module:
    """A copy of `model` in which every masked Linear and Conv is a CondensedLinear or CondensedConv.

    Works on any nn.Module, traceable or not: layers are swapped, the model's own code stays. Outputs keep their shapes
    (an ablated neuron's is its bias); `state_dict()` holds condensed values and their structure, not dense ones. The
    model itself is left untouched, its dense weights are never copied. Layers that would not shrink, or whose forward
    is their own, stay as they are, as do transposed convolutions and recurrent layers; `fanin_compile.explain` names
    each with the reason.

    With `example_inputs` the whole model is exported in eval mode instead and comes back as a GraphModule for
    inference: ablated neurons are removed across layers, batch norms folded, activations fused. A model that cannot
    be exported gets its layers swapped, with a warning.

    Args:
        masks: masks by parameter or module name, combined with those the model carries (see fanin_compile.mask).
        filter_fn: called with (module, qualified name); False leaves a layer dense.
        values_dtype: store values as float32, bfloat16 or float16 (arithmetic stays fp32); None keeps the weight's.
        progress: show a progress bar, over layers or, with example_inputs, over passes.
        example_inputs: positional arguments of one call; sizes of tensors stay free where the model lets them.

    Raises:
        MaskError: a mask that does not fit its weight. OptionError: an unsupported values_dtype.
    """
    if values_dtype not in (None, *VALUES_DTYPES):
        allowed = ", ".join(map(str, VALUES_DTYPES))
        raise OptionError(f"values_dtype is {values_dtype}, expected None or one of {allowed}")
    if example_inputs is not None:
        try:
            exported = export_condensed(
                model,
                example_inputs,
                masks=masks,
                gate=_shrinks(model, filter_fn, masks),
                values_dtype=values_dtype,
                progress=progress,
            )
            exported.meta[UNSUPPORTED] = tuple(unsupported(model))
            return exported
        except FaninError:
            raise
        except Exception as error:  # export may raise anything on code it cannot follow
            cause = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"condense swaps layers only, as the model cannot be exported: {cause}", stacklevel=2
            )
    memo: dict[int, object] = {}
    shared = _SharedWeights()
    left: list[Candidate] = []
    for candidate in candidates(model, masks=masks, filter_fn=filter_fn, progress=progress):
        if candidate.skip is None:
            memo[id(candidate.module)] = shared.tied(candidate, _condensed_layer(candidate, values_dtype))
        else:
            left.append(candidate)
            log.info("condense leaves %s: %s", candidate.name or "the model", candidate.skip)
    for skip in unsupported(model):
        log.info("condense leaves %s: %s", skip.layer or "the model", skip)
    _prepare_stale_weights(model, memo)
    # deepcopy finds the new layers in its memo and never looks at the dense ones behind them
    copied = copy.deepcopy(model, memo)
    impose = Imposer()
    for candidate in left:
        # the caller's mask decides in a layer that stays dense, too
        if candidate.found.source == "user":
            dense = memo[id(candidate.module)]
            assert isinstance(dense, nn.Module)
            impose(dense, candidate.found)
    for module in copied.modules():
        _disable_fast_path(module)
    return copied


def _shrinks(model: nn.Module, filter_fn: Filter | None, masks: Mapping[str, Tensor] | None) -> Gate:
    """The gate of the graph door: what filter_fn allows and takes fewer bytes than dense, or than its active neurons
    alone as a dense layer."""
    modules = dict(model.named_modules(remove_duplicate=False))
    given = {
        modules[path] for key in masks or {} for path in (key, key.rpartition(".")[0]) if path in modules
    }
    holders = holders_of_parameters(model)

    def gate(layer: Layer) -> Skip | None:
        path = re.sub(r" \(use \d+\)$", "", layer.name)  # a further call is the same layer's
        owner = path.rpartition(".")[0]
        if path not in modules and isinstance(modules.get(owner), nn.MultiheadAttention):
            path = owner  # its weights are named, as it has several
        module = modules.get(path)
        if filter_fn is not None and module is not None and not filter_fn(module, path):
            return Skip(layer.name, "excluded by filter_fn")
        fan_in = math.prod(layer.shape[1:])
        size = layer.dense_bytes // layer.dense_size if layer.dense_bytes else 4
        linear = layer.op == "linear"
        entry, least = (
            (index_dtype(fan_in).itemsize, LEAST_BYTES) if linear else (CODE_BYTES, LEAST_CONV_BYTES)
        )
        condensed = layer.nnz * (size + entry) + least
        dense = size * layer.dense_size
        # the filter has decided for all of them: a tied weight is one in a graph
        keeper = (
            dense_keeper(module, "weight", holders) if module is not None and module not in given else None
        )
        keeper = None if hasattr(module, "weight_orig") else keeper
        active = round(dense * layer.active_share) + layer.shape[0] * (PLACE_BYTES + size)
        if keeper is None and active <= (1 - LEAST_SAVING) * dense and active <= condensed:
            values = {"dense": dense, "active": active, "condensed": condensed}
            return Skip(layer.name, "dense on its active neurons alone is smallest", values, active=True)
        if condensed >= dense:
            return Skip(layer.name, "would not shrink", {"sparsity": f"{layer.sparsity:.1%}"})
        return None if keeper is None else tied_skip(layer.name, keeper, condensed, dense)

    return gate


def _condensed_layer(
    candidate: Candidate, values_dtype: torch.dtype | None
) -> CondensedLinear | CondensedConv:
    module, weight = candidate.module, candidate.weight
    assert weight is not None
    if values_dtype is not None:
        weight = dataclasses.replace(weight, values=weight.values.to(values_dtype))
    bias = effective_bias(module)
    trainable = any(p.requires_grad for name, p in module.named_parameters() if "bias" not in name)
    layer: CondensedLinear | CondensedConv
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer = CondensedConv(
            weight,
            bias,
            **geometry(module),
            memory_format=suggest_memory_format(candidate.found.weight),
            requires_grad=trainable,
        )
    else:
        layer = CondensedLinear(weight, bias, requires_grad=trainable)
    _carry_hooks(module, layer)
    return layer.train(module.training)


class _SharedWeights:
    """Tied weights stay tied: layers of one parameter with the same mask hold the same values and structure."""

    def __init__(self) -> None:
        self._first: dict[
            int, list[tuple[Tensor, CondensedLinear | CondensedConv]]
        ] = {}  # by id of the dense parameter

    def tied(self, candidate: Candidate, layer: CondensedLinear | CondensedConv) -> CondensedLayer:
        dense = stored_parameter(candidate.module, candidate.found.name)
        if dense is None:
            return layer
        before = self._first.setdefault(id(dense), [])
        for mask, first in before:
            same = torch.equal(mask, candidate.found.mask)
            if (
                same
                and torch.equal(first.values, layer.values)
                and torch.equal(first.structure, layer.structure)
            ):
                layer.values = first.values
                layer.register_buffer("structure", first.structure)
                return layer
        before.append((candidate.found.mask, layer))
        return layer


def _carry_hooks(module: nn.Module, layer: nn.Module) -> None:
    """Keep what users hung on the layer, without the pruning hooks, whose work is done."""
    for attribute in HOOKS:
        hooks = getattr(module, attribute)
        kept = type(hooks)((k, h) for k, h in hooks.items() if not isinstance(h, BasePruningMethod))
        setattr(layer, attribute, kept)
    for attribute in HOOK_FLAGS:
        setattr(layer, attribute, copy.copy(getattr(module, attribute)))


def _prepare_stale_weights(model: nn.Module, memo: dict[int, object]) -> None:
    """torch.nn.utils.prune leaves a non-leaf `.weight` on a module after a forward, which deepcopy refuses to copy."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()


def _disable_fast_path(module: nn.Module) -> None:
    """The fused encoder layer of eval mode reads dense weights; without it the same layers run one by one."""
    if not any(isinstance(child, CondensedLayer) for child in module.modules()):
        return
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False
