"""The `fanin` command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.progress import track

N = TypeVar("N", int, float)

app = typer.Typer(
    help="Sparse PyTorch models with constant fan-in: train, condense, compile, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


bench_app = typer.Typer(
    help="Measure: correct before timed, sides interleaved, ratios.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")


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


def _numbers(kind: Callable[[str], N], text: str, name: str, *, below: float | None = None) -> list[N]:
    """Counts, from 1 on; or shares from 0 to less than `below`."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{name} is {text!r}, expected numbers separated by commas") from None
    if below is None and any(number < 1 for number in numbers):
        raise typer.BadParameter(f"{name} is {text!r}, expected numbers from 1 on")
    if below is not None and not all(0 <= number < below for number in numbers):
        raise typer.BadParameter(f"{name} is {text!r}, expected numbers from 0 to less than {below:g}")
    return numbers


@contextmanager
def _refusals() -> Iterator[None]:
    """What the package refuses is said as the command's own refusals are, with exit code 2."""
    from fanin_compile.errors import FaninError, OptionError

    try:
        yield
    except OptionError as error:
        raise typer.BadParameter(str(error)) from error
    except FaninError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


Batches = Annotated[str, typer.Option(help="batch sizes, separated by commas")]
Sparsities = Annotated[str, typer.Option(help="shares of weights left out, separated by commas")]
Threads = Annotated[str, typer.Option(help="thread counts, separated by commas")]
Seconds = Annotated[float, typer.Option(min=0.0, help="of measuring, for each case")]
Quick = Annotated[
    bool, typer.Option(help="a small run, to see that everything works; its times mean nothing")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="write the result here")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="write a picture here (.png, .svg, .pdf)")]


@bench_app.command()
def linear(
    batches: Batches = "1,8,16,64,256",
    sparsities: Sparsities = "0.9",
    threads: Threads = "1",
    seconds: Seconds = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """The two linears of a ViT-B or BERT-base feed-forward block, one at a time, against dense and sparse peers."""
    _bench_linear(False, batches, sparsities, threads, seconds, quick, json_file, plot_file)


@bench_app.command()
def mlp(
    batches: Batches = "1,8,16,32,64,256,2048",
    sparsities: Sparsities = "0.9",
    threads: Threads = "1",
    seconds: Seconds = 2.0,
    quick: Quick = False,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Six pairs of these layers with GELU between all, one compiled graph, against the targets."""
    _bench_linear(True, batches, sparsities, threads, seconds, quick, json_file, plot_file)


@bench_app.command()
def model(
    name: Annotated[
        str, typer.Argument(help="bert, vit, gpt2-decode, resnet50, ...; an unknown name lists them")
    ],
    batches: Batches = "1,8",
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.999, help="share of weights left out")] = 0.9,
    ablate: Annotated[float, typer.Option(min=0.0, max=0.99, help="share of hidden neurons ablated")] = 0.0,
    threads: Threads = "1",
    seconds: Seconds = 5.0,
    quick: Quick = False,
    first_output: Annotated[
        bool | None,
        typer.Option(help="measure the seconds that compiling and condensing take; by default unless quick"),
    ] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """A whole transformer or CNN from a transformers configuration, against dense torch."""
    from fanin_compile.bench.whole import bench_model

    with _refusals():
        result = bench_model(
            name,
            batches=_numbers(int, batches, "--batches"),
            sparsity=sparsity,
            ablate=ablate,
            threads=_numbers(int, threads, "--threads"),
            seconds=seconds,
            quick=quick,
            first_outputs=not quick if first_output is None else first_output,
        )
    print(result)
    result.save(json_file, plot_file)


@bench_app.command()
def targets(
    threads: Threads = "1,2",
    seconds: Seconds = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """Everything the linear kernels aim at, next to what this host reaches (a quarter of an hour)."""
    from fanin_compile.bench.targets import bench_targets

    result = bench_targets(threads=_numbers(int, threads, "--threads"), seconds=seconds, quick=quick)
    print(result)
    result.save(json_file)


@bench_app.command()
def conv(
    batches: Batches = "1,8",
    sparsity: Annotated[float, typer.Option(min=0.0, max=0.999, help="share of weights left out")] = 0.9,
    threads: Threads = "1",
    seconds: Seconds = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """The convolutions of ResNet-50, one at a time, against oneDNN's dense ones."""
    from fanin_compile.bench.conv import RESNET50, bench_conv, table

    cases = RESNET50[3:4] if quick else RESNET50
    counts, numbers = _numbers(int, threads, "--threads"), _numbers(int, batches, "--batches")
    rows = bench_conv(
        cases=cases,
        batches=numbers,
        sparsity=sparsity,
        threads_used=counts,
        seconds=min(seconds, 0.05) if quick else seconds,
    )
    _print_layers(rows, len(cases) * len(numbers) * len(counts), table, json_file)


@bench_app.command()
def depthwise(
    batches: Batches = "1,8",
    threads: Threads = "1",
    seconds: Seconds = 1.0,
    quick: Quick = False,
    json_file: JsonFile = None,
) -> None:
    """The depthwise convolutions of MobileNetV2, one at a time, against oneDNN's through inductor."""
    from fanin_compile.bench.depthwise import MOBILENET_V2, bench_depthwise, table

    cases = MOBILENET_V2[-1:] if quick else MOBILENET_V2
    counts, numbers = _numbers(int, threads, "--threads"), _numbers(int, batches, "--batches")
    rows = bench_depthwise(
        cases=cases,
        batches=numbers,
        threads_used=counts,
        seconds=min(seconds, 0.05) if quick else seconds,
    )
    _print_layers(rows, len(cases) * len(numbers) * len(counts), table, json_file)


def _print_layers(
    measuring: Iterable[Any], total: int, table: Callable[[list[Any]], str], json_file: Path | None
) -> None:
    """Rows of single layers, each with to_dict(), as they are measured: a progress bar, then their table."""
    from fanin_compile.bench.roofline import host

    rows = list(track(measuring, "measuring", total=total, transient=True))
    print(host())
    print(table(rows))
    if json_file is not None:
        json_file.write_text(
            json.dumps({"machine": host(), "rows": [row.to_dict() for row in rows]}, indent=2)
        )


def _bench_linear(
    stack: bool,
    batches: str,
    sparsities: str,
    threads: str,
    seconds: float,
    quick: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    from fanin_compile.bench.linear import bench_linear

    result = bench_linear(
        stack=stack,
        batches=_numbers(int, batches, "--batches"),
        sparsities=_numbers(float, sparsities, "--sparsities", below=1),
        threads=_numbers(int, threads, "--threads"),
        seconds=seconds,
        quick=quick,
    )
    print(result)
    result.save(json_file, plot_file)


def main() -> None:
    app()
