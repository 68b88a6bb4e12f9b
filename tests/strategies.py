"""Hypothesis strategies shared by the tests: weights whose shapes, masks and values break layouts."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

# Each leaves a remainder in loops over 4, 8 or 16 lanes.
SIZES = (1, 2, 7, 63, 100)
KERNELS: tuple[tuple[int, ...], ...] = ((), (1,), (3,), (1, 1), (3, 3), (2, 1, 3))
Kind = Literal["constant", "ragged"]


class Masked(NamedTuple):
    """A dense weight [out, in/groups, *kernel] and its bool mask; the weight is not 0 outside the mask."""

    weight: Tensor
    mask: Tensor

    @property
    def effective(self) -> Tensor:
        return self.weight.masked_fill(~self.mask, 0)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**31 - 1)


@st.composite
def shapes(draw: st.DrawFn, *, kernels: tuple[tuple[int, ...], ...] = KERNELS) -> tuple[int, ...]:
    """Of Linear (kernel ()) and Conv1d/2d/3d weights."""
    return (draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES)), *draw(st.sampled_from(kernels)))


@st.composite
def masked_weights(
    draw: st.DrawFn,
    *,
    kind: Kind | None = None,
    kernels: tuple[tuple[int, ...], ...] = KERNELS,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Masked:
    """Constant fan-in (k = 1 and k = dense included) or ragged, with ablated rows, some of them or all.

    Inside the mask stand exact zeros, negative zeros and rows that sum to 0; outside it, NaN.
    """
    shape = draw(shapes(kernels=kernels))
    kinds: tuple[Kind, ...] = (kind,) if kind else ("constant", "ragged")
    mask = draw(masks(shape, draw(st.sampled_from(kinds))))
    generator = torch.Generator().manual_seed(draw(seeds()))
    weight = torch.randn(shape, generator=generator).to(draw(st.sampled_from(dtypes)))
    special = torch.rand(shape, generator=generator)
    weight[special < 0.2] = 0.0
    weight[special < 0.1] = -0.0
    if draw(st.booleans()):
        flat = weight.flatten(1)
        flat[0] = torch.where(torch.arange(flat.shape[1]) % 2 == 0, 1.0, -1.0)
    return Masked(weight.masked_fill(~mask, float("nan")), mask)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...], kind: Kind) -> Tensor:
    """A bool mask of `shape`. Rows are ablated with probability 0, 1/4 or 1."""
    out, dense_fan_in = shape[0], int(torch.Size(shape[1:]).numel())
    generator = torch.Generator().manual_seed(draw(seeds()))
    scores = torch.rand(out, dense_fan_in, generator=generator)
    if kind == "constant":
        k = draw(st.sampled_from(sorted({1, 2, dense_fan_in // 10, dense_fan_in - 1, dense_fan_in})))
        k = min(max(k, 1), dense_fan_in)
        mask = torch.zeros(out, dense_fan_in, dtype=torch.bool).scatter_(1, scores.topk(k).indices, True)
    else:
        mask = scores < draw(st.sampled_from((0.05, 0.5, 0.9)))
    mask[torch.rand(out, generator=generator) < draw(st.sampled_from((0.0, 0.25, 1.0)))] = False
    return mask.view(shape)
