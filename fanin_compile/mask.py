"""Every way a PyTorch model can carry a mask, read as one bool mask per weight.

The mask decides what is active: a weight that is exactly 0 inside its mask stays active, and whatever value
stands outside (NaN too) counts as 0. Only a weight without any mask is judged by its zeros. Where several
masks meet (stacked parametrizations, a user's mask on a pruned layer) an input is active only if all of them
say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .errors import MaskError

Source = Literal["prune", "parametrize", "buffer", "module", "user", "zeros"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Absent ones are skipped: q, k and v stand apart only if their widths differ. out_proj is a Linear itself.
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True, eq=False)
class MaskedWeight:
    """A weight as the forward pass sees it, and which of its entries are active.

    Attributes:
        name: the parameter's name on its module: "weight", "in_proj_weight".
        weight: the effective dense weight, 0 outside the mask; a detached copy, shape and dtype of the
            parameter.
        mask: bool, same shape and device; True = active.
        source: where the mask comes from: "prune" (torch.nn.utils.prune), "parametrize", "buffer"
            (`<name>_mask` on the module), "module" (`mask` on the module), "user" (given by the caller),
            "zeros" (no mask anywhere). Where several masks meet, the last of them in this order.
        transposed: the module stores [in, out] (GPT-2's Conv1D) instead of [out, in/groups, *kernel].
    """

    name: str
    weight: Tensor
    mask: Tensor
    source: Source
    transposed: bool = False

    def by_neuron(self) -> tuple[Tensor, Tensor]:
        """(weight, mask) with the output neurons first: [out, in/groups, *kernel]; views."""
        return (self.weight.t(), self.mask.t()) if self.transposed else (self.weight, self.mask)


def find_masked_weight(
    module: nn.Module, name: str = "weight", mask: Tensor | None = None
) -> MaskedWeight | None:
    """Read the weight `name` of `module` and the mask on it, from wherever the mask is kept.

    Args:
        module: any module that holds the weight itself (not one of its children).
        name: the parameter's plain name, without "_orig" or "parametrizations".
        mask: a further mask of the weight's shape (see check_mask), combined by AND with those of the module.

    Returns:
        None if the module has no such tensor, or none that can be read outside a forward call: an
        uninitialised lazy parameter, or an attribute that a forward pre-hook other than pruning computes.

    Raises:
        MaskError: a mask of another shape or with values other than 0 and 1; a weight without values (device
            meta).
    """
    masks: list[tuple[Source, Tensor]] = []
    if parametrize.is_parametrized(module, name):
        weight = _evaluate_parametrization(module, name)
        masks += _parametrization_masks(module, name, weight)
    elif _is_pruned(module, name):
        # Never module.<name>: it is stale until the hook runs, and MultiheadAttention never runs its
        # out_proj's.
        weight = getattr(module, f"{name}_orig").detach()
        masks.append(("prune", check_mask(getattr(module, f"{name}_mask"), weight)))
    else:
        found = getattr(module, name, None)
        if not isinstance(found, Tensor) or is_lazy(found) or _is_computed_by_hook(module, name):
            return None
        weight = found.detach()
    if weight.is_meta:
        raise MaskError(f"{name} is on the device meta; a weight with values is needed to read its mask")
    if weight.layout != torch.strided:
        weight = weight.to_dense()
    masks += _module_masks(module, name, weight)
    if mask is not None:
        masks.append(("user", check_mask(mask, weight)))

    active = masks[0][1].clone() if masks else weight != 0
    for _, other in masks[1:]:
        active &= other
    # Filled, not multiplied: NaN * 0 is NaN. A clone keeps the memory format, masked_fill does not.
    effective = weight.clone().masked_fill_(~active, 0)
    return MaskedWeight(name, effective, active, masks[-1][0] if masks else "zeros", _is_transposed(module))


def masked_weights(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[str, nn.Module, MaskedWeight]]:
    """Every weight of the model that has output neurons: (module's qualified name, module, weight and mask).

    Covers Linear, Conv1d/2d/3d, MultiheadAttention (its input projections; out_proj is a Linear) and GPT-2's
    Conv1D, with their subclasses. A module with two names comes once. Weights without a mask come too
    ("zeros").

    Args:
        model: left untouched.
        masks: further masks by qualified parameter name ("fc.weight") or, where a module has one weight, by
            module name ("fc"); combined by AND with the model's own.

    Raises:
        MaskError: a key that names no such weight, or the same one twice; as find_masked_weight, naming the
            layer.
    """
    given = _resolve_keys(model, masks or {})
    for path, module in model.named_modules():
        for name in _weight_names(module):
            try:
                found = find_masked_weight(module, name, given.get((module, name)))
            except MaskError as error:
                raise MaskError(f"{_join(path, name)}: {error}") from error
            if found is not None:
                yield path, module, found


def check_mask(mask: Tensor, weight: Tensor) -> Tensor:
    """`mask` as bool on the weight's device; it may be bool, or integers or floats that are all 0 or 1.

    Raises:
        MaskError: another shape than the weight's, a complex dtype, or values other than 0 and 1.
    """
    if mask.shape != weight.shape:
        raise MaskError(
            f"mask has shape {tuple(mask.shape)}, expected that of its weight, {tuple(weight.shape)}"
        )
    if mask.is_complex():
        raise MaskError(f"mask has dtype {mask.dtype}, expected bool, or integers or floats that are 0 or 1")
    if mask.is_meta:
        raise MaskError("mask is on the device meta, expected a mask with values")
    mask = mask.detach().to(weight.device)
    if mask.layout != torch.strided:
        mask = mask.to_dense()
    if mask.dtype == torch.bool:
        return mask
    active = mask == 1
    strange = ~active & (mask != 0)
    if strange.any():
        some = ", ".join(f"{v:g}" for v in mask[strange][:3].tolist())
        raise MaskError(
            f"mask ({mask.dtype}) has {int(strange.sum())} values other than 0 and 1: {some}, ..."
        )
    return active


def has_neurons(module: nn.Module) -> bool:
    """Whether masked_weights reads weights of such a module."""
    return bool(_weight_names(module))


def fan_in(mask: Tensor) -> Tensor:
    """Active inputs of each neuron, int64 [out], for a bool mask [out, in/groups, *kernel]."""
    if mask.ndim < 2:
        raise MaskError(f"mask has shape {tuple(mask.shape)}, expected at least 2 dimensions [out, in, ...]")
    return mask.flatten(1).sum(1, dtype=torch.int32).to(torch.int64)  # sums twice as fast as in int64


def active_rows(mask: Tensor) -> Tensor:
    """Neurons with at least one active input, int64 [n_active]; the weights' values play no part."""
    return fan_in(mask).nonzero().flatten()


def _is_pruned(module: nn.Module, name: str) -> bool:
    return f"{name}_orig" in module._parameters and isinstance(getattr(module, f"{name}_mask", None), Tensor)


def _is_computed_by_hook(module: nn.Module, name: str) -> bool:
    stored = name in module._parameters or name in module._buffers
    return not stored and bool(module._forward_pre_hooks)  # old weight_norm and spectral_norm


def _is_transposed(module: nn.Module) -> bool:
    # By name: transformers is no dependency of ours.
    return hasattr(module, "nf") and any(c.__name__ == "Conv1D" for c in type(module).__mro__)


def _weight_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, nn.MultiheadAttention):
        return _ATTENTION_WEIGHTS
    return ("weight",) if isinstance(module, _LAYERS) or _is_transposed(module) else ()


def _module_masks(module: nn.Module, name: str, weight: Tensor) -> Iterator[tuple[Source, Tensor]]:
    """Masks kept beside the parameter: `<name>_mask`, and plain `mask` if it can multiply the weight."""
    beside = getattr(module, f"{name}_mask", None)
    if isinstance(beside, Tensor) and not _is_pruned(module, name):
        yield "buffer", check_mask(_expand(beside, weight), weight)
    own = getattr(module, "mask", None)
    # Another shape is another kind of mask, an attention mask say.
    if name == "weight" and isinstance(own, Tensor) and _expand(own, weight).shape == weight.shape:
        yield "module", check_mask(_expand(own, weight), weight)


def _expand(mask: Tensor, weight: Tensor) -> Tensor:
    """[out, 1] or [1, in] (whole neurons or inputs) expanded as in `weight * mask`; other masks unchanged."""
    fits = mask.ndim == weight.ndim and all(
        m in (1, w) for m, w in zip(mask.shape, weight.shape, strict=True)
    )
    return mask.expand_as(weight) if fits else mask


def _evaluate_parametrization(module: nn.Module, name: str) -> Tensor:
    with _eval_mode(module), torch.no_grad():  # spectral_norm updates its vectors when read in train mode
        weight: Tensor = getattr(module, name)
    return weight.detach()


def _parametrization_masks(module: nn.Module, name: str, weight: Tensor) -> Iterator[tuple[Source, Tensor]]:
    """Masks of the parametrizations on `name` that the evaluated weight bears out.

    A `mask` that lets values through (inverted, or refilled by a later parametrization) is no mask of the
    fan-in: the evaluated weight is right all the same, and its zeros decide.
    """
    chain = module.parametrizations[name]  # type: ignore[index]
    for step in chain:
        candidate = getattr(step, "mask", None)
        if isinstance(candidate, Tensor) and candidate.shape == weight.shape:
            mask = candidate.detach().to(weight.device) != 0
            if not (~mask & (weight != 0) & weight.isfinite()).any():
                yield "parametrize", mask


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    for m, _ in modes:
        m.training = False
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


def _resolve_keys(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[tuple[nn.Module, str], Tensor]:
    """Masks by (module, parameter name), so that any of a shared module's paths finds it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    given: dict[tuple[nn.Module, str], Tensor] = {}
    unknown = []
    for key, mask in masks.items():
        target = _find_weight(modules, key)
        if target is None:
            unknown.append(key)
        elif target in given:
            raise MaskError(f"masks names the weight {target[1]!r} twice, the second time as {key!r}")
        else:
            given[target] = mask
    if unknown:
        known = [_join(path, name) for path, module in modules.items() for name in _present(module)]
        raise MaskError(f"masks has keys that name no weight of the model: {unknown}; it has {known}")
    return given


def _find_weight(modules: Mapping[str, nn.Module], key: str) -> tuple[nn.Module, str] | None:
    if key in modules and len(names := _present(modules[key])) == 1:
        return modules[key], names[0]
    path, _, name = key.rpartition(".")
    return (modules[path], name) if path in modules and name in _present(modules[path]) else None


def _present(module: nn.Module) -> list[str]:
    return [n for n in _weight_names(module) if isinstance(getattr(module, n, None), Tensor)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
