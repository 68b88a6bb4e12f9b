"""A benchmark's result as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fanin_compile.bench.measure import Row
from fanin_compile.bench.roofline import Roofline


@dataclass(frozen=True)
class BenchResult:
    title: str
    machine: str
    rows: tuple[Row, ...]
    roofline: Roofline | None = None
    notes: tuple[str, ...] = ()  # lines under the table

    def to_json(self) -> str:
        fields: dict[str, Any] = {"title": self.title, "machine": self.machine}
        fields["rows"] = [row.to_dict() for row in self.rows]
        if self.roofline is not None:
            fields["roofline"] = asdict(self.roofline)
        fields["notes"] = list(self.notes)
        return json.dumps(fields, indent=2)

    def __str__(self) -> str:
        contenders = list(dict.fromkeys(name for row in self.rows for name in row.times))
        headers = [
            "case",
            "sparsity",
            "threads",
            "batch",
            *contenders,
            "x best dense",
            *(["layers alone"] if self._alone else []),
            "target",
            "MAC/ns",
            "of peak",
        ]
        table = [self._cells(row, contenders) for row in self.rows]
        lines = [self.title, self.machine, tabulate(table, headers, disable_numparse=True, stralign="right")]
        if self.roofline is not None:
            late, early = self.roofline.gathered
            lines.append(
                f"peak of a core: {self.roofline.macs_per_ns:.1f} fp32 multiply-adds per ns; with operands gathered "
                f"from L1 {early:.1f}, with addresses loaded just before {late:.1f}"
            )
        lines.append("median microseconds a call; ratio to the fastest dense contender of the same run")
        if self._alone:
            lines.append("layers alone: the ratio of all masked layers without what stands between them")
        lines += self.notes
        return "\n".join(lines)

    @property
    def _alone(self) -> bool:
        return any(row.alone is not None for row in self.rows)

    def _cells(self, row: Row, contenders: Sequence[str]) -> list[str]:
        times = [f"{row.times[name].us:.0f}" if name in row.times else "" for name in contenders]
        target = (
            ""
            if row.target is None
            else f">= {row.target:g} {'met' if row.ratio >= row.target else 'MISSED'}"
        )
        share, kind = ("", "") if self.roofline is None else row.share(self.roofline)
        of = f"{share:.0%} {kind}" if kind else ""
        return [
            *(row.name, f"{row.sparsity:.0%}", str(row.threads), str(row.batch), *times),
            f"{row.ratio:.2f}",
            *(["" if row.ratio_alone is None else f"{row.ratio_alone:.2f}"] if self._alone else []),
            *(target, f"{row.macs_per_ns:.1f}", of),
        ]

    def save(self, json_file: Path | None, plot_file: Path | None) -> None:
        if json_file is not None:
            json_file.write_text(self.to_json())
        if plot_file is not None:
            plot(self, plot_file)


@dataclass(frozen=True)
class Target:
    """One line: reached counts as met from `aim` on, or up to it where less is better."""

    what: str
    aim: float
    reached: float
    unit: str = "x"
    least: bool = True  # the aim is a lower bound

    @property
    def met(self) -> bool:
        return self.reached >= self.aim if self.least else self.reached <= self.aim

    def cells(self) -> list[str]:
        sign = ">=" if self.least else "<="
        return [
            self.what,
            f"{sign} {_number(self.aim)} {self.unit}",
            f"{_number(self.reached)} {self.unit}",
            "met" if self.met else "missed",
        ]


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


@dataclass(frozen=True)
class TargetTable:
    machine: str
    targets: tuple[Target, ...]

    def __str__(self) -> str:
        rows = [target.cells() for target in self.targets]
        met = sum(target.met for target in self.targets)
        table = tabulate(rows, ["what", "aim", "reached", ""], disable_numparse=True)
        return f"{self.machine}\n{table}\n{met} of {len(rows)} met"

    def save(self, json_file: Path | None) -> None:
        if json_file is not None:
            fields = [{**asdict(target), "met": target.met} for target in self.targets]
            json_file.write_text(json.dumps({"machine": self.machine, "targets": fields}, indent=2))


def plot(result: BenchResult, path: Path) -> None:
    """Ratio over the best dense against the batch size, a line for each case, sparsity and thread count."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list[Row]] = {}
    for row in result.rows:
        label = f"{row.name}, {row.sparsity:.0%}, {row.threads} thread{'s' * (row.threads > 1)}"
        lines.setdefault(label, []).append(row)
    for label, rows in lines.items():
        ordered = sorted(rows, key=lambda row: row.batch)
        axes.plot([row.batch for row in ordered], [row.ratio for row in ordered], marker="o", label=label)
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--")
    axes.set(xscale="log", xlabel="batch", ylabel="times faster than the best dense", title=result.title)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
