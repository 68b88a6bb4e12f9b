"""max_autotune: a linear layer's form is chosen by measuring it, with its own mask at its own batch size.

A gate and its partner, which become one weight of a chain, are chosen anew by measuring the whole chain.

The cost gate (cost.py) estimates from the host's rates in no time; this times every variant of the table
(kernels/variants.py) and the dense layer, interleaved, about 0.3 s for each distinct layer, batch size and number of
threads. Layers alike are measured once, so that packing changed weights anew comes to the same choice.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops_chain, timing  # noqa: F401  (ops_chain and ops, which it imports, define the operators)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.kernels.variants import VARIANTS, Variant
from fanin_compile.packed import Header, Packed
from fanin_compile.packing import gate_rows, pack
from fanin_compile.records import Layer, Skip, left_dense

log = logging.getLogger("fanin_compile")

SECONDS = 0.3  # for one layer, shared by its variants and the dense form
_CHUNK = 4096  # batch rows measured at most: beyond, the work is proportional


@dataclass(frozen=True)
class Choice:
    """What was measured of one layer or chain: microseconds by the variant's name, and of the dense layer.

    Attributes:
        dense: not measured of a chain, whose layers were each found faster.
        active: of the active neurons alone as a dense layer, where others are ablated.
    """

    variant: Variant
    times: dict[str, float]
    dense: float | None = None
    active: float | None = None

    def __str__(self) -> str:
        measured = [f"{name} {us:.0f}" for name, us in self.times.items()]
        measured += [] if self.dense is None else [f"dense {self.dense:.0f}"]
        measured += [] if self.active is None else [f"active {self.active:.0f}"]
        return f"variant {self.variant.name} (us: {', '.join(measured)})"


_choices: dict[tuple[object, ...], Choice] = {}


def tuned_pack(weight: CondensedWeight, layer: Layer) -> tuple[Packed, str] | Skip:
    """Pack a linear layer in its fastest variant and say which; a Skip if dense, or dense on the active neurons alone,
    was measured to be faster still."""
    choice = choose(weight, layer.batch)
    best = choice.times[choice.variant.name]
    assert choice.dense is not None
    least = choice.dense if choice.active is None else min(choice.dense, choice.active)
    active = least == choice.active
    if best >= least:
        us = {"dense": choice.dense, "active": choice.active, "condensed": best}
        found = {form: time for form, time in us.items() if time is not None}
        return left_dense(layer.name, "was measured", found, active=active, batch=layer.batch)
    return choice.variant.pack(weight), str(choice)


def tuned_gate(gate: CondensedWeight, second: Packed, activation: str, batch: int) -> tuple[Packed, str]:
    """Pack a gate and its partner, one weight [2 * hidden, in], in the variant in which their chain is fastest.

    The number of vectors of a tile is a chain's own choice, so variants that differ in nothing else are left out.
    """
    batch = max(1, min(batch, _CHUNK))
    sizes = (*gate.shape, gate.nnz, *second.values.shape, activation)
    key = ("gate", *sizes, gate.values.dtype, batch, torch.get_num_threads())
    if key not in _choices:
        _choices[key] = _measure_gate(gate, second, activation, batch)
        log.info("max_autotune: chain of %s at batch %d: %s", gate, batch, _choices[key])
    choice = _choices[key]
    return _pack_gate(gate, choice.variant), str(choice)


def _pack_gate(gate: CondensedWeight, variant: Variant) -> Packed:
    return pack(gate, width=variant.width, block_rows=gate_rows(gate, variant.block_rows), tile=variant.tile)


def _measure_gate(gate: CondensedWeight, second: Packed, activation: str, batch: int) -> Choice:
    x = _input(gate, batch)
    header = Header.read(second.structure)
    variants = [v for v in VARIANTS if v.tile == VARIANTS[0].tile]

    def run(p: Packed) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul_chain(
            *(x, p.values, p.structure, None, activation, True, second.values, second.structure, None),
            *(header.in_, header.out),
        )
        return y

    with torch.inference_mode(False):
        packed = [_pack_gate(gate, variant) for variant in variants]
        timings = timing.interleaved([functools.partial(run, p) for p in packed], SECONDS)
    return _fastest(variants, [t.least / 1e3 for t in timings])


def choose(weight: CondensedWeight, batch: int) -> Choice:
    """The variant in which `batch` rows of a layer take the least time on this host, at the present thread count."""
    batch = max(1, min(batch, _CHUNK))
    key = (weight.shape, weight.nnz, weight.n_active, weight.values.dtype, batch, torch.get_num_threads())
    if key not in _choices:
        _choices[key] = _measure(weight, batch)
        log.info("max_autotune: %s at batch %d: %s", weight, batch, _choices[key])
    return _choices[key]


def _measure(weight: CondensedWeight, batch: int) -> Choice:
    out, x, dense = weight.shape[0], _input(weight, batch), weight.to_dense()
    packed = [variant.pack(weight) for variant in VARIANTS]

    def run(p: Packed) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(x, p.values, p.structure, None, out)
        return y

    condensed = [lambda p=p: run(p) for p in packed]
    active = []
    if weight.rows is not None and len(weight.rows):
        rows, constants = weight.rows.long(), dense.new_zeros(()).expand(batch, out)
        narrow = dense[rows]
        active.append(lambda: torch.index_copy(constants, 1, rows, F.linear(x, narrow)))
    with torch.inference_mode(False):
        timings = timing.interleaved([lambda: F.linear(x, dense), *condensed, *active], SECONDS)
    # the least: what else the host does meanwhile is not the layer's
    dense_us, *ours = (t.least / 1e3 for t in timings)
    active_us = ours.pop() if active else None
    return replace(_fastest(VARIANTS, ours), dense=dense_us, active=active_us)


def _input(weight: CondensedWeight, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, weight.shape[1], generator=generator).to(weight.values.dtype)


def _fastest(variants: Sequence[Variant], us: Sequence[float]) -> Choice:
    """The first, which is the default, where no other is faster by more than noise."""
    best = min(range(len(us)), key=lambda i: us[i])
    if us[best] > 0.97 * us[0]:
        best = 0
    return Choice(variants[best], {v.name: t for v, t in zip(variants, us, strict=True)})
