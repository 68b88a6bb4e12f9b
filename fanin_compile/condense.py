"""`condense(model)`: a copy of a model whose masked layers hold condensed weights. Explicit, savable, portable."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from fanin_compile.condensed import CondensedWeight, index_dtype
from fanin_compile.errors import FaninError, OptionError
from fanin_compile.export import UNSUPPORTED, export_condensed
from fanin_compile.graph import Gate
from fanin_compile.layers import CondensedConv, CondensedLayer, CondensedLinear
from fanin_compile.liveness import LEAST_SAVING
from fanin_compile.mask import MaskedWeight, find_masked_weight, has_neurons, masked_weights
from fanin_compile.masking import Imposer
from fanin_compile.options import VALUES_DTYPES
from fanin_compile.packed import LEAST_BYTES
from fanin_compile.packed_conv import CODE_BYTES, LEAST_CONV_BYTES, MAX_TAPS
from fanin_compile.packing import pack
from fanin_compile.packing_conv import pack_conv
from fanin_compile.records import Layer, Skip

log = logging.getLogger("fanin_compile")

Filter = Callable[[nn.Module, str], bool]
PLACE_BYTES = 9  # beside its value: where an output comes from, and whether it is active
_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_UNSUPPORTED: dict[type[nn.Module], str] = {
    nn.ConvTranspose1d: "transposed convolutions stay dense",
    nn.ConvTranspose2d: "transposed convolutions stay dense",
    nn.ConvTranspose3d: "transposed convolutions stay dense",
    nn.RNNBase: "stays as it is, one operator of torch holds all its weights",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class Candidate:
    """A layer condense() looked at: its condensed weight, or the reason to leave it as it is."""

    name: str
    module: nn.Module
    found: MaskedWeight
    weight: CondensedWeight | None
    skip: Skip | None


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
    holders = _holders(model)

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
        keeper = _keeper(module, "weight", holders) if module is not None and module not in given else None
        keeper = None if hasattr(module, "weight_orig") else keeper
        active = round(dense * layer.active_share) + layer.shape[0] * (PLACE_BYTES + size)
        if keeper is None and active <= (1 - LEAST_SAVING) * dense and active <= condensed:
            values = {"dense": dense, "active": active, "condensed": condensed}
            return Skip(layer.name, "dense on its active neurons alone is smallest", values, active=True)
        if condensed >= dense:
            return Skip(layer.name, "would not shrink", {"sparsity": f"{layer.sparsity:.1%}"})
        return None if keeper is None else _tied(layer.name, keeper, condensed, dense)

    return gate


_Holders = Mapping[int, list[tuple[str, nn.Module]]]


def _holders(model: nn.Module) -> _Holders:
    """The modules that hold each parameter, by its id."""
    holders: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:  # as biases that a module does without
                holders.setdefault(id(parameter), []).append((name, module))
    return holders


def _keeper(module: nn.Module, name: str, holders: _Holders, filter_fn: Filter | None = None) -> str | None:
    """A module that shares the weight of a layer and has no condensed form itself, as an embedding."""
    for path, other in holders.get(id(_stored(module, name)), ()):
        if other is module:
            continue
        if not has_neurons(other) or isinstance(other, nn.MultiheadAttention):
            return path
        if filter_fn is not None and not filter_fn(other, path):
            return path
    return None


def _tied(name: str, keeper: str, nbytes: int, dense: int) -> Skip:
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
    holders = _holders(model)
    found = masked_weights(model, masks)
    for name, module, masked in track(list(found), "condensing") if progress else found:
        candidate = _candidate(name, module, masked, filter_fn, module in attention)
        weight = candidate.weight
        # a mask of its own is stored beside the weight, or makes it another one, and takes as much
        if weight is not None and masked.source == "zeros":
            keeper = _keeper(module, masked.name, holders, filter_fn)
            if keeper is not None:
                skip = _tied(candidate.name, keeper, packed_nbytes(module, weight), weight.dense_nbytes)
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
        return pack_conv(weight, **_geometry(module)).nbytes
    return pack(weight).nbytes


def _geometry(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> dict[str, Any]:
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
    bias = _bias(module)
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


def _bias(module: nn.Module) -> Tensor | None:
    """The bias the forward pass sees (it may be pruned or parametrized, too), trainable as the module's is."""
    found = find_masked_weight(module, "bias")
    trainable = any(p.requires_grad for name, p in module.named_parameters() if "bias" in name)
    return None if found is None else found.weight.requires_grad_(trainable)


def _condensed_layer(
    candidate: Candidate, values_dtype: torch.dtype | None
) -> CondensedLinear | CondensedConv:
    module, weight = candidate.module, candidate.weight
    assert weight is not None
    if values_dtype is not None:
        weight = dataclasses.replace(weight, values=weight.values.to(values_dtype))
    bias = _bias(module)
    trainable = any(p.requires_grad for name, p in module.named_parameters() if "bias" not in name)
    layer: CondensedLinear | CondensedConv
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer = CondensedConv(
            weight,
            bias,
            **_geometry(module),
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
        dense = _stored(candidate.module, candidate.found.name)
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


def _stored(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter behind a weight, plain or pruned; of a parametrized one there is none that is the weight."""
    parameters = module._parameters
    return parameters.get(f"{name}_orig", parameters.get(name))


def _carry_hooks(module: nn.Module, layer: nn.Module) -> None:
    """Keep what users hung on the layer, without the pruning hooks, whose work is done."""
    for attribute in _HOOKS:
        hooks = getattr(module, attribute)
        kept = type(hooks)((k, h) for k, h in hooks.items() if not isinstance(h, BasePruningMethod))
        setattr(layer, attribute, kept)
    for attribute in _HOOK_FLAGS:
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
