"""What is known of the neurons of a graph: the records that labelling fills and liveness reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fanin_compile.axes import Spread


@dataclass(frozen=True)
class Reads:
    """Neurons that are read for the sake of others: `columns[g, i]` while any `rows[g, o]` with mask[g, o, i] is.

    Attributes:
        columns: labels [G, i].
        rows: labels [G, o]; None: always.
        mask: gives bool [G, o, i], or what broadcasts to it.
    """

    columns: Tensor
    rows: Tensor | None
    mask: Callable[[], Tensor]


@dataclass(frozen=True)
class LayerLabels:
    """The labels of a layer's inputs [in], if they have some, and of its outputs [out].

    `constants` are of a dense layer's inputs [in], NaN where unknown: those that go are added to its bias.
    """

    columns: Tensor | None
    rows: Tensor
    constants: Tensor | None = None


@dataclass(frozen=True)
class Balance:
    """Labels [r, n] of which each row must keep as many, and `least` at least."""

    rows: Tensor
    least: int
    reason: str


@dataclass
class Labels:
    """What is known of the neurons of a graph, numbered from 0.

    Attributes:
        spreads: the label of each element of a node's tensor. Where neurons go, it becomes shorter along the innermost
            axis along which labels vary; along the others it stays.
        layers: the layers, dense ones too.
        ties: pairs of tensors of labels, those at the same place standing for one decision.
        pins: labels that stay, and why.
        balanced: what must keep as many.
        lost: labels of constants that nothing is known of any more from some node on, and why.
    """

    spreads: dict[fx.Node, Spread] = field(default_factory=dict)
    layers: dict[fx.Node, LayerLabels] = field(default_factory=dict)
    reads: list[Reads] = field(default_factory=list)
    ties: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    balanced: list[Balance] = field(default_factory=list)
    lost: list[tuple[Tensor, str]] = field(default_factory=list)
    count: int = 0

    def new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)
