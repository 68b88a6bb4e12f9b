"""Convolutions that write over the residual they add: only where nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.condensed import CondensedWeight
from fanin_compile.packing_conv import pack_conv
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.reuse_residuals import reuse_residuals
from tests.compile_support import assert_equals_model, compiled, no_warning_of_ours, randn, recorded
from tests.passes.support import calls, context, graph_of, run
from tests.test_ops_conv import arguments, condensed

in_place, plain = torch.ops.fanin.gather_conv_.default, torch.ops.fanin.gather_conv.default
Body = Callable[["Convolutions", Tensor], Any]


def sparse_conv(channels: int, out: int, kernel: int, **options: Any) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, **options)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape) < 0.15)
    return conv


class Convolutions(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = sparse_conv(16, 64, 1), sparse_conv(64, 32, 1), sparse_conv(32, 64, 1)
        self.wide, self.body = sparse_conv(64, 64, 3), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def block(m: Convolutions, h: Tensor) -> Tensor:
    return F.relu(m.c(F.relu(m.b(h))) + h)


def two_blocks(m: Convolutions, x: Tensor) -> Tensor:
    return block(m, block(m, F.relu(m.a(x))))


MATCHES: dict[str, tuple[Body, int]] = {
    "one block": (lambda m, x: block(m, m.a(x)), 1),
    "two blocks": (two_blocks, 2),
    "on the left": (lambda m, x: (h := m.a(x)) + m.c(m.b(h)), 1),
    "read by others before": (lambda m, x: (h := m.a(x), h.sum() * F.relu(m.c(m.b(h)) + h))[1], 1),
}
OTHERS: dict[str, Body] = {
    "an input": lambda m, x: m.c(m.b(m.a(x))) + x.repeat(1, 4, 1, 1),
    "read later": lambda m, x: (h := m.a(x), y := F.relu(m.c(m.b(h)) + h), y * h)[2],
    "an output": lambda m, x: (h := m.a(x), F.relu(m.c(m.b(h)) + h)),
    "a view is read later": lambda m, x: (
        h := m.a(x),
        v := h.flatten(1),
        y := F.relu(m.c(m.b(h)) + h),
        y.flatten(1) + v,
    )[3],
    "a view": lambda m, x: F.relu(m.c(m.b(h := m.a(x))) + h.transpose(2, 3)),
    "of other strides": lambda m, x: F.relu(
        m.c(m.b(h := m.a(x)).contiguous(memory_format=torch.channels_last)) + h
    ),
    "broadcast": lambda m, x: F.relu(m.c(m.b(h := m.a(x))) + h.mean((2, 3), keepdim=True)),
    "spatial": lambda m, x: F.relu(m.wide(h := m.a(x)) + h),
    "its own input": lambda m, x: m.wide(m.a(x)),
}


@pytest.mark.parametrize("which", MATCHES)
def test_writes_over_residuals_that_nobody_reads_any_more(which: str) -> None:
    body, count = MATCHES[which]
    x = randn(2, 16, 7, 7)
    gm = graph_of(Convolutions(body), x)
    result = run(
        gm, condense_conv, fuse_epilogue, reuse_residuals, ctx=context(gm, in_place=True), inputs=(x,)
    )
    assert [r.detail for r in result.rewritten] == ["in place of the residual"] * count
    assert {r.layer.split()[0] for r in result.rewritten} == {"c"}
    assert len(list(gm.graph.find_nodes(op="call_function", target=in_place))) == count


@pytest.mark.parametrize("which", OTHERS)
def test_leaves_all_others_their_own_output(which: str) -> None:
    x = randn(2, 16, 7, 7)
    gm = graph_of(Convolutions(OTHERS[which]), x)
    ctx = context(gm, in_place=True)
    assert not run(gm, condense_conv, fuse_epilogue, reuse_residuals, ctx=ctx, inputs=(x,)).rewritten
    assert not calls(gm, in_place)


def test_only_where_the_context_allows_it() -> None:
    x = randn(2, 16, 7, 7)
    gm = graph_of(Convolutions(two_blocks), x)
    assert not run(gm, condense_conv, fuse_epilogue, reuse_residuals, inputs=(x,)).rewritten
    assert len(calls(gm, plain)) == 5


def test_compiled_blocks_are_those_of_the_dense_model() -> None:
    model = Convolutions(two_blocks).eval()
    with recorded() as compilations, no_warning_of_ours():
        call = compiled(model, options={"cost_gate": False, "strict": True})
        for batch, size in ((1, 9), (3, 8), (8, 5)):
            x = randn(batch, 16, size, size)
            kept = x.clone()
            assert_equals_model(call(x), model, x)
            assert torch.equal(x, kept)
    for compilation in compilations:
        assert compilation.result is not None
        assert sum(r.detail == "in place of the residual" for r in compilation.result.rewritten) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "size"), [(1, 9), (1, 31), (3, 7)])
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_the_operator_in_place_has_the_bits_of_the_plain_one(
    kernel: int, size: int, density: float, channels_last: bool, dtype: torch.dtype
) -> None:
    """Rows side by side, fillers of a missing row, ablated ones, blocks that overlap; strides that do not fit."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(21, 70, kernel, kernel, generator=generator) < density
    mask[4:6] = False
    weight = CondensedWeight.from_dense(torch.randn(mask.shape, generator=generator).to(dtype), mask)
    pads, ones = [kernel // 2] * 2, [1, 1]
    p = pack_conv(weight, stride=ones, padding=pads, dilation=ones, groups=1)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, bias = torch.randn(2, 70, size, size, dtype=dtype), torch.randn(21, dtype=dtype)
    x = x.contiguous(memory_format=format)
    for strides in (torch.contiguous_format, torch.channels_last):
        residual = torch.randn(2, 21, size, size, dtype=dtype).contiguous(memory_format=strides)
        args = (p.values, p.structure, bias, weight.shape, ones, pads, ones, 1, "relu")
        expected = torch.ops.fanin.gather_conv(x, *args, residual)
        torch.ops.fanin.gather_conv_(x, *args, residual)
        assert residual.is_contiguous(memory_format=strides)
        assert torch.equal(residual, expected)


def test_opcheck() -> None:
    args = arguments(condensed(1, 1, dtype=torch.float32), (2,), "relu")
    torch.library.opcheck(
        torch.ops.fanin.gather_conv_.default, args, test_utils=("test_schema", "test_faketensor")
    )
