"""What sparse training did over time: fan-in, ablation, exploration and arithmetic, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tabulate import tabulate
from torch import Tensor

from fanin_compile.errors import FaninError, OptionError
from fanin_compile.train.base import SparseTraining
from fanin_compile.train.layers import SparseLayer, find_layers
from fanin_compile.train.positions import positions_per_example


class ScalarWriter(Protocol):
    """What is needed of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


@dataclass(frozen=True)
class LayerState:
    """One layer at one step.

    ``fan_in`` is the mean over living neurons (the constant k, but for unstructured methods and blocks);
    ``explored`` the share of its weights that were ever active (in-time over-parameterisation rate, Liu et al.
    2021); multiply-adds are for one example, ``training_macs`` of forward and backward together.
    """

    name: str
    neurons: int
    dense_fan_in: int
    fan_in: float
    ablated: int
    active: int
    explored: float
    inference_macs: float | None
    training_macs: float | None


@dataclass(frozen=True)
class Snapshot:
    """All sparse layers at one step, and the metrics that the user gave.

    ``inference_macs`` and ``training_macs`` are the whole model's, for one example: of every layer that could be
    sparse, those left dense included, of which training takes three times inference's. None without example inputs.
    """

    step: int
    metrics: Mapping[str, float]
    layers: tuple[LayerState, ...]
    inference_macs: float | None = None
    training_macs: float | None = None

    @property
    def sparsity(self) -> float:
        weights = sum(layer.neurons * layer.dense_fan_in for layer in self.layers)
        return 1.0 - sum(layer.active for layer in self.layers) / weights

    @property
    def ablated(self) -> float:
        """Share of the sparse layers' neurons."""
        return sum(layer.ablated for layer in self.layers) / sum(layer.neurons for layer in self.layers)

    @property
    def explored(self) -> float:
        weights = [layer.neurons * layer.dense_fan_in for layer in self.layers]
        ever = sum(layer.explored * count for layer, count in zip(self.layers, weights, strict=True))
        return ever / sum(weights)


class TrainingReport:
    """Records a SparseTraining when asked to: ``record()`` after a step, as often as is wanted.

    Args:
        sparse: the training to watch.
        example_inputs: a batch to run the model on once, to count multiply-adds; without it there are none.
        writer: a TensorBoard SummaryWriter, or anything with its add_scalar.
    """

    def __init__(
        self,
        sparse: SparseTraining,
        example_inputs: Sequence[Tensor] | None = None,
        writer: ScalarWriter | None = None,
    ) -> None:
        self._sparse = sparse
        self._writer = writer
        self._positions: dict[str, float] = {}
        self._dense_macs: float | None = None
        if example_inputs is not None:
            everything, _ = find_layers(sparse.model)
            self._positions = positions_per_example(sparse.model, everything, example_inputs)
            self._dense_macs = sum(
                layer.param.numel() * self._positions.get(layer.name, 0.0) for layer in everything
            )
        self.history: list[Snapshot] = []

    def record(self, **metrics: float) -> Snapshot:
        """Add the state of now, with metrics such as ``accuracy=0.98``, to the history."""
        if self.history and self.history[-1].step > self._sparse.steps:
            raise OptionError(
                f"step {self._sparse.steps} after step {self.history[-1].step}; expected a later one"
            )
        layers = tuple(self._state(layer) for layer in self._sparse.layers)
        inference = training = None
        if self._dense_macs is not None:
            left_dense = self._dense_macs - sum(
                layer.param.numel() * self._positions.get(layer.name, 0.0) for layer in self._sparse.layers
            )
            inference = left_dense + sum(layer.inference_macs or 0.0 for layer in layers)
            training = 3 * left_dense + sum(layer.training_macs or 0.0 for layer in layers)
        snapshot = Snapshot(self._sparse.steps, metrics, layers, inference, training)
        self.history.append(snapshot)
        if self._writer is not None:
            for tag, value in _scalars(snapshot).items():
                self._writer.add_scalar(tag, value, snapshot.step)
        return snapshot

    def _state(self, layer: SparseLayer) -> LayerState:
        rows = layer.rows(layer.mask).sum(dim=1)
        active, alive = int(rows.sum()), int(torch.count_nonzero(rows))
        explored = layer.mask if layer.explored is None else layer.explored
        positions = self._positions.get(layer.name)
        inference = training = None
        if positions is not None:
            inference = active * positions
            # Forward, gradient of the input, gradient of the weight; the last is dense in a window before updates.
            dense_share = self._sparse.dense_gradient_share
            training = 3 * inference + dense_share * (layer.param.numel() - active) * positions
        return LayerState(
            name=layer.name,
            neurons=layer.neurons,
            dense_fan_in=layer.dense_fan_in,
            fan_in=active / max(alive, 1),
            ablated=layer.neurons - alive,
            active=active,
            explored=int(torch.count_nonzero(explored)) / layer.param.numel(),
            inference_macs=inference,
            training_macs=training,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": type(self._sparse).__name__,
            "dense": dict(self._sparse.plan.dense),
            "dense_macs": self._dense_macs,
            "history": [asdict(snapshot) for snapshot in self.history],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        """The layers as last recorded, and what became of the whole since the first record."""
        if not self.history:
            return "nothing recorded yet"
        last = self.history[-1]
        rows = [
            [
                layer.name,
                f"{layer.neurons} x {layer.dense_fan_in}",
                f"{layer.fan_in:g}",
                f"{1 - layer.active / (layer.neurons * layer.dense_fan_in):.1%}",
                layer.ablated,
                f"{layer.explored:.1%}",
                "" if layer.inference_macs is None else f"{layer.inference_macs:,.0f}",
                "" if layer.training_macs is None else f"{layer.training_macs:,.0f}",
            ]
            for layer in last.layers
        ]
        rows += [[name, reason, *[""] * 6] for name, reason in self._sparse.plan.dense.items()]
        head = ["layer", "shape", "fan-in", "sparsity", "ablated", "explored", "MAC", "MAC training"]
        width = len(head) if self._positions else len(head) - 2
        metrics = "".join(f", {name} {value:.4g}" for name, value in last.metrics.items())
        stage = ", finalized" if self._sparse.finalized else ""
        whole = (
            f"step {last.step}{stage}: sparsity {last.sparsity:.2%}, {last.ablated:.1%} of neurons ablated, "
        )
        whole += f"{last.explored:.1%} of weights explored"
        if self._dense_macs and last.inference_macs is not None and last.training_macs is not None:
            inference, training = last.inference_macs, last.training_macs / 3
            whole += f", multiply-adds {inference / self._dense_macs:.1%} of dense"
            whole += f", {training / self._dense_macs:.1%} in training"
        whole += metrics
        layers: str = tabulate(
            [row[:width] for row in rows], head[:width], colalign=["left", "left", *["right"] * (width - 2)]
        )
        return f"{layers}\n{whole}"

    def plot(self, path: str | Path) -> None:
        """Sparsity, ablation, exploration and the metrics over steps, into an image file (needs matplotlib)."""
        if not self.history:
            raise FaninError("nothing to plot: record() was never called")
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise FaninError("plot() needs matplotlib: pip install 'fanin-compile[plot]'") from error
        steps = [snapshot.step for snapshot in self.history]
        names = list(dict.fromkeys(name for snapshot in self.history for name in snapshot.metrics))
        figure = Figure(figsize=(7, 2.2 * (2 + bool(names))), layout="constrained")
        axes = list(figure.subplots(2 + bool(names), 1, sharex=True))
        for share in ("sparsity", "ablated", "explored"):
            axes[0].plot(steps, [getattr(snapshot, share) for snapshot in self.history], label=share)
        axes[0].set(ylabel="share of the whole", ylim=(0, 1))
        for index, layer in enumerate(self.history[-1].layers):
            axes[1].plot(
                steps, [snapshot.layers[index].fan_in for snapshot in self.history], label=layer.name
            )
        axes[1].set(ylabel="fan-in", yscale="log")
        for name in names:
            given = [(s.step, s.metrics[name]) for s in self.history if name in s.metrics]
            axes[2].plot(*zip(*given, strict=True), label=name, marker=".")
        axes[-1].set(xlabel="step")
        for axis in axes:
            axis.legend(fontsize="small")
        figure.savefig(path, dpi=150)


def _scalars(snapshot: Snapshot) -> dict[str, float]:
    """TensorBoard tags, grouped so that layers share a chart section."""
    scalars = {f"sparse/{name}": getattr(snapshot, name) for name in ("sparsity", "ablated", "explored")}
    for name in ("inference", "training"):
        if (macs := getattr(snapshot, f"{name}_macs")) is not None:
            scalars[f"macs/{name}"] = macs
    for layer in snapshot.layers:
        scalars[f"fan_in/{layer.name}"] = layer.fan_in
        scalars[f"ablated/{layer.name}"] = layer.ablated
        scalars[f"explored/{layer.name}"] = layer.explored
    return scalars | {f"metrics/{name}": value for name, value in snapshot.metrics.items()}
