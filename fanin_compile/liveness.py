"""Which neurons are read, directly or for others that are: what is left of a graph's labels when nobody needs the rest.

A neuron is live if it is pinned, or if a live neuron reads it; whoever shares a tie with a live one is live. From the
outputs backwards this grows to a fixpoint. Then what is dead is given up only where the tensors stay rectangular and
dense layers gain: heads keep equally many neurons each, and one at least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import networkx as nx
import torch
from torch import Tensor, fx

from fanin_compile.axes import Spread
from fanin_compile.evaluator import Evaluator
from fanin_compile.graph import CONDENSED
from fanin_compile.labels import label_neurons
from fanin_compile.neurons import Balance, Labels

LEAST_SAVING = 1 / 8  # of a dense layer's multiply-adds: a copy of its weight must be worth it


@dataclass(frozen=True)
class Neurons:
    """The neurons of a graph and which of them are kept.

    Attributes:
        labels: see there.
        live: bool [labels.count].
        why: of labels that are kept though no layer reads them, or must read them as constants were lost.
    """

    labels: Labels
    live: Tensor
    why: Mapping[int, str]

    def kept(self, node: fx.Node) -> Spread | None:
        """Which elements of a node's tensor are kept, bool; None if it has no labels."""
        spread = self.labels.spreads.get(node)
        return None if spread is None else spread.with_data(self.live[spread.data])

    def narrows(self, node: object) -> bool:
        spread = self.labels.spreads.get(node) if isinstance(node, fx.Node) else None
        return spread is not None and not bool(self.live[spread.data].all())


def live_neurons(graph: fx.Graph, evaluate: Evaluator) -> Neurons:
    """Label the neurons of `graph` and find those that must stay."""
    labels = label_neurons(graph, evaluate)
    return _Fixpoint(labels).neurons()


class _Fixpoint:
    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._class = _classes(labels)
        self._live = torch.zeros(labels.count, dtype=torch.bool)  # of classes, by the label that names them
        self._why: dict[int, str] = {}
        self._balances = [replace(b, rows=self._class[b.rows]) for b in labels.balanced]
        for data in {id(spread.data): spread.data for spread in labels.spreads.values()}.values():
            rows = self._class[data.reshape(-1, _inner(data))]
            self._balances.append(Balance(rows, 1, "its tensors must stay rectangular"))

    def neurons(self) -> Neurons:
        for pinned, reason in self._labels.pins:
            self._keep(self._class[pinned], reason)
        while True:
            before = int(self._live.sum())
            self._read()
            self._balance()
            if int(self._live.sum()) == before:
                self._spare_dense()
            if int(self._live.sum()) == before:
                break
        lost = {label: reason for labels, reason in self._labels.lost for label in labels.tolist()}
        names = self._class.tolist()
        why = lost | {label: self._why[name] for label, name in enumerate(names) if name in self._why}
        return Neurons(self._labels, self._live[self._class], why)

    def _keep(self, classes: Tensor, reason: str) -> None:
        for name in classes[~self._live[classes]].unique().tolist():
            self._why[name] = reason
        self._live[classes] = True

    def _read(self) -> None:
        """To a fixpoint: ties lead back to layers that were visited before."""
        while True:
            before = int(self._live.sum())
            for read in reversed(self._labels.reads):
                mask = read.mask()
                if read.rows is not None:
                    mask = mask & self._live[self._class[read.rows]].unsqueeze(2)
                columns = self._class[read.columns]
                self._live[columns[mask.any(1).expand_as(columns)]] = True
            if int(self._live.sum()) == before:
                return

    def _balance(self) -> None:
        for balance in self._balances:
            rows = balance.rows
            counts = self._live[rows].sum(1)
            wanted = max(int(counts.max()), balance.least)
            for i in (counts < wanted).nonzero().flatten().tolist():
                dead = rows[i][~self._live[rows[i]]]
                self._keep(dead[: wanted - int(counts[i])], balance.reason)

    def _spare_dense(self) -> None:
        for node, layer in self._labels.layers.items():
            if CONDENSED in node.meta:
                continue
            sides = [side for side in (layer.columns, layer.rows) if side is not None]
            sides = sides[:1] if layer.rows is layer.columns else sides  # depthwise
            kept = [self._live[self._class[side]] for side in sides]
            saved = 1.0
            for side in kept:
                saved *= float(side.float().mean())
            if 0 < 1 - saved < LEAST_SAVING:
                reason = f"{node.name} is dense and would save {1 - saved:.0%} of its multiply-adds"
                for side in sides:
                    self._keep(self._class[side], reason)


def _classes(labels: Labels) -> Tensor:
    """[count]: for each label the least of those it is tied to."""
    ties = nx.Graph()
    for a, b in labels.ties:
        ties.add_edges_from(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
    names = torch.arange(labels.count)
    for tied in nx.connected_components(ties):
        names[list(tied)] = min(tied)
    return names


def _inner(data: Tensor) -> int:
    """The size of the innermost axis along which labels differ."""
    return next((size for size in reversed(data.shape) if size != 1), 1)
