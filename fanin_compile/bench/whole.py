"""`fanin bench model`: whole transformers and CNNs, every maskable layer at constant fan-in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rich.progress import track
from torch import Tensor, nn

from fanin_compile.bench.contenders import DENSE, QUICK
from fanin_compile.bench.feed_forward import AIM, feed_forward, time_removal
from fanin_compile.bench.footprint import first_output, resident
from fanin_compile.bench.layers_alone import layers_alone, time_alone
from fanin_compile.bench.masking import mask_constant_fan_in, maskable
from fanin_compile.bench.measure import Row, run_case
from fanin_compile.bench.models import OneInput, make_model
from fanin_compile.bench.output import BenchResult
from fanin_compile.bench.roofline import handover_ns, host
from fanin_compile.errors import OptionError
from fanin_compile.explain import explain
from fanin_compile.timing import threads as using

FROZEN = "fanin max-autotune, frozen"  # layers that stay dense, as a head, are then what the best dense has
# least ratios aimed at, at 90 % sparsity, by batch
TARGETS = {
    "vit": {1: 4.0, 8: 4.0, 16: 4.0},
    "bert": {1: 4.0, 8: 4.0, 16: 4.0},
    "gpt2-decode": {1: 2.0},
    "gpt2-decode-blocks": {1: 4.0, 8: 5.0, 16: 5.0},
    "gpt2-static-decode": {1: 2.0},
    "gpt2-static-decode-blocks": {1: 4.0, 8: 5.0, 16: 5.0},
    "mlp": {1: 4.0, 8: 7.0, 16: 7.0},
    "resnet50": {1: 4.0, 8: 4.0},
    "mobilenet_v2": {1: 2.0, 8: 2.0},
}


def bench_model(
    name: str,
    *,
    batches: Sequence[int],
    sparsity: float,
    ablate: float,
    threads: Sequence[int],
    seconds: float,
    quick: bool = False,
    first_outputs: bool = False,
) -> BenchResult:
    """One model at several batch sizes and thread counts against dense torch.

    Args:
        ablate: share of the feed-forward layers' hidden neurons to ablate, at equal non-zeros.
        quick: the small form of the model, one batch size, few contenders.
        first_outputs: measure how long compiling and condensing takes, at the first batch size and thread count.

    Raises: OptionError for an unknown model or one without hidden layers to ablate, DisagreementError.
    """
    if quick:
        batches, seconds = batches[:1], min(seconds, 0.05)
    contenders = QUICK if quick else ("fanin", "condensed module", *DENSE)
    whole = (*contenders, *(() if quick else (FROZEN,)), "condensed graph")
    rows: list[Row] = []
    notes: list[str] = []
    for count in threads:
        for batch in track(batches, f"{name}, {count} thread{'s' * (count > 1)}", transient=True):
            case = make_model(name, small=quick, batch=batch)
            mask_constant_fan_in(case.model, sparsity, ablate=ablate)
            ablated = _ablated(name, case.model, ablate) if ablate else ""
            model = OneInput(case).eval()
            x = next(iter(case.inputs.values()))
            with using(count):
                before = handover_ns()
            row = run_case(
                model,
                x,
                name=name if not ablate else f"{name}, {ablate:.0%} ablated",
                sparsity=sparsity,
                threads_used=count,
                contenders=whole,
                seconds=seconds,
                nnz_macs=_useful_macs(model, x),
                target=None if quick or sparsity != 0.9 else TARGETS.get(name, {}).get(batch),
            )
            alone, inputs = layers_alone(model, x, [layer for _, layer, *_ in maskable(case.model)])
            times = time_alone(alone, inputs, threads_used=count, contenders=contenders, seconds=seconds)
            rows.append(replace(row, alone=times))
            where = f"{count} thread{'s' * (count > 1)}, batch {batch}"
            with using(count):
                after = handover_ns()
            if before is not None and after is not None:
                notes.append(
                    f"{where}: a cache line took {before:.0f} ns from core to core before, {after:.0f} after"
                )
            notes += [
                f"{where}: {door} {row.ratio_of(door):.2f} times as fast as the best dense"
                for door in ("condensed graph", FROZEN)
                if door in row.times
            ]
            took = ", ".join(f"{name} {timing.us:.0f}" for name, timing in times.items())
            notes.append(f"{where}: {len(inputs)} layers alone (us: {took})")
            notes.append(f"{where}: {resident(model, x, threads_used=count)}")
            if first_outputs and (batch, count) == (batches[0], threads[0]):
                waits = first_output(model, x, threads_used=count)
                doors = ", ".join(f"{door} {wait:.1f}" for door, wait in waits.items())
                notes.append(f"{where}: first output after (s, no compilation kept): {doors}")
            if ablate:
                layers = {name: layer for name, layer, *_ in maskable(case.model)}
                notes.append(f"{where}: {ablated}")
                notes.append(f"{where}: {_removal(model, x, layers, count, seconds)}")
    return BenchResult(f"whole model {name}", host(), tuple(rows), None, tuple(notes))


def _ablated(name: str, model: nn.Module, ablate: float) -> str:
    """How many neurons of the masked layers have no weight.

    Raises: OptionError where that is none, so that no row says of a model what is not so.
    """
    weights = [(weight.t() if transposed else weight) for _, _, weight, transposed in maskable(model)]
    dead = [int((weight.flatten(1) == 0).all(1).sum()) for weight in weights]
    layers = sum(count > 0 for count in dead)
    if not layers:
        raise OptionError(
            f"ablate is {ablate:g}, expected 0 for {name}: it has {len(dead)} masked layers, none of them a hidden one "
            "by its name, or none as many neurons"
        )
    return f"{sum(dead)} neurons ablated, in {layers} of {len(dead)} layers"


def _removal(model: OneInput, x: Tensor, layers: Mapping[str, nn.Module], count: int, seconds: float) -> str:
    """What the removal of ablated neurons gains in the feed-forward blocks."""
    blocks, inputs = feed_forward(model, x, layers)
    if not inputs:
        return "no feed-forward block of two layers"
    without, removed = time_removal(blocks, inputs, threads_used=count, seconds=seconds)
    return (
        f"{len(inputs)} feed-forward blocks alone (us): {without.us:.0f}, {removed.us:.0f} with ablated neurons "
        f"removed, {without.median / removed.median:.2f} times as fast (aimed at {AIM})"
    )


def _useful_macs(model: OneInput, x: Tensor) -> int:
    """Multiply-adds of all layers with a weight after rewriting, as the report counts them; attention is not in it."""
    return explain(model, x, options={"cost_gate": False}).totals()["macs_after"] or 0
