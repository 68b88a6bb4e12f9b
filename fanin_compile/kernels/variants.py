"""The table of linear kernel variants, read from variants.inc, which the C++ dispatch includes too.

for variant in VARIANTS:
    y = run_variant(variant.name, x, values, indices, ...)   # whatever the batch: for tests and measurements
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class Variant:
    """One kernel: `vectors` vectors of batch rows at a time, or dot products where it is 0."""

    name: str
    vectors: int
    why: str


_LINE = re.compile(r'^FANIN_VARIANT\((\w+), (\d+), [^"]*, "([^"]*)"\)$', re.MULTILINE)
VARIANTS = tuple(
    Variant(name, int(vectors), why)
    for name, vectors, why in _LINE.findall((Path(__file__).parent / "variants.inc").read_text())
)


def run_variant(
    variant: str,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor | None = None,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    plan: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """ops.gather_matmul by the named variant, on CPU, without autograd; ValueError for an unknown name."""
    if out_features is None:
        out_features = ops.default_out_features(indices, row_ptr, rows)
    ops.require_native()
    y: Tensor = torch.ops.fanin.gather_matmul_variant(
        x, values, indices, row_ptr, rows, bias, plan, out_features, activation, residual, variant
    )
    return y
