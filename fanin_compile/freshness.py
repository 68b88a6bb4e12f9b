"""Are packed weights still the weights? Checked at every call of a compiled graph, a tenth of a microsecond for each.

What a check sees: another tensor object (load_state_dict(assign=True), `m.weight = ...`), other storage (`.data = t`,
swap_tensors, vector_to_parameters), another dtype, size or stride, a raised version counter (load_state_dict, in-place
ops, unfused optimizers; fused ones too, whose steps we count for them). What only `refresh()` or contents=True sees:
writes through `.data` or numpy.

The states of all tensors are compared by one native call (kernels/freshness_bindings.cpp): between two calls of a
network its tensors' headers leave the core's caches, and a walk over them in Python waits for each in turn.
"""

from __future__ import annotations

import array
import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from fanin_compile.kernels import build

_generation = 0
_MOST_WORDS = 8 + 2 * 64  # of a tensor's state: torch allows for 64 dimensions


def refresh() -> None:
    """Make every compiled graph and its packed weights be checked by content at the next call, by packing them anew.

    Needed only after writes which PyTorch does not count: `p.data.mul_(2)`, `p.numpy()[0] = 1` (on a detached alias).
    """
    global _generation
    _generation += 1


class Watch:
    """The state of the weights at the time they were packed.

    Args:
        positions: which call arguments the packed weights are made of.
        args: the arguments at packing time; the packed ones are held, as torch.utils.swap_tensors refuses tensors
            with weak references.
        witnesses: tensors which change whenever certain watched ones do that nothing counts.
        contents: compare a hash of the contents as well.
    """

    def __init__(
        self,
        positions: Sequence[int],
        args: Sequence[Any],
        *,
        witnesses: Sequence[Tensor] = (),
        contents: bool = False,
    ) -> None:
        self._witnesses, self._contents = tuple(witnesses), contents
        self.renew(positions, args)

    def renew(self, positions: Sequence[int], args: Sequence[Any]) -> None:
        self._generation, self._positions = _generation, tuple(positions)
        self._tensors: list[Tensor] = [args[i] for i in positions]
        # keeps their addresses, but not their memory, from being given to the storages of later tensors
        self._storages = [StorageWeakRef(t.untyped_storage()) for t in self._tensors]
        parts = (self._positions, self._tensors, self._witnesses)
        self._same = _native_check(*parts) or _python_check(*parts)
        self._kinds = [_kind(t) for t in self._tensors]
        self._hashes = [_hash(t) for t in self._tensors] if self._contents else []

    def fresh(self, args: tuple[Any, ...]) -> bool:
        """Whether the packed weights still stand for `args`, as far as can be seen."""
        if self._generation != _generation or not self._same(args):
            return False
        return not self._contents or self._hashes == [_hash(args[i]) for i in self._positions]

    def same_kind(self, args: Sequence[Any]) -> bool:
        """Whether `args` differ from the packed ones by their values at most: same types, dtypes, sizes and strides."""
        return [_kind(args[i]) for i in self._positions] == self._kinds


def _state(tensor: Tensor) -> tuple[object, ...]:
    addresses = id(tensor), tensor._cdata, tensor.untyped_storage()._cdata, tensor.data_ptr()
    return *addresses, tensor._version, _kind(tensor)


def _python_check(
    positions: Sequence[int], tensors: Sequence[Tensor], witnesses: Sequence[Tensor]
) -> Callable[[tuple[Any, ...]], bool]:
    """What _native_check returns, for machines without it."""
    states = [_state(t) for t in (*tensors, *witnesses)]
    return lambda args: [_state(t) for t in (*(args[i] for i in positions), *witnesses)] == states


def _kind(tensor: Tensor) -> tuple[object, ...]:
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return type(tensor), keys, tensor.dtype, tensor.shape, tensor.stride()


def _native_check(
    positions: Sequence[int], tensors: Sequence[Tensor], witnesses: Sequence[Tensor]
) -> Callable[[tuple[Any, ...]], bool] | None:
    """A function that tells whether the tensors at these positions of its argument, and the witnesses, are as they are
    now; None without the kernels, or where torch lays out its objects in another way than they expect."""
    library = build.python_library()
    if library is None:
        return None
    buffer = (ctypes.c_int64 * _MOST_WORDS)()
    words = array.array("q")
    for place, tensor in zip((*positions, *(-1 for _ in witnesses)), (*tensors, *witnesses), strict=True):
        count = library.fanin_state(tensor, tensor._cdata, buffer, _MOST_WORDS)
        if count == 0:
            return None
        words.extend((place, id(tensor), *buffer[:count]))
    address, count = words.buffer_info()
    unchanged = library.fanin_unchanged

    def same(args: tuple[Any, ...], kept: object = words) -> bool:
        return bool(unchanged(args, address, count))

    return same


def _hash(tensor: Tensor) -> bytes:
    # not torch.hash_tensor: its xor misses reordered values, and a flipped sign of all of them
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).digest()


@functools.cache
def watch_fused_optimizers() -> None:
    """Count the steps of fused optimizers on the version counters of their parameters, as unfused ones do."""

    def count(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            if group.get("fused"):
                torch.autograd.graph.increment_version(group["params"])

    register_optimizer_step_post_hook(count)
