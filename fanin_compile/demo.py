"""The main job on real data: train with SRigL, condense, compile, report, measure. `fanin demo` runs it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.condense import condense
from fanin_compile.explain import explain
from fanin_compile.kernels import build
from fanin_compile.report import Report
from fanin_compile.timing import interleaved, threads
from fanin_compile.train import SRigL
from fanin_compile.train.data import Dataset, digits

BATCHES = (1, 16, 256)


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; times in microseconds a call, keyed by batch size."""

    dense_accuracy: float
    sparse_accuracy: float
    agreement: bool  # do all predictions equal those of the masked dense model
    largest_error: (
        float  # of the logits against the masked dense model in fp64, relative to the largest logit
    )
    report: Report
    times: dict[int, dict[str, float]]


def cnn(classes: int = 10) -> nn.Sequential:
    """A small CNN for 8x8 images, wide enough (2048, 3072, 1024) for its linear layers to dominate."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 128, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, 3072),
        nn.ReLU(),
        nn.Linear(3072, 1024),
        nn.ReLU(),
        nn.Linear(1024, classes),
    )


def train(
    model: nn.Module, data: Dataset, *, epochs: int, sparsity: float | None, title: str, batch: int = 96
) -> float:
    """Train in place, dense if `sparsity` is None, else with SRigL; returns the test accuracy in [0, 1]."""
    steps = epochs * (len(data.train_x) // batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    srigl = None
    if sparsity is not None:
        srigl = SRigL(model, optimizer, sparsity=sparsity, total_steps=steps, delta_t=20)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=steps)
        model.train()
        for _ in range(epochs):
            order = torch.randperm(len(data.train_x))
            for start in range(0, len(order) - batch + 1, batch):
                rows = order[start : start + batch]
                optimizer.zero_grad(set_to_none=True)
                loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
                loss.backward()
                optimizer.step()
                if srigl is not None:
                    srigl.step()
                rates.step()
                bar.update(task, advance=1, description=f"{title}  loss {loss.item():.3f}")
    if srigl is not None:
        srigl.finalize()
    return accuracy(model, data)


def accuracy(model: nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        predicted = model.eval()(data.test_x).argmax(1)
    return float((predicted == data.test_y).float().mean())


def run(*, sparsity: float = 0.9, epochs: int = 20, seed: int = 0, seconds: float = 1.0) -> DemoResult:
    """The whole way: two trainings, condense, compile, compare, measure (at one thread, `seconds` a batch size)."""
    console = Console()
    torch.manual_seed(seed)
    data = digits()
    console.print(f"data: {data}")
    start = time.perf_counter()
    build.load()
    console.print(f"native kernels ready after {time.perf_counter() - start:.1f} s")
    dense_model = cnn(data.classes)
    model = copy.deepcopy(dense_model)
    dense_accuracy = train(dense_model, data, epochs=epochs, sparsity=None, title="dense")
    sparse_accuracy = train(model, data, epochs=epochs, sparsity=sparsity, title=f"SRigL {sparsity:.0%}")
    console.print(
        f"accuracy: dense {dense_accuracy:.2%}, SRigL at {sparsity:.0%} sparsity {sparse_accuracy:.2%}"
    )

    condensed = condense(model)
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (dense_model, condensed)]
    console.print(f"state_dict: {sizes[0] / 1e6:.1f} MB dense, {sizes[1] / 1e6:.1f} MB condensed")
    compiled = torch.compile(model, backend="fanin")
    agreement, error = compare(model, {"condensed": condensed, "fanin": compiled}, data.test_x)
    verdict = "equal" if agreement else "DIFFER FROM"
    console.print(
        f"predictions of condensed and compiled {verdict} the masked dense model's; error {error:.1e}"
    )

    report = explain(model, data.test_x)
    console.print(str(report), soft_wrap=True, highlight=False)
    times = side_by_side(model, data.test_x, seconds)
    console.print(_table(times), soft_wrap=True, highlight=False)
    return DemoResult(dense_accuracy, sparse_accuracy, agreement, error, report, times)


def compare(
    model: nn.Module, others: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor
) -> tuple[bool, float]:
    """Do the predictions agree with the masked dense model's; the largest error of the others' logits against fp64."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected, truth = model(x).argmax(1), exact(x.double())
        outputs = [other(x) for other in others.values()]
    error = max(float((y - truth).abs().max() / truth.abs().max()) for y in outputs)
    return all(torch.equal(y.argmax(1), expected) for y in outputs), error


def side_by_side(model: nn.Module, x: Tensor, seconds: float) -> dict[int, dict[str, float]]:
    """Median microseconds a call at one thread: masked dense eager, inductor on the same model, fanin."""
    times: dict[int, dict[str, float]] = {}
    with torch.no_grad(), threads(1):
        for batch in BATCHES:
            inputs = x[torch.arange(batch) % len(x)]
            alternatives = {
                "masked dense": model,
                "inductor": torch.compile(model, dynamic=False),
                "fanin": torch.compile(model, backend="fanin", dynamic=False),
            }
            functions = [lambda m=m, i=inputs: m(i) for m in alternatives.values()]
            measured = interleaved(functions, seconds)
            times[batch] = {name: t.us for name, t in zip(alternatives, measured, strict=True)}
    return times


def _table(times: dict[int, dict[str, float]]) -> str:
    rows = [
        [
            batch,
            *(f"{us:.0f} us" for us in row.values()),
            f"{min(row['masked dense'], row['inductor']) / row['fanin']:.1f}x",
        ]
        for batch, row in times.items()
    ]
    headers = ["batch", *next(iter(times.values())), "over the best dense"]
    return f"one thread, whole model, median:\n{tabulate(rows, headers)}"
