"""The `fanin` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Sparse PyTorch models with constant fan-in: train, condense, compile, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Makes `demo` a subcommand even while it stands alone."""


@app.command()
def demo(
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.999, help="share of weights to leave out")] = 0.9,
    epochs: Annotated[int, typer.Option(min=1, help="of each of the two trainings")] = 20,
    seed: Annotated[int, typer.Option(help="of initialisation, order and masks")] = 0,
    out: Annotated[Path | None, typer.Option(help="write the result as JSON here")] = None,
) -> None:
    """Train a CNN on real digits dense and with SRigL, condense and compile it, show equality and speed."""
    from fanin_compile.demo import run

    result = run(sparsity=sparsity, epochs=epochs, seed=seed)
    if out is not None:
        fields: dict[str, object] = {
            "dense_accuracy": result.dense_accuracy,
            "sparse_accuracy": result.sparse_accuracy,
        }
        fields |= {"agreement": result.agreement, "times_us": result.times, "report": result.report.to_dict()}
        out.write_text(json.dumps(fields, indent=2))
    if not result.agreement:
        raise typer.Exit(1)


def main() -> None:
    app()
