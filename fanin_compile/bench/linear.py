"""`fanin bench linear` and `fanin bench mlp`: condensed linear layers against dense and sparse peers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.progress import track

from fanin_compile.bench.cases import LinearCase, build
from fanin_compile.bench.contenders import CONTENDERS, QUICK
from fanin_compile.bench.measure import Row, nnz_of, packed_nbytes, run_case
from fanin_compile.bench.output import BenchResult
from fanin_compile.bench.roofline import host, roofline

LAYERS = ((768, 3072), (3072, 768))  # (out, in): both linears of ViT-B's and BERT-base's feed-forward block
PAIRS = 6


def target(sparsity: float, batch: int) -> float | None:
    """The ratio aimed at for stacks: none is set for sparsities and batch sizes not named here."""
    at_90 = {1: 4.0, 8: 8.0, 16: 8.0, 32: 8.0, 64: 8.0, 256: 6.5, 2048: 6.0}
    others = {0.95: {1: 5.5, 256: 10.0}, 0.99: {1: 8.0, 256: 20.0}}
    if sparsity == 0.9:
        return at_90.get(batch)
    if sparsity == 0.8 and batch in at_90:
        return at_90[batch] / 2
    if sparsity == 0.7:
        return 1.0
    return others.get(sparsity, {}).get(batch)


def bench_linear(
    *,
    stack: bool,
    batches: Sequence[int],
    sparsities: Sequence[float],
    threads: Sequence[int],
    seconds: float,
    quick: bool = False,
    layers: Sequence[tuple[int, int]] = LAYERS,
) -> BenchResult:
    """Every combination, `seconds` of measuring each; quick: small layers and few contenders, to see that it runs."""
    if quick:
        layers, batches, seconds = ((64, 96),), batches[:2], min(seconds, 0.05)
    contenders = QUICK if quick else tuple(CONTENDERS)
    if stack:
        layers = layers[-1:]
    cases = [
        LinearCase(out, fan_in, sparsity, batch, count, pairs=(1 if quick else PAIRS) if stack else 0)
        for count in threads
        for sparsity in sparsities
        for out, fan_in in layers
        for batch in batches
    ]
    rows = tuple(_rows(cases, contenders, seconds, targets=stack and not quick))
    title = "stacks of condensed linear layers" if stack else "condensed linear layers"
    return BenchResult(title, host(), rows, None if quick else roofline())


def _rows(
    cases: Sequence[LinearCase], contenders: Sequence[str], seconds: float, *, targets: bool
) -> Iterator[Row]:
    for case in track(cases, "measuring", transient=True):
        model, x = build(case)
        yield run_case(
            model,
            x,
            name=case.name,
            sparsity=case.sparsity,
            threads_used=case.threads,
            contenders=contenders,
            seconds=seconds,
            nnz_macs=case.batch * nnz_of(model),
            target=target(case.sparsity, case.batch) if targets else None,
            nbytes=packed_nbytes(model) if case.batch == 1 else None,
        )
