"""max_autotune: a linear layer's form is chosen by measuring it, with its own mask at its own batch size.

The cost gate (cost.py) estimates from the host's rates in no time; this times every variant of the table
(kernels/variants.py) and the dense layer, interleaved, about 0.3 s for each distinct layer, batch size and number of
threads. Layers alike are measured once, so that packing changed weights anew comes to the same choice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fanin_compile import ops, timing  # noqa: F401  (ops defines the operator called below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.kernels.variants import VARIANTS, Variant
from fanin_compile.packed import Packed
from fanin_compile.records import Layer, Skip

log = logging.getLogger("fanin_compile")

SECONDS = 0.3  # for one layer, shared by its variants and the dense form
_CHUNK = 4096  # batch rows measured at most: beyond, the work is proportional


@dataclass(frozen=True)
class Choice:
    """What was measured of one layer: microseconds by the variant's name, and of the dense layer."""

    variant: Variant
    times: dict[str, float]
    dense: float

    def __str__(self) -> str:
        measured = ", ".join(f"{name} {us:.0f}" for name, us in self.times.items())
        return f"variant {self.variant.name} (us: {measured}, dense {self.dense:.0f})"


_choices: dict[tuple[object, ...], Choice] = {}


def tuned_pack(weight: CondensedWeight, layer: Layer) -> tuple[Packed, str] | Skip:
    """Pack a linear layer in its fastest variant and say which; a Skip if dense was measured to be faster still."""
    choice = choose(weight, layer.batch)
    best = choice.times[choice.variant.name]
    if best >= choice.dense:
        values = {"batch": layer.batch, "dense": f"{choice.dense:.0f} us", "condensed": f"{best:.0f} us"}
        return Skip(layer.name, "dense was measured to be faster", values)
    return choice.variant.pack(weight), str(choice)


def choose(weight: CondensedWeight, batch: int) -> Choice:
    """The variant in which `batch` rows of a layer take the least time on this host, at the present thread count."""
    batch = max(1, min(batch, _CHUNK))
    key = (weight.shape, weight.nnz, weight.values.dtype, batch, torch.get_num_threads())
    if key not in _choices:
        _choices[key] = _measure(weight, batch)
        log.info("max_autotune: %s at batch %d: %s", weight, batch, _choices[key])
    return _choices[key]


def _measure(weight: CondensedWeight, batch: int) -> Choice:
    generator = torch.Generator().manual_seed(0)
    out, in_features = weight.shape
    x = torch.randn(batch, in_features, generator=generator).to(weight.values.dtype)
    dense = weight.to_dense()
    packed = [variant.pack(weight) for variant in VARIANTS]

    def run(p: Packed) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(x, p.values, p.structure, None, out)
        return y

    condensed = [lambda p=p: run(p) for p in packed]
    with torch.inference_mode(False):
        timings = timing.interleaved([lambda: F.linear(x, dense), *condensed], SECONDS)
    # the least: what else the host does meanwhile is not the layer's
    dense_us, *ours = (t.least / 1e3 for t in timings)
    times = {variant.name: us for variant, us in zip(VARIANTS, ours, strict=True)}
    best = min(range(len(VARIANTS)), key=lambda i: ours[i])
    if ours[best] > 0.97 * ours[0]:
        best = 0  # within noise: the default
    return Choice(VARIANTS[best], times, dense_us)
