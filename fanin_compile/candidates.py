"""The layers that `condense(model)` may replace: each with its condensed weight, or why it stays as it is."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from fanin_compile.condensed import CondensedWeight
from fanin_compile.mask import MaskedWeight, find_masked_weight, has_neurons, masked_weights
from fanin_compile.options import VALUES_DTYPES
from fanin_compile.packed import LEAST_BYTES
from fanin_compile.packed_conv import MAX_TAPS
from fanin_compile.packing import pack
from fanin_compile.packing_conv import pack_conv
from fanin_compile.records import Skip

log = logging.getLogger("fanin_compile")

Filter = Callable[[nn.Module, str], bool]
_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "transposed convolutions stay dense",
    nn.ConvTranspose2d: "transposed convolutions stay dense",
    nn.ConvTranspose3d: "transposed convolutions stay dense",
    nn.RNNBase: "stays as it is, one operator of torch holds all its weights",
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class Candidate:
    """A layer condense() looked at: its condensed weight, or the reason to leave it as it is."""

    name: str
    module: nn.Module
    found: MaskedWeight
    weight: CondensedWeight | None
    skip: Skip | None


Holders = Mapping[int, list[tuple[str, nn.Module]]]


def holders_of_parameters(model: nn.Module) -> Holders:
    """The modules that hold each parameter, by its id."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:  # as biases that a module does without
                holders.setdefault(id(parameter), []).append((name, module))
    return holders


def dense_keeper(
    module: nn.Module, name: str, holders: Holders, filter_fn: Filter | None = None
) -> str | None:
    """A module that shares the weight of a layer and has no condensed form itself, as an embedding."""
    for path, other in holders.get(id(stored_parameter(module, name)), ()):
        if other is module:
            continue
        if not has_neurons(other) or isinstance(other, nn.MultiheadAttention):
            return path
        if filter_fn is not None and not filter_fn(other, path):
            return path
    return None


def tied_skip(name: str, keeper: str, nbytes: int, dense: int) -> Skip:
    """Condensed, it would take its bytes on top of the dense weight."""
    values = {"tied to": keeper, "bytes": nbytes + dense, "dense": dense}
    return Skip(name, "would not shrink, another module keeps its dense weight", values)


def candidates(
    model: nn.Module,
    *,
    masks: Mapping[str, Tensor] | None = None,
    filter_fn: Filter | None = None,
    progress: bool = False,
) -> Iterator[Candidate]:
    """Every layer with a weight of neurons, in the model's order, with what condense() would do to it and why not."""
    attention = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    holders = holders_of_parameters(model)
    found = masked_weights(model, masks)
    for name, module, masked in track(list(found), "condensing") if progress else found:
        candidate = _candidate(name, module, masked, filter_fn, module in attention)
        weight = candidate.weight
        # a mask of its own is stored beside the weight, or makes it another one, and takes as much
        if weight is not None and masked.source == "zeros":
            keeper = dense_keeper(module, masked.name, holders, filter_fn)
            if keeper is not None:
                skip = tied_skip(candidate.name, keeper, packed_nbytes(module, weight), weight.dense_nbytes)
                candidate = dataclasses.replace(candidate, weight=None, skip=skip)
        yield candidate


def unsupported(model: nn.Module) -> Iterator[Skip]:
    """Every sparse weight of a kind of layer that has no condensed form, by its name, and why."""
    for path, module in model.named_modules():
        reason = next((r for kind, r in _UNSUPPORTED.items() if isinstance(module, kind)), None)
        if reason is None:
            continue
        names = module._flat_weights_names if isinstance(module, nn.RNNBase) else ("weight",)
        for name in names:
            found = find_masked_weight(module, name)
            if found is None or found.weight.ndim < 2 or bool(found.mask.all()):
                continue
            sparsity = 1 - float(found.mask.sum()) / found.mask.numel()
            values = {"type": type(module).__name__, "sparsity": f"{sparsity:.1%}"}
            yield Skip(_qualified(path, name), reason, values)


def _qualified(path: str, parameter: str) -> str:
    """What the backend calls it: the layer of a `weight`, else the parameter."""
    return path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")


def _candidate(
    path: str, module: nn.Module, masked: MaskedWeight, filter_fn: Filter | None, in_attention: bool
) -> Candidate:
    name = _qualified(path, masked.name)

    def left(reason: str, **values: object) -> Candidate:
        return Candidate(name, module, masked, None, Skip(name, reason, values))

    if bool(masked.mask.all()):
        return left("every weight is active")
    if filter_fn is not None and not filter_fn(module, path):
        return left("excluded by filter_fn")
    if in_attention:
        return left("nn.MultiheadAttention reads its weights past its layers")
    if masked.weight.dtype not in (*VALUES_DTYPES, torch.float64):
        return left("no condensed form for this dtype", dtype=masked.weight.dtype)
    padding_mode = getattr(module, "padding_mode", "zeros")
    if padding_mode != "zeros":
        return left("only zero padding is supported", padding_mode=padding_mode)
    if (padding := getattr(module, "padding", None)) == "same" and _uneven(module):
        return left("'same' padding is uneven", kernel=module.kernel_size, padding=padding)
    weight = CondensedWeight.from_dense(*masked.by_neuron())
    if (taps := math.prod(weight.shape[2:])) > MAX_TAPS:
        return left("its kernel has more taps than codes tell apart", taps=taps, most=MAX_TAPS)
    # packing takes time: it is done only where its bytes decide, at most about thrice the condensed
    nbytes = 3 * weight.nbytes + LEAST_BYTES
    if nbytes >= weight.dense_nbytes and (nbytes := packed_nbytes(module, weight)) >= weight.dense_nbytes:
        return left(
            "would not shrink", sparsity=f"{weight.sparsity:.1%}", bytes=nbytes, dense=weight.dense_nbytes
        )
    if not _computes_plain_layer(module, masked):
        return left("its forward is not that of the plain layer", type=type(module).__qualname__)
    return Candidate(name, module, masked, weight, None)


def packed_nbytes(module: nn.Module, weight: CondensedWeight) -> int:
    """Bytes of the layer that condense() makes of a module, without its bias."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return pack_conv(weight, **geometry(module)).nbytes
    return pack(weight).nbytes


def geometry(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
    """stride, padding in numbers, dilation and groups."""
    padding = conv.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    elif isinstance(padding, str):  # valid
        padding = (0,) * len(conv.kernel_size)
    return {"stride": conv.stride, "padding": padding, "dilation": conv.dilation, "groups": conv.groups}


def _uneven(module: nn.Module) -> bool:
    totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]  # type: ignore[arg-type]
    return any(total % 2 for total in totals)


def _computes_plain_layer(module: nn.Module, masked: MaskedWeight) -> bool:
    """Whether the module's forward is the plain layer's: by type, else on a random input.

    Of its own weight, with or without the masks it carries; it knows nothing of those a caller gives.
    """
    if type(module).forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return True
    bias = effective_bias(module)
    own = find_masked_weight(module, masked.name)
    assert own is not None
    weight = own.weight
    generator = torch.Generator().manual_seed(0)
    spatial = tuple(4 * k for k in weight.shape[2:])
    fan_in = weight.shape[0] if masked.transposed else weight.shape[1] * int(getattr(module, "groups", 1))
    x = torch.randn(2, fan_in, *spatial, generator=generator).to(weight)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _only_pruning_hooks(module):
            got = module.forward(x)
            stored = getattr(module, masked.name).detach()
            plain = [_plain(module, x, w, bias, masked.transposed) for w in (weight, stored)]
    except Exception as error:  # someone else's forward may raise anything on an input it did not expect
        log.info("probing a %s raised %s: %s", type(module).__qualname__, type(error).__name__, error)
        return False
    tolerance = 8 * math.sqrt(max(fan_in, 1)) * torch.finfo(weight.dtype).eps
    return isinstance(got, Tensor) and any(
        got.shape == y.shape and torch.allclose(got, y, tolerance, tolerance) for y in plain
    )


@contextmanager
def _only_pruning_hooks(module: nn.Module) -> Iterator[None]:
    """In eval mode, with the weights that pruning hooks leave on a module, and as it was afterwards.

    The user's own hooks do not run: they are carried over to the condensed layer.
    """
    modes = [(m, m.training) for m in module.modules()]
    attributes = dict(vars(module))
    try:
        for m, _ in modes:
            m.training = False
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod):
                hook(module, ())
        yield
    finally:
        for m, training in modes:
            m.training = training
        vars(module).update(attributes)


def _plain(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    for kind, convolution in _CONVS.items():
        if isinstance(module, kind):
            conv: Any = module
            y: Tensor = convolution(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            return y
    return F.linear(x, weight.t() if transposed else weight, bias)


def effective_bias(module: nn.Module) -> Tensor | None:
    """The bias the forward pass sees (it may be pruned or parametrized, too), trainable as the module's is."""
    found = find_masked_weight(module, "bias")
    trainable = any(p.requires_grad for name, p in module.named_parameters() if "bias" in name)
    return None if found is None else found.weight.requires_grad_(trainable)


def stored_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter behind a weight, plain or pruned; of a parametrized one there is none that is the weight."""
    parameters = module._parameters
    return parameters.get(f"{name}_orig", parameters.get(name))
