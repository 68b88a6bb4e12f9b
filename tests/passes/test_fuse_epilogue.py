from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.graph import LAYER
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from tests.compile_support import randn, sparse_linear
from tests.passes.support import calls, graph_of, run

gather_matmul = torch.ops.fanin.gather_matmul.default


class _Epilogue(nn.Module):
    def __init__(self, epilogue: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.epilogue = sparse_linear(64, 64, 6), epilogue

    def forward(self, x: Tensor) -> Tensor:
        return self.epilogue(self.a(x), x)


def _fuse(epilogue: Callable[[Tensor, Tensor], Tensor]) -> tuple[list[str], int]:
    """Run the passes; what was fused, and how many operators remain."""
    x = randn(5, 64)
    gm = graph_of(_Epilogue(epilogue), x)
    result = run(gm, condense_linear, fuse_epilogue, inputs=(x,))
    (node,) = calls(gm, gather_matmul)
    assert node.meta[LAYER].name == "a"
    assert {r.layer for r in result.rewritten} <= {"a"}
    return [r.detail for r in result.rewritten], len(
        list(gm.graph.find_nodes(op="call_function", target=gather_matmul))
    ) + sum(n.op == "call_function" and n.target is not gather_matmul for n in gm.graph.nodes)


MATCHES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[str]]] = {
    "relu": (lambda h, x: F.relu(h), ["+ relu"]),
    "relu in place": (lambda h, x: F.relu(h, inplace=True), ["+ relu"]),
    "relu6": (lambda h, x: F.relu6(h), ["+ relu6"]),
    "relu6 in place": (lambda h, x: F.relu6(h, inplace=True), ["+ relu6"]),
    "hardtanh of 0 and 6": (lambda h, x: F.hardtanh(h, 0.0, 6.0), ["+ relu6"]),
    "hardtanh in place": (lambda h, x: F.hardtanh(h, 0.0, 6.0, inplace=True), ["+ relu6"]),
    "clamp to 0 and 6": (lambda h, x: h.clamp(0, 6), ["+ relu6"]),
    "clamp in place": (lambda h, x: h.clamp_(min=0.0, max=6.0), ["+ relu6"]),
    "clamp from 0": (lambda h, x: h.clamp(min=0), ["+ relu"]),
    "clamp from 0 in place": (lambda h, x: h.clamp_(min=0.0), ["+ relu"]),
    "clamp_min": (lambda h, x: h.clamp_min(0), ["+ relu"]),
    "clamp_min in place": (lambda h, x: h.clamp_min_(0.0), ["+ relu"]),
    "permuted residual": (lambda h, x: h.t() + x.t(), ["+ residual"]),
    "permuted residual on the left": (lambda h, x: x.t() + h.permute(-1, 0), ["+ residual"]),
    "permuted residual in place": (lambda h, x: h.transpose(0, 1).add_(x.t()), ["+ residual"]),
    "residual and relu6": (lambda h, x: F.relu6(h + x), ["+ residual", "+ relu6"]),
    "gelu": (lambda h, x: F.gelu(h), ["+ gelu"]),
    "gelu tanh": (lambda h, x: F.gelu(h, approximate="tanh"), ["+ gelu_tanh"]),
    "silu": (lambda h, x: F.silu(h), ["+ silu"]),
    "hardswish": (lambda h, x: F.hardswish(h), ["+ hardswish"]),
    "sigmoid": (lambda h, x: h.sigmoid(), ["+ sigmoid"]),
    "tanh": (lambda h, x: h.tanh_(), ["+ tanh"]),
    "residual": (lambda h, x: h + x, ["+ residual"]),
    "residual on the right": (lambda h, x: x + h, ["+ residual"]),
    "residual in place": (lambda h, x: h.add_(x), ["+ residual"]),
    "both": (lambda h, x: F.relu(h + x), ["+ residual", "+ relu"]),
    "expanded residual": (lambda h, x: h + x[:1].expand(5, 64), ["+ residual"]),
}


@pytest.mark.parametrize("name", MATCHES)
def test_fuses(name: str) -> None:
    epilogue, details = MATCHES[name]
    fused, operators = _fuse(epilogue)
    assert fused == details
    assert operators <= (
        4 if "permuted" in name else 3
    )  # the gather-matmul, slices or permutations of x and of y


def _written_over(h: Tensor, x: Tensor) -> Tensor:
    """The permuted output is added to what its input has become."""
    p = h.t()
    x.mul_(2)
    return p + x.t()


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "another reader": lambda h, x: F.relu(h) * h,
    "scaled residual": lambda h, x: torch.add(h, x, alpha=2),
    "broadcast residual": lambda h, x: h + x[:1],
    "scalar": lambda h, x: h + 1.0,
    "wider residual": lambda h, x: h + x.double(),
    "added to itself": lambda h, x: h + h,
    "unknown activation": lambda h, x: F.elu(h),
    "hardtanh of -1 and 1": lambda h, x: F.hardtanh(h),
    "clamp to 0 and 5": lambda h, x: h.clamp(0, 5),
    "clamp to -1 and 6": lambda h, x: h.clamp(-1, 6),
    "clamp from 1": lambda h, x: h.clamp(min=1),
    "clamp_min of 1": lambda h, x: h.clamp_min(1),
    "clamp_min by a tensor": lambda h, x: h.clamp_min(torch.zeros(64)),
    "permuted residual of another layout": lambda h, x: h.t() + x.t().contiguous(),
    "permuted residual, other readers": lambda h, x: (p := h.t()) + x.t() * p,
    "a residual written over in between": lambda h, x: _written_over(h, x.clone()),
    "clamp without a floor": lambda h, x: h.clamp(max=6),
    "clamp by tensors": lambda h, x: torch.clamp(h, torch.zeros(64), torch.full((64,), 6.0)),
}


@pytest.mark.parametrize("name", LEFT)
def test_leaves(name: str) -> None:
    assert _fuse(LEFT[name])[0] == []


def test_an_activation_before_the_residual_stops_it() -> None:
    assert _fuse(lambda h, x: F.relu(h) + x)[0] == ["+ relu"]
    assert _fuse(lambda h, x: F.relu(F.relu(h).sigmoid()))[0] == ["+ relu"]
