"""The weights that can be sparse, each seen as a matrix [neurons, dense fan-in].

The mask of a Parameter ``weight`` is a bool buffer ``weight_mask`` of the same shape on the module that owns
the Parameter, so it follows state_dict, deepcopy, torch.save and .to(), and is what the compiler reads.
The Parameter keeps its name and its place and is exactly 0 off the mask: no forward overhead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import Parameter, UninitializedParameter

from fanin_compile.errors import FaninError, MaskError, OptionError
from fanin_compile.train.shards import gather, local, local_part

MhaBlocks = Literal["matrix", "projection", "head"]
_ROW_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class SparseLayer:
    """One Parameter that can be sparse.

    ``owners``: every (module, attribute) that holds it, more than one when weights are tied. ``transposed``:
    stored as [inputs, neurons] (GPT-2's Conv1D). ``blocks``: equal groups of rows, ranked and given their
    budget one by one (the heads of an attention projection).
    """

    name: str
    param: Parameter
    owners: list[tuple[nn.Module, str]]
    tied_names: list[str]
    transposed: bool = False
    blocks: int = 1
    budgets: tuple[int, ...] = ()  # active weights that each block may hold
    ablate: bool = False
    gradient: Tensor | None = None  # dense, of the optimizer step in progress; this rank's part
    earlier: Tensor | None = None  # dense, summed over the earlier steps of the window
    explored: Tensor | None = None  # bool: ever active (in-time over-parameterisation)
    _removed: Tensor | None = field(default=None, repr=False)  # the mask, when its buffer is gone
    _multiplier: Tensor | None = field(default=None, repr=False)
    _multiplier_of: tuple[Tensor | None, int] = field(default=(None, 0), repr=False)

    @property
    def module(self) -> nn.Module:
        return self.owners[0][0]

    @property
    def neurons(self) -> int:
        return self.param.shape[1 if self.transposed else 0]

    @property
    def dense_fan_in(self) -> int:
        return self.param.shape.numel() // self.neurons

    @property
    def block_neurons(self) -> int:
        return self.neurons // self.blocks

    @property
    def mask_name(self) -> str:
        return f"{self.owners[0][1]}_mask"

    def _buffer(self) -> Tensor | None:
        """The mask of the first owner that has one."""
        found = (module._buffers.get(f"{attribute}_mask") for module, attribute in self.owners)
        return next((mask for mask in found if mask is not None), None)

    @property
    def has_mask(self) -> bool:
        return self._buffer() is not None

    @property
    def mask(self) -> Tensor:
        """The bool buffer, of the Parameter's whole shape on every rank; once removed, what it was."""
        mask = self._buffer() if self._removed is None else self._removed
        if mask is None or mask.dtype != torch.bool or mask.shape != self.param.shape:
            found = "none" if mask is None else f"{mask.dtype} of shape {tuple(mask.shape)}"
            wanted = f"a bool buffer {self.mask_name!r} of shape {tuple(self.param.shape)}"
            raise MaskError(f"{self.name}: expected {wanted}; found {found}")
        return mask

    def set_mask(self, rows: Tensor) -> None:
        """Write bool [neurons, dense fan-in] into the buffer, registering it where there is none."""
        full = (rows.t() if self.transposed else rows).reshape(self.param.shape)
        mask = self.mask.copy_(full) if self.has_mask else full.to(self.param.device, copy=True).contiguous()
        for module, attribute in self.owners:
            other = module._buffers.get(f"{attribute}_mask")
            if other is None:
                module.register_buffer(f"{attribute}_mask", mask)
            elif other is not mask:  # .to(memory_format=...) or another device gave each owner a copy
                other.copy_(full)

    def remove_mask(self) -> None:
        self._removed = self.mask
        for module, attribute in self.owners:
            delattr(module, f"{attribute}_mask")

    def names(self) -> Iterator[tuple[nn.Module, str]]:
        """(module, fully qualified name) of the weight under each module that it is tied to."""
        return zip((module for module, _ in self.owners), self.tied_names, strict=True)

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of the Parameter's shape as [neurons, dense fan-in]."""
        return tensor.t() if self.transposed else tensor.flatten(1)

    def counts(self, rows: Tensor) -> tuple[int, ...]:
        """Active weights of each block of a mask, bool [neurons, dense fan-in]."""
        return tuple(int(block.sum()) for block in rows.chunk(self.blocks))

    def weight_rows(self) -> Tensor:
        """The whole weight, [neurons, dense fan-in], on every rank."""
        return self.rows(gather(local(self.param.detach()), self.param))

    def set_weight(self, rows: Tensor) -> None:
        """Write the whole weight, [neurons, dense fan-in], keeping this rank's part."""
        full = (rows.t() if self.transposed else rows).reshape(self.param.shape)
        local(self.param.detach()).copy_(local_part(full, self.param))

    def multiplier(self) -> Tensor:
        """The mask as 0 and 1 in the Parameter's dtype, this rank's part: on a CPU, multiplying by it is 6 x
        faster than by bools. Made again when the buffer was written to or replaced, from its bytes, which
        convert 6 x faster than bools do."""
        mask = self.mask
        cached = self._multiplier
        source, version = self._multiplier_of
        stale = source is not mask or version != mask._version
        if cached is None or stale or cached.dtype != self.param.dtype:
            cached = self._multiplier = local_part(mask, self.param).view(torch.uint8).to(self.param.dtype)
            self._multiplier_of = (mask, mask._version)
        return cached

    def zero_inactive(self, tensor: Tensor, value: float = 0.0) -> None:
        """Set ``tensor``, finite and laid out as the Parameter, of any dtype, to ``value`` off the mask, in place."""
        if value or not tensor.is_floating_point():
            local(tensor).masked_fill_(local_part(~self.mask, self.param), value)
        else:
            local(tensor).mul_(self.multiplier())  # 10 x faster on a CPU

    def check_in_place(self) -> None:
        """Raise FaninError when the model holds another Parameter than the one that is trained."""
        for module, attribute in self.owners:
            now = module._parameters.get(attribute)
            # between a forward and a backward FSDP2 shows the whole weight where the sharded one belongs
            whole = isinstance(self.param, DTensor) and now is not None and not isinstance(now, DTensor)
            if now is not self.param and not whole:
                raise FaninError(
                    f"{self.name}: the model holds another Parameter than the one that is trained sparse; expected "
                    "the same: start sparse training after fully_shard, after a load_state_dict(assign=True), and "
                    "after whatever else replaces weights"
                )

    def check_zeros(self) -> None:
        """Raise MaskError when this rank's part of the weight is not 0 off the mask, or NaN."""
        weight = local(self.param.detach())
        if not weight.numel() or not any((weight * self.multiplier()).sub_(weight).aminmax()):
            return
        count = int((weight * self.multiplier() != weight).sum())
        if count:  # none where an active weight is infinite
            raise MaskError(
                f"{self.name}: {count} weights off the mask are not 0 (or are NaN); expected none: something "
                "other than the optimizer wrote them, or their gradient was set without backward()"
            )

    def describe(self) -> str:
        """Living neurons and their inputs, in words."""
        fan_ins = self.rows(self.mask).sum(dim=1)
        alive = int(torch.count_nonzero(fan_ins))
        inputs = f"{int(fan_ins.sum()) / max(alive, 1):g} of {self.dense_fan_in} inputs"
        return f"{alive} of {self.neurons} neurons with {inputs}"

    def release(self) -> None:
        """Forget everything that only training needs; what was explored stays, to be reported."""
        self.gradient = self.earlier = self._multiplier = None
        self._multiplier_of = (None, 0)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and torch.compile wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def sparse_attributes(module: nn.Module) -> Iterator[tuple[str, bool, int, int]]:
    """(attribute, transposed, projections, heads) of each weight of ``module`` that can be sparse."""
    if isinstance(module, _ROW_LAYERS):
        yield "weight", False, 1, 1
    elif isinstance(module, nn.MultiheadAttention):
        yield "in_proj_weight", False, 3, module.num_heads
        for attribute in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):  # where kdim or vdim differ
            yield attribute, False, 1, module.num_heads
    elif type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        yield "weight", True, 1, 1


def find_layers(
    model: nn.Module, mha_blocks: MhaBlocks = "matrix"
) -> tuple[list[SparseLayer], dict[str, str]]:
    """Every weight of ``model`` that can be sparse, in the order of its modules; and the name of each weight of such
    a module that cannot, with the reason."""
    if mha_blocks not in ("matrix", "projection", "head"):
        raise OptionError(f"mha_blocks is {mha_blocks!r}; expected 'matrix', 'projection' or 'head'")
    layers: dict[Parameter, SparseLayer] = {}
    dense: dict[str, str] = {}
    tied_elsewhere: set[Parameter] = set()
    for module_name, module in model.named_modules():
        here: set[str] = set()
        for attribute, transposed, projections, heads in sparse_attributes(module):
            here.add(attribute)
            name = f"{module_name}.{attribute}" if module_name else attribute
            if attribute not in module._parameters:
                dense[name] = "computed from other parameters"  # a parametrization, torch.nn.utils.prune
                continue
            param = module._parameters[attribute]
            if param is None:
                continue
            if not param.requires_grad:
                dense[name] = "frozen"
            elif isinstance(param, UninitializedParameter):
                raise OptionError(
                    f"{name} has no shape yet; run the lazy module once before making it sparse"
                )
            elif param in layers:
                layers[param].owners.append((module, attribute))
                layers[param].tied_names.append(name)
            else:
                blocks = {"matrix": 1, "projection": projections, "head": projections * heads}[mha_blocks]
                layers[param] = SparseLayer(name, param, [(module, attribute)], [name], transposed, blocks)
        tied_elsewhere.update(p for a, p in module._parameters.items() if p is not None and a not in here)
    for param in [param for param in layers if param in tied_elsewhere]:
        dense[layers.pop(param).name] = "tied to a weight that is always dense"  # an embedding
    return list(layers.values()), dense
