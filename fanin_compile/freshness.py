"""Are packed weights still the weights? Checked at every call of a compiled graph, in fractions of a microsecond each.

What a check sees: another tensor object (load_state_dict(assign=True), `m.weight = ...`), other storage (`.data = t`,
swap_tensors, vector_to_parameters), a raised version counter (load_state_dict, in-place ops, unfused optimizers; fused
ones too, whose steps we count for them). What only `refresh()` or contents=True sees: writes through `.data` or numpy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_generation = 0


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
        self._witnesses, self._contents = witnesses, contents
        self.renew(positions, args)

    def renew(self, positions: Sequence[int], args: Sequence[Any]) -> None:
        self._generation = _generation
        tensors: list[Tensor] = [args[i] for i in positions]
        self._seen = [(i, t, t._version, t.data_ptr()) for i, t in zip(positions, tensors, strict=True)]
        self._testimony = [(t, t._version) for t in self._witnesses]
        self._hashes = [_hash(t) for t in tensors] if self._contents else []

    def fresh(self, args: Sequence[Any]) -> bool:
        """Whether the packed weights still stand for `args`, as far as can be seen."""
        if self._generation != _generation:
            return False
        for i, seen, version, pointer in self._seen:
            tensor = args[i]
            if seen is not tensor or seen._version != version or seen.data_ptr() != pointer:
                return False
        if any(witness._version != version for witness, version in self._testimony):
            return False
        return not self._contents or self._hashes == [_hash(args[i]) for i, *_ in self._seen]


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
