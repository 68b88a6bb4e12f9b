"""What is said about a layer: the facts it was found with, what was done to it, why it was left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Layer:
    """One masked layer as found in a graph; sizes in bytes, work in multiply-adds of one call."""

    name: str  # fully qualified module name where known, else the node's
    op: str  # "linear", "conv2d", ...
    shape: tuple[int, ...]  # of the dense weight: [out, in/groups, *kernel]
    fan_in: tuple[int, int]  # least and most inputs of an active neuron
    nnz: int
    ablated: int  # neurons with an empty mask
    dense_bytes: int  # 0 for a further use of a weight already counted
    dense_macs: int
    batch: int  # output positions: leading dimensions of a linear's output, images times pixels of a convolution's
    groups: int = 1

    @property
    def sparsity(self) -> float:
        size = self.dense_size
        return 1.0 - self.nnz / size if size else 0.0

    @property
    def dense_size(self) -> int:
        return math.prod(self.shape)

    def with_weight(self, shape: tuple[int, ...], nnz: int, ablated: int) -> Layer:
        """The layer after a pass gave it another weight; what it was found with stays in the pass's result."""
        macs = self.batch * math.prod(shape)
        return replace(self, shape=shape, nnz=nnz, ablated=ablated, dense_macs=macs)

    @property
    def active_share(self) -> float:
        """Of the dense work, what is left if only active neurons are computed; 1 where that has no form of its own."""
        if self.groups > 1 or self.ablated == self.shape[0]:
            return 1.0
        return 1.0 - self.ablated / self.shape[0]

    @property
    def sparse_macs(self) -> int:
        return self.dense_macs * self.nnz // self.dense_size if self.dense_size else 0


@dataclass(frozen=True)
class Rewrite:
    """One thing a pass did to a layer."""

    layer: str
    became: str
    bytes: int | None = None  # of the constants which replace the dense weight; None: it was not replaced
    macs: int | None = None  # multiply-adds of one call from then on; None with bytes
    detail: str = ""
    stored: int | None = None  # bytes from then on, if a later pass stores its weight anew


@dataclass(frozen=True)
class Skip:
    """One thing a pass refused, with the values which decided it."""

    layer: str
    reason: str
    values: Mapping[str, object] = field(default_factory=dict)
    active: bool = False  # of a layer to be left dense: computing its active neurons alone pays

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value}" for name, value in self.values.items())
        return f"{self.reason} ({values})" if values else self.reason


def left_dense(layer: str, how: str, us: Mapping[str, float], *, active: bool, **values: object) -> Skip:
    """Of a layer that would only lose: `how` its microseconds by form, "dense", "active", "condensed", were found.

    Args:
        active: of its dense forms, the active neurons alone are the faster.
        values: what else decided it.
    """
    form = "dense on its active neurons alone" if active else "dense"
    times = {name: f"{time:.0f} us" for name, time in us.items()}
    return Skip(layer, f"{form} {how} to be faster", values | times, active=active)
