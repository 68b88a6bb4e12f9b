"""Passes: what they may know and report, and the one runner that checks their contract."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx

from fanin_compile.condensed import CondensedWeight
from fanin_compile.effects import writes
from fanin_compile.errors import RewriteError
from fanin_compile.evaluator import take_read
from fanin_compile.packed import Packed
from fanin_compile.packing import gate_rows, pack
from fanin_compile.records import Layer, Rewrite, Skip

log = logging.getLogger("fanin_compile")


@dataclass(frozen=True)
class PassResult:
    rewritten: tuple[Rewrite, ...] = ()
    skipped: tuple[Skip, ...] = ()
    found: tuple[Layer, ...] = ()


class Gate(Protocol):
    """Decides whether condensing a layer gains: None to go ahead, else the Skip that says why not."""

    def __call__(self, layer: Layer, /) -> Skip | None: ...


class Packer(Protocol):
    """Packs the weight of a linear layer and says how, in a few words or none; or the Skip that says why not."""

    def __call__(self, weight: CondensedWeight, layer: Layer, /) -> tuple[Packed, str] | Skip: ...


def pack_by_default(weight: CondensedWeight, layer: Layer) -> tuple[Packed, str]:
    return pack(weight), ""


class GatePacker(Protocol):
    """Packs a gate and its partner, one weight [2 * hidden, in], for a chain with `second`; says how, if at all."""

    def __call__(
        self, gate: CondensedWeight, second: Packed, activation: str, batch: int, /
    ) -> tuple[Packed, str]: ...


def pack_gate_by_default(
    gate: CondensedWeight, second: Packed, activation: str, batch: int
) -> tuple[Packed, str]:
    return pack(gate, block_rows=gate_rows(gate)), ""


@dataclass(frozen=True)
class Context:
    """What passes may know beyond the graph.

    Attributes:
        masks: get_attr target -> bool mask of that weight.
        masks_decide: what a mask leaves out counts as 0. Otherwise the graph's own meaning comes first: a non-zero
            outside the mask is active as well.
        names: get_attr target -> the layer's name in reports.
        values_dtype: of condensed values; None keeps the weight's.
        pack, pack_gate: how linear weights are packed, by default or as measured (tuning.py).
        in_place: operators may write over tensors of the graph which nobody reads any more; for inference alone.
        watched: get_attr targets of parameters, changes of which whoever runs the graph notices.
    """

    gate: Gate
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    values_dtype: torch.dtype | None = None
    masks_decide: bool = False
    pack: Packer = pack_by_default
    pack_gate: GatePacker = pack_gate_by_default
    in_place: bool = False
    watched: Collection[str] = ()


Pass = Callable[[fx.GraphModule, Context], PassResult]


@dataclass(frozen=True)
class PipelineResult:
    graph_module: fx.GraphModule
    results: tuple[tuple[str, PassResult], ...]
    seconds: Mapping[str, float]
    read: frozenset[str] = frozenset()  # get_attr targets whose values the passes relied on

    @property
    def rewritten(self) -> tuple[Rewrite, ...]:
        return tuple(r for _, result in self.results for r in result.rewritten)

    @property
    def skipped(self) -> tuple[Skip, ...]:
        return tuple(s for _, result in self.results for s in result.skipped)

    @property
    def found(self) -> tuple[Layer, ...]:
        return tuple(layer for _, result in self.results for layer in result.found)


def run_pipeline(gm: fx.GraphModule, passes: Iterable[Pass], ctx: Context) -> PipelineResult:
    """Run `passes` over a copy of `gm` (whose tensors are shared), checking each pass's contract here, once.

    Raises:
        RewriteError: a pass raised, left an invalid graph or changed the outputs' shapes; the message names it and
            those that ran before.
    """
    # a deep copy of a graph copies nodes and their meta, no tensors
    work = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    expected = _output_signature(work)
    results: list[tuple[str, PassResult]] = []
    seconds: dict[str, float] = {}
    for run in passes:
        name = getattr(run, "__name__", repr(run))
        start = time.perf_counter()
        try:
            result = run(work, ctx)
            work.graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node))
            work.graph.lint()
            if (now := _output_signature(work)) != expected:
                raise RewriteError(f"outputs were {expected} and became {now}")
        except Exception as error:
            done = ", ".join(name for name, _ in results) or "none"
            raise RewriteError(f"pass {name} failed (passes before it: {done}): {error}") from error
        seconds[name] = time.perf_counter() - start
        results.append((name, result))
        log.debug("pass %s: %d rewritten, %d left", name, len(result.rewritten), len(result.skipped))
    work.recompile()
    return PipelineResult(work, tuple(results), seconds, take_read(work))


def _output_signature(gm: fx.GraphModule) -> tuple[object, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    signature: list[object] = []
    for node in output.all_input_nodes:
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            signature.append((tuple(str(s) for s in val.shape), val.dtype))
    return tuple(signature)
