"""Reports: a row for each layer, totals, what was left and why; printed, or as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class LayerReport:
    """One row. Bytes are those of the weight; multiply-adds those of one call with the inputs given to explain().

    Attributes:
        fan_in: least and most inputs of an active neuron.
        macs_before, macs_after: None where they depend on inputs that were not given.
        became: "gather-matmul", "gather-conv" (with "layer norm +" before and "+ relu" and the like behind if fused,
            and the layer it is chained into or onto), "dense", "dense, narrowed" to the neurons that are active and
            read, or "dense, active neurons only" where ablated ones stay in the output.
        reason: why a layer was left dense, with the values that decided it.
        changes: what else was done to the layer (neurons removed, constants folded), and what was refused.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    fan_in: tuple[int, int]
    sparsity: float
    ablated: int
    bytes_before: int
    bytes_after: int
    macs_before: int | None
    macs_after: int | None
    became: str
    reason: str = ""
    changes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> bool:
        return not self.became.startswith("dense")


@dataclass(frozen=True)
class Report:
    """What explain() returns; print it, or take to_dict() / to_json()."""

    title: str
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.rewritten)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if not layer.rewritten)

    def totals(self) -> dict[str, int | None]:
        """Sums over all layers; multiply-adds are None unless every layer's are known."""
        sums: dict[str, int | None] = {}
        for field in ("bytes_before", "bytes_after", "macs_before", "macs_after"):
            numbers = [getattr(layer, field) for layer in self.layers]
            sums[field] = None if None in numbers else sum(numbers)
        return sums

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "totals": self.totals()}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        lines = [self.title]
        if self.layers:
            headers = [
                "layer",
                "op",
                "shape",
                "fan-in",
                "sparsity",
                "ablated",
                "bytes",
                "multiply-adds",
                "became",
            ]
            align = ("left", "left", "left", "right", "right", "right", "right", "right", "left")
            rows = [_row(layer) for layer in self.layers] + [_total_row(self)]
            lines.append(tabulate(rows, headers, tablefmt="simple", colalign=align, disable_numparse=True))
        else:
            lines.append("no linear or convolution layer found")
        lines += [f"left dense: {layer.name or '(the model)'}: {layer.reason}" for layer in self.left]
        lines += [
            f"{layer.name or '(the model)'}: {change}" for layer in self.layers for change in layer.changes
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _row(layer: LayerReport) -> list[str]:
    low, high = layer.fan_in
    return [
        layer.name or "(the model)",
        layer.op,
        "x".join(map(str, layer.shape)),
        str(low) if low == high else f"{low}..{high}",
        f"{layer.sparsity:.1%}",
        str(layer.ablated),
        f"{_quantity(layer.bytes_before)}B -> {_quantity(layer.bytes_after)}B",
        f"{_quantity(layer.macs_before)} -> {_quantity(layer.macs_after)}",
        layer.became,
    ]


def _total_row(report: Report) -> list[str]:
    totals = report.totals()
    return [
        f"{len(report.rewritten)} of {len(report.layers)} layers",
        *[""] * 5,
        f"{_quantity(totals['bytes_before'])}B -> {_quantity(totals['bytes_after'])}B",
        f"{_quantity(totals['macs_before'])} -> {_quantity(totals['macs_after'])}",
        "",
    ]


def _quantity(number: int | None) -> str:
    """1234567 -> 1.23 M (decimal prefixes)."""
    if number is None:
        return "?"
    value, prefixes = float(number), ["", "k", "M", "G", "T"]
    while abs(value) >= 1000 and len(prefixes) > 1:
        value /= 1000
        prefixes.pop(0)
    return f"{number} " if prefixes[0] == "" else f"{value:.3g} {prefixes[0]}"
