"""The table of linear kernel variants: what can be chosen when a weight is packed. Read by tests, benchmarks and
max_autotune (tuning.py).

for variant in VARIANTS:
    packed = variant.pack(weight)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..condensed import CondensedWeight
from ..packed import Packed
from ..packing import BLOCK_ROWS, MAX_TILE, pack


@dataclass(frozen=True)
class Variant:
    """How to pack a weight; the arguments of packing.pack. One batch row always runs as dot products."""

    name: str
    why: str
    width: int | None = None
    block_rows: int = BLOCK_ROWS
    tile: int = MAX_TILE

    def pack(self, weight: CondensedWeight) -> Packed:
        return pack(weight, width=self.width, block_rows=self.block_rows, tile=self.tile)


VARIANTS = (
    Variant(
        "default", "24 batch rows a tile: each weight serves three vectors, 12 sums hide the latency of FMA"
    ),
    Variant("two", "16 batch rows a tile: x and sums of a wide or tall layer stay in a small L2", tile=2),
    Variant("one", "8 batch rows a tile: x of a very wide layer stays in L2", tile=1),
    Variant(
        "tall", "blocks of 768 rows: fewer entries fill up groups, x is read half as often", block_rows=768
    ),
    Variant("flat", "blocks of 96 rows: more threads share one batch row", block_rows=96),
    Variant("short", "chunks of 127 columns: x of three vectors takes 12 KiB, for a small L1", width=127),
    Variant(
        "wide", "chunks of 1023 columns of two bytes: longer runs where there are few non-zeros", width=1023
    ),
)
