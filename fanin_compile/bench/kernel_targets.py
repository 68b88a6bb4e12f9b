"""What the linear kernels aim at, part by part: see targets.py."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile import ops, timing
from fanin_compile.bench.cases import LinearCase, build, masked_linear
from fanin_compile.bench.contenders import CONTENDERS, DENSE, csr, gather_tensor_ops
from fanin_compile.bench.linear import PAIRS, target
from fanin_compile.bench.measure import nnz_of, packed_nbytes, run_case
from fanin_compile.bench.onemkl import onemkl
from fanin_compile.bench.output import Target
from fanin_compile.bench.roofline import roofline
from fanin_compile.condensed import CondensedWeight
from fanin_compile.packing import pack

# Microseconds of peers that cannot run here, and of eager dense beside them: one Zen 3 core, 3072->768 at 90 %.
DENSE_US = {16: 1490.0, 256: 13100.0}
PEERS = {("TVM, hand-written schedule", 16): 202.0, ("DeepSparse 1.8", 256): 3410.0}
TINY = 20  # layers of the graph in which the overhead of a call is measured

Run = Callable[[], object]


def stacks(layer: tuple[int, int], threads: Sequence[int], seconds: float, quick: bool) -> Iterator[Target]:
    """The compiled stack over the best dense."""
    batches = {
        0.9: (1, 8, 16, 64, 256, 2048),
        0.8: (1, 16, 256),
        0.95: (1, 256),
        0.99: (1, 256),
        0.7: (1, 16, 256),
    }
    if quick:
        batches = {0.9: (1, 8)}
    for count in threads:
        # more threads, the same kernels: the sparsities are told by one count
        for sparsity, sizes in batches.items() if count == min(threads) else [(0.9, (1, 8, 16, 64, 256))]:
            for batch in sizes:
                case = LinearCase(*layer, sparsity, batch, count, pairs=1 if quick else PAIRS)
                model, x = build(case)
                row = run_case(
                    model,
                    x,
                    name=case.name,
                    sparsity=sparsity,
                    threads_used=count,
                    contenders=("fanin", *(("eager",) if quick else DENSE)),
                    seconds=seconds,
                    nnz_macs=batch * nnz_of(model),
                )
                # at 70 % nothing is to be gained: what is asked is that nothing is lost, up to the noise of timing
                aim = 0.97 if sparsity == 0.7 else target(sparsity, batch)
                assert aim is not None
                yield Target(f"stack, {sparsity:.0%}, batch {batch}, {_threads(count)}", aim, row.ratio)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _layer(layer: tuple[int, int], batch: int) -> tuple[nn.Linear, Tensor, Run]:
    """A masked layer at 90 %, an input, and the operator on its packed weight."""
    generator = torch.Generator().manual_seed(0)
    out, fan_in = layer
    model = masked_linear(fan_in, out, 0.9, generator)
    x = torch.randn(batch, fan_in, generator=generator)
    return model, x, _operator(CondensedWeight.from_dense(model.weight), x, model.bias.detach())


def _operator(weight: CondensedWeight, x: Tensor, bias: Tensor) -> Run:
    packed = pack(weight)
    return lambda: ops.gather_matmul(x, packed.values, packed.structure, bias, weight.out_features)


def _name(layer: tuple[int, int]) -> str:
    return f"{layer[1]}->{layer[0]}"


def shares(layers: Sequence[tuple[int, int]], seconds: float) -> Iterator[Target]:
    """Shares of what one core can do, of the operator with everything in it."""
    limit = roofline()
    with timing.threads(1):
        for layer in layers:
            model, _, run = _layer(layer, 1)
            nbytes = packed_nbytes(model)
            (t,) = timing.interleaved([run], seconds)
            share = nbytes / t.median / limit.stream(nbytes)
            yield Target(f"{_name(layer)}, batch 1: of the streaming bound", 60, 100 * share, "%")
            for batch in (32, 256):
                model, _, run = _layer(layer, batch)
                (t,) = timing.interleaved([run], seconds)
                share = batch * nnz_of(model) / t.median / limit.macs_per_ns
                yield Target(f"{_name(layer)}, batch {batch}: of the FMA peak", 60, 100 * share, "%")


def peers(layer: tuple[int, int], seconds: float, quick: bool) -> Iterator[Target]:
    """One layer, one thread, the operator with everything in it against others' time."""
    with timing.threads(1), torch.no_grad():
        for batch in (1, 16, 256):
            model, x, run = _layer(layer, batch)
            runs: dict[str, Run] = {"ours": run, "dense": functools.partial(model, x)}
            for name, make in (("csr", csr), ("tensor form", gather_tensor_ops), ("oneMKL", onemkl)):
                peer = None if quick and name == "tensor form" else make(model, x)
                if peer is not None:
                    runs[name] = peer
            for name in ("onnxruntime", "openvino"):
                peer = None if quick else CONTENDERS[name](model, x)
                if peer is not None:
                    runs[name] = peer
            times = dict(zip(runs, timing.interleaved(list(runs.values()), seconds), strict=True))
            ours = times["ours"].median
            prefix = f"{_name(layer)}, batch {batch}:"
            if "oneMKL" in times and batch == 1:
                yield Target(
                    f"{prefix} time of oneMKL sparse", 0.67, ours / times["oneMKL"].median, least=False
                )
            for (peer_name, at), us in PEERS.items():
                if at == batch and not quick:
                    peer_time = times["dense"].median * us / DENSE_US[batch]
                    aim = 0.9 if batch == 16 else 0.67
                    yield Target(
                        f"{prefix} time of {peer_name} (published)", aim, ours / peer_time, least=False
                    )
            if batch in (1, 256):
                yield Target(f"{prefix} over torch CSR", 4 if batch == 1 else 15, times["csr"].median / ours)
            if "tensor form" in times:
                yield Target(f"{prefix} over the tensor form", 5, times["tensor form"].median / ours)
            for name in ("onnxruntime", "openvino"):
                if name in times:
                    yield Target(f"{prefix} over dense {name}", 1, times[name].median / ours)


def scaling(layers: Sequence[tuple[int, int]], threads: Sequence[int], seconds: float) -> Iterator[Target]:
    """Two threads over one, of the operator."""
    if max(threads) < 2:
        return
    for layer in layers:
        for batch, aim in ((1, 1.6), (16, 1.8), (256, 1.8)):
            _, _, run = _layer(layer, batch)
            medians = []
            for count in (1, 2):
                with timing.threads(count):
                    medians.append(timing.interleaved([run], seconds)[0].median)
            yield Target(f"{_name(layer)}, batch {batch}: 2 threads over 1", aim, medians[0] / medians[1])


def memory(layers: Sequence[tuple[int, int]]) -> Iterator[Target]:
    for layer in layers:
        model, _, _ = _layer(layer, 1)
        share = 100 * packed_nbytes(model) / model.weight.nbytes
        yield Target(f"{_name(layer)}: bytes of the dense weight's", 15.1, share, "%", least=False)
        for batch in (1, 64):
            _, _, run = _layer(layer, batch)
            name = f"{_name(layer)}, batch {batch}: tensors allocated by a call"
            yield Target(name, 1, _allocations(run), "", least=False)


def _allocations(run: Run) -> int:
    """Tensors that the second call allocates."""
    run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events: Any = profile.profiler
    return sum(e.name() == "[memory]" and e.nbytes() > 0 for e in events.kineto_results.events())


def scratch() -> Iterator[Target]:
    """Of everything that ran before in this process."""
    yield Target(
        "scratch of a thread, the most so far", 1024, ops.scratch_nbytes() / 1024, "KiB", least=False
    )


def structures(layers: Sequence[tuple[int, int]], seconds: float) -> Iterator[Target]:
    """Ragged rows and ablated neurons over constant fan-in of as many non-zeros."""
    with timing.threads(1):
        for layer in layers:
            model, _, _ = _layer(layer, 1)
            constant = CondensedWeight.from_dense(model.weight)
            generator = torch.Generator().manual_seed(1)
            scores = torch.rand(layer, generator=generator)
            ragged = (scores * (0.5 + torch.rand(layer[0], 1, generator=generator))).flatten()
            mask = torch.zeros(len(ragged), dtype=torch.bool)
            mask[ragged.topk(constant.nnz).indices] = True
            ablated = torch.zeros(layer, dtype=torch.bool)
            alive = torch.arange(0, layer[0], 2)
            ablated[alive] = torch.zeros(len(alive), layer[1], dtype=torch.bool).scatter_(
                1, scores[alive].topk(constant.nnz // len(alive)).indices, True
            )
            for batch in (1, 8, 256):
                runs = [_on(w, batch, layer) for w in (constant, _random(mask.view(layer)), _random(ablated))]
                base, *others = (t.median for t in timing.interleaved(runs, seconds))
                for what, median in zip(("ragged", "half of the neurons ablated"), others, strict=True):
                    name = f"{_name(layer)}, batch {batch}: {what} over constant fan-in, time"
                    yield Target(name, 1.1, median / base, least=False)


def _random(mask: Tensor) -> CondensedWeight:
    return CondensedWeight.from_dense(
        torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)), mask
    )


def _on(weight: CondensedWeight, batch: int, layer: tuple[int, int]) -> Run:
    return _operator(weight, torch.randn(batch, layer[1]), torch.zeros(layer[0]))


def _all(runs: Sequence[Run]) -> None:
    for run in runs:
        run()


def half_values(layer: tuple[int, int], seconds: float, quick: bool) -> Iterator[Target]:
    """bf16 values over fp32 ones at batch 1, in so many layers that they come from beyond the caches."""
    generator = torch.Generator().manual_seed(0)
    out, fan_in = layer
    weights = [
        CondensedWeight.from_dense(masked_linear(fan_in, out, 0.9, generator).weight)
        for _ in range(2 if quick else 24)
    ]
    each = [
        [_on(w.with_dtype(dtype), 1, layer) for w in weights] for dtype in (torch.float32, torch.bfloat16)
    ]
    with timing.threads(1):
        full, half = (
            t.median for t in timing.interleaved([functools.partial(_all, runs) for runs in each], seconds)
        )
    yield Target(
        f"{len(weights)} x {_name(layer)}, batch 1: bf16 values, time of fp32's",
        1.0,
        half / full,
        least=False,
    )


def overhead(seconds: float) -> Iterator[Target]:
    """What a call costs in a compiled graph beyond its kernel, next to inductor's own dense one."""
    generator = torch.Generator().manual_seed(0)
    medians: list[tuple[float, float]] = []
    options: dict[str, Any] = {"strict": True, "cost_gate": False}
    with timing.threads(1), torch.no_grad():
        x = torch.randn(1, 32, generator=generator)
        for count in (1, 1 + TINY):
            torch._dynamo.reset()
            model = nn.Sequential(*(masked_linear(32, 32, 0.9, generator) for _ in range(count))).eval()
            ours = torch.compile(model, backend="fanin", options=options)
            dense = torch.compile(model)
            pair = timing.interleaved([functools.partial(ours, x), functools.partial(dense, x)], 4 * seconds)
            medians.append((pair[0].median, pair[1].median))
    (one, one_dense), (many, many_dense) = medians
    yield Target("a tiny layer in a compiled graph", 3.0, (many - one) / TINY / 1e3, "us", least=False)
    relative = (many - one) / max(many_dense - one_dense, 1.0)
    yield Target("the same, of inductor's own dense layer", 1.0, relative, least=False)


def build_times() -> Iterator[Target]:
    """The native library from nothing, and from the cache, each in a process of its own."""
    script = (
        "import time, torch; from fanin_compile.kernels import build; t = time.perf_counter(); build.load(); "
        "print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "FANIN_CACHE_DIR": cache}
        for what, aim in (("first build of the library", 30.0), ("its warm start", 0.3)):
            done = subprocess.run(
                [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
            )
            yield Target(what, aim, float(done.stdout), "s", least=False)
