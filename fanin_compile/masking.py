"""Put a mask on a module: what it leaves out is 0 in everything the module computes, for a time or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fanin_compile.mask import MaskedWeight


class Masked(nn.Module):
    """The last step of a parametrized weight: what its mask leaves out is 0, NaN too.

    Args:
        mask: bool, of the weight's shape; True = active.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, 0)


class Imposer:
    """Imposes masks on modules; it remembers what it masked, so that tied weights with equal masks stay tied."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # id of a tensor -> (it, mask, masked)

    def __call__(self, module: nn.Module, found: MaskedWeight) -> ExitStack:
        """Let the mask of `found` decide in `module`, which holds that weight: plain, pruned or parametrized.

        Tensors are exchanged, never written to. Closing what is returned brings the old ones back.
        """
        undo = ExitStack()
        if parametrize.is_parametrized(module, found.name):
            chain: Any = module.parametrizations[found.name]  # type: ignore[index]
            chain.append(Masked(_like(found.weight.bool(), found.mask)))
            undo.callback(chain.pop, -1)
            return undo
        name = found.name
        if f"{name}_orig" in module._parameters:
            pruned = getattr(module, f"{name}_mask")
            _exchange(module, f"{name}_mask", _like(pruned, found.mask), undo)
            if name in vars(module):  # what the hook left, which MultiheadAttention reads of its out_proj
                _exchange(module, name, found.weight, undo)
            name = f"{name}_orig"
        _exchange(module, name, self._masked(getattr(module, name), found), undo)
        return undo

    def _masked(self, old: Tensor, found: MaskedWeight) -> Tensor:
        _, mask, masked = self._made.get(id(old), (None, None, None))
        if mask is None or masked is None or not torch.equal(mask, found.mask):
            masked = found.weight
            if isinstance(old, nn.Parameter):
                masked = nn.Parameter(masked, requires_grad=old.requires_grad)
            self._made[id(old)] = (old, found.mask, masked)
        return masked


def _like(tensor: Tensor, mask: Tensor) -> Tensor:
    """`mask` in the dtype and memory format of `tensor`: a convolution's output follows that of its weight."""
    return torch.empty_like(tensor).copy_(mask)


def _exchange(module: nn.Module, name: str, new: Tensor, undo: ExitStack) -> None:
    stores = (module._parameters, module._buffers, vars(module))
    store: Any = next(store for store in stores if name in store)
    undo.callback(store.__setitem__, name, store[name])
    store[name] = new


@contextlib.contextmanager
def imposed(masked: Iterable[tuple[nn.Module, MaskedWeight]]) -> Iterator[None]:
    """Within the context the masks decide in their modules; afterwards these are as they were."""
    impose = Imposer()
    with ExitStack() as stack:
        for module, found in masked:
            stack.enter_context(impose(module, found))
        yield
