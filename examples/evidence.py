"""Does a constant fan-in cost accuracy? Dense, static, SET, RigL and SRigL on real data, over seeds.

    python examples/evidence.py --out examples/evidence.jsonl --table examples/evidence.md

Runs what is not in the .jsonl yet (stop and start it at will) and writes the table. All methods get the same data
order, initial dense weights, optimizer and number of steps; a seed sets them all.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fanin_compile.train import SET, RigL, SRigL, Static
from fanin_compile.train.data import Dataset, digits, fashion_mnist, mnist

METHODS: dict[str, Callable[..., Any]] = {
    "static": Static,
    "SET": SET,
    "RigL": RigL,
    "SRigL, no ablation": functools.partial(SRigL, ablation=False),
    "SRigL, gamma_sal 0.3": functools.partial(SRigL, gamma_sal=0.3),
    "SRigL, gamma_sal 0.95": functools.partial(SRigL, gamma_sal=0.95),
}
CONSTANT_FAN_IN = [method for method in METHODS if method.startswith("SRigL")]
SPARSITIES = (0.8, 0.9, 0.95, 0.99)
STEPS, BATCH, DELTA_T, LR = 500, 64, 20, 0.05
MARK = "<!-- written by evidence.py from here on -->"
T_QUANTILE = {5: 2.776, 10: 2.262}  # Student's t at 97.5 %, by number of seeds


def mlp(side: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


def cnn(side: int) -> nn.Module:
    """Three 5x5 convolutions, wider on the small images, where they cost less."""
    widths, strides = ((32, 64, 128), (1, 2, 2)) if side == 8 else ((16, 32, 64), (2, 2, 2))
    parts: list[nn.Module] = []
    for before, after, stride in zip((1, *widths), widths, strides, strict=False):
        parts += [nn.Conv2d(before, after, 5, stride, 2, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    cells = {8: 4, 28: 16}[side]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(widths[-1] * cells, 10))


SETTINGS: dict[str, tuple[Callable[[], Dataset], Callable[[int], nn.Module]]] = {
    "digits MLP": (digits, mlp),
    "digits CNN": (digits, cnn),
    "MNIST MLP": (mnist, mlp),
    "MNIST CNN": (mnist, cnn),
    "Fashion-MNIST MLP": (fashion_mnist, mlp),
}


def run(
    data: Dataset, build: Callable[[int], nn.Module], method: str, sparsity: float, seed: int
) -> dict[str, float]:
    """Train once; test accuracy in percent, share of active weights and of living neurons in the sparse layers."""
    torch.manual_seed(seed)
    model = build(data.train_x.shape[-1])
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    sparse = None
    if method != "dense":
        updates = {} if method == "static" else {"total_steps": STEPS, "delta_t": DELTA_T}
        sparse = METHODS[method](model, optimizer, sparsity=sparsity, seed=seed, **updates)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        pick = torch.randint(len(data.train_x), (BATCH,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train_x[pick]), data.train_y[pick]).backward()
        optimizer.step()
        if sparse is not None:
            sparse.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        guess = torch.cat([model(x).argmax(1) for x in data.test_x.split(1000)])
    result = {"accuracy": 100.0 * float((guess == data.test_y).float().mean())}
    if sparse is not None:
        masks = [layer.rows(layer.mask) for layer in sparse.layers]
        result["density"] = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        result["living"] = sum(int(m.any(1).sum()) for m in masks) / sum(len(m) for m in masks)
    return result


def interval(values: list[float]) -> str:
    """Mean and half width of its 95 % interval."""
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.2f} ± {half:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: accuracy by method and sparsity; differences are paired by seed, which takes its noise away."""
    lines = []
    for setting in SETTINGS:
        here = [row for row in rows if row["setting"] == setting]
        wanted = len({row["seed"] for row in here})
        by_cell: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for row in sorted(here, key=lambda row: row["seed"]):
            by_cell.setdefault((row["method"], row["sparsity"]), []).append(row)
        if len(by_cell) < 1 + len(METHODS) * len(SPARSITIES) or any(
            len(v) < wanted for v in by_cell.values()
        ):
            continue  # not run to its end

        def line(title: str, cell: Callable[[float], str]) -> str:
            return f"| {title} | " + " | ".join(cell(sparsity) for sparsity in SPARSITIES) + " |"

        def values(method: str, sparsity: float, key: str, cells: dict[Any, Any] = by_cell) -> list[float]:
            return [row[key] for row in cells[method, sparsity]]

        def behind(method: str, sparsity: float) -> str:
            pairs = zip(
                values(method, sparsity, "accuracy"), values("RigL", sparsity, "accuracy"), strict=True
            )
            return interval([a - b for a, b in pairs])

        def accuracy(method: str, sparsity: float) -> str:
            return interval(values(method, sparsity, "accuracy"))

        def density(method: str, sparsity: float) -> str:
            return f"{statistics.mean(values(method, sparsity, 'density')):.2%}"

        def ablated(method: str, sparsity: float) -> str:
            return f"{1 - statistics.mean(values(method, sparsity, 'living')):.0%}"

        dense = interval(values("dense", 0.0, "accuracy"))
        lines += [f"\n### {setting}, {wanted} seeds; dense {dense} %\n", line("", "{:.0%}".format)]
        lines += ["|---" * (1 + len(SPARSITIES)) + "|"]
        lines += [line(method, functools.partial(accuracy, method)) for method in METHODS]
        for title, methods, cell in (
            (" - RigL", CONSTANT_FAN_IN, behind),
            (": active weights", ["RigL", *CONSTANT_FAN_IN], density),
            (": neurons without inputs", ["RigL", *CONSTANT_FAN_IN[1:]], ablated),
        ):
            lines += [line(f"*{m}{title}*", functools.partial(cell, m)) for m in methods]
    return "\n".join(lines).lstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("examples/evidence.jsonl"))
    parser.add_argument("--table", type=Path, default=Path("examples/evidence.md"))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, choices=T_QUANTILE, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["setting"], row["method"], row["sparsity"], row["seed"]) for row in rows}
    cells = [("dense", 0.0), *itertools.product(METHODS, SPARSITIES)]
    for setting in args.settings:
        load, build = SETTINGS[setting]
        data = load()
        for seed, (method, sparsity) in itertools.product(range(args.seeds), cells):
            if (setting, method, sparsity, seed) in done:
                continue
            start = time.perf_counter()
            row = {"setting": setting, "method": method, "sparsity": sparsity, "seed": seed}
            row |= run(data, build, method, sparsity, seed)
            rows.append(row)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            seconds = time.perf_counter() - start
            print(
                f"{setting}, {method}, {sparsity:.0%}, seed {seed}: {row['accuracy']:.2f} % ({seconds:.1f} s)"
            )
    comment = args.table.read_text().partition(MARK)[0] if args.table.exists() else ""
    args.table.write_text(comment + MARK + "\n\n" + table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
