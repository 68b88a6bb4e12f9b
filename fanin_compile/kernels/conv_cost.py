"""What a condensed convolution takes on one core, from its shape alone; derivation and fit in CONV.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PEAK = 48.0  # fp32 multiply-adds per ns of the core the constants below were fitted on
CALL_US = 4.0  # dispatch, plan look-up and allocation
PACK_NS, COPY_NS = 0.25, 0.15  # a float packed into padded planes; copied for a pointwise layer
STORE_NS, FINISH_NS = 0.25, 0.1  # a float stored from a tile of sums; straight from registers
DENSE_SHARE, REORDER_NS = (
    0.95,
    0.5,
)  # of the peak that a dense direct convolution reaches; a float reordered for it
VECTOR = 8  # outputs of one vector


@dataclass(frozen=True)
class ConvShape:
    """One layer: spatial sizes of one image, and the non-zeros of the whole weight.

    Attributes:
        nnz: active weights over all output channels.
        weight_shape: [out, in/groups, *kernel].
        size, out_size: of x and y, one number for each kernel dimension.
    """

    nnz: int
    weight_shape: Sequence[int]
    size: Sequence[int]
    out_size: Sequence[int]
    stride: Sequence[int]
    groups: int = 1
    batch: int = 1

    @property
    def pointwise(self) -> bool:
        return math.prod(self.weight_shape[2:]) == 1 and tuple(self.size) == tuple(self.out_size)

    @property
    def floats_in(self) -> int:
        return self.groups * self.weight_shape[1] * math.prod(self.size)

    @property
    def floats_out(self) -> int:
        return self.weight_shape[0] * math.prod(self.out_size)

    @property
    def lanes(self) -> int:
        """Outputs computed of one channel: rows stand one after the other with their padding, in whole vectors."""
        pixels = math.prod(self.out_size)
        if not self.pointwise and len(self.out_size) > 1:
            pitch = self.out_size[-1] + (1 if self.weight_shape[-1] > 1 else 0)
            pixels = (pixels // self.out_size[-1] - 1) * pitch + self.out_size[-1]
        return math.ceil(pixels / VECTOR) * VECTOR


def condensed_us(shape: ConvShape, peak: float = PEAK) -> float:
    """Estimated microseconds on one core of `peak` multiply-adds per ns; within 25 % on ResNet-50's layers."""
    strided = max(shape.stride) > 1
    rate = (
        22.0 if shape.pointwise else 23.0 if strided else 27.0
    )  # of lanes, by the loads a multiply-add takes
    pack, store = (COPY_NS, FINISH_NS) if shape.pointwise else (PACK_NS, STORE_NS)
    image_ns = shape.nnz * shape.lanes / rate + pack * shape.floats_in + store * shape.floats_out
    return CALL_US + shape.batch * image_ns * PEAK / peak / 1e3


def dense_us(shape: ConvShape, peak: float = PEAK) -> float:
    """Estimated microseconds of the dense layer through oneDNN, reorders of x and y included."""
    macs = math.prod(shape.weight_shape) * math.prod(shape.out_size)
    image_ns = macs / (DENSE_SHARE * PEAK) + REORDER_NS * (shape.floats_in + shape.floats_out)
    return CALL_US + shape.batch * image_ns * PEAK / peak / 1e3
