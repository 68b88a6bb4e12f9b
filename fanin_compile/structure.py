"""What the structures of packed weights share: int64 numbers at the beginning, then arrays at offsets they name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import ClassVar, Self

import torch
from torch import Tensor

from .errors import FormatError

_SLACK = 32  # numbers of values are rounded up by nnz / _SLACK at most


@dataclass(frozen=True)
class Numbers:
    """The int64 numbers at the beginning of a structure, in the order and by the names of the kernels' headers."""

    VERSION: ClassVar[int]
    SIZE: ClassVar[int]  # bytes kept for them
    ALIGNMENT: ClassVar[int]  # bytes, of the arrays

    version: int
    bytes: int

    @classmethod
    def read(cls, structure: Tensor) -> Self:
        """FormatError if `structure` is no whole structure of this kind and version."""
        if structure.dtype != torch.uint8 or structure.ndim != 1 or len(structure) < cls.SIZE:
            raise FormatError(
                f"structure is {structure.dtype} {tuple(structure.shape)}, "
                f"expected a packed weight's: torch.uint8, one dimension, at least {cls.SIZE} bytes"
            )
        numbers = structure[: 8 * len(fields(cls))].clone().view(torch.int64).tolist()  # a copy is aligned
        header = cls(*numbers)
        if header.version != cls.VERSION:
            raise FormatError(
                f"structure is of version {header.version:#x}, expected {cls.VERSION:#x}: "
                "pack it anew from the condensed weight"
            )
        if header.bytes != len(structure):
            raise FormatError(
                f"structure has {len(structure)} bytes, expected {header.bytes}: it was cut off"
            )
        if not header.sound():
            raise FormatError(f"structure's header contradicts itself, it is damaged: {header}")
        return header

    def sound(self) -> bool:
        """Whether the numbers can stand side by side."""
        raise NotImplementedError

    def part(self, structure: Tensor, name: str, at: int, length: int, dtype: torch.dtype) -> Tensor:
        """int64 [length], the array that begins at byte `at`. FormatError if it is not inside the structure."""
        end = at + length * dtype.itemsize
        if length < 0 or at % self.ALIGNMENT or not self.SIZE <= at <= end <= len(structure):
            raise FormatError(f"{name} are bytes {at} to {end} of {len(structure)}: the structure is damaged")
        return structure[at:end].clone().view(dtype).to(torch.int64)


def capacity(entries: int, nnz: int, least: int) -> int:
    """Room for so many values: a multiple of `least`, so that most changes of a mask leave the tensor's size alone."""
    step = max(least, nnz // _SLACK // least * least)
    return -(-entries // step) * step


def write(kind: type[Numbers], parts: Sequence[Tensor], header: Callable[..., Numbers]) -> Tensor:
    """A structure uint8 of `parts`, of which header(*offsets, bytes=...) are the numbers."""
    offsets, end = [], kind.SIZE
    for part in parts:
        offsets.append(end)
        end += -(-part.nbytes // kind.ALIGNMENT) * kind.ALIGNMENT
    structure = torch.zeros(end, dtype=torch.uint8)
    numbers = torch.tensor(astuple(header(*offsets, bytes=end)))
    for offset, part in zip((0, *offsets), (numbers, *parts), strict=True):
        structure[offset : offset + part.nbytes] = part.flatten().view(torch.uint8)
    return structure


def expect_sound(part: str, holds: bool) -> None:
    """FormatError unless `holds`."""
    if not holds:
        raise FormatError(f"{part} of the structure do not fit the rest of it: it is damaged")
