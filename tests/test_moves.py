"""What an operator does to elements, `moved` does to facts about them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fanin_compile.axes import Spread
from fanin_compile.moves import is_move, moved
from tests.test_axes import whole

# of h [2, 12, 4, 6]
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda h: h.view(2, 3, 4, 24),
    "inferred view": lambda h: h.view(-1, 6),
    "flatten": lambda h: h.flatten(1, 2),
    "unflatten": lambda h: h.unflatten(1, (3, 4)),
    "transpose": lambda h: h.transpose(-1, 1),
    "permute": lambda h: h.permute(0, -1, 1, 2),
    "unsqueeze": lambda h: h.unsqueeze(-2),
    "squeeze": lambda h: h[:1].squeeze(),
    "squeeze of one": lambda h: h[:, :1].squeeze(1),
    "slice": lambda h: h[:, 2:-3],
    "steps": lambda h: h[:, 1::3],
    "select": lambda h: h[:, -2],
    "chunk": lambda h: h.chunk(3, dim=1)[1],
    "last chunk": lambda h: h.chunk(5, dim=-3)[-1],
    "split": lambda h: h.split([5, 4, 3], dim=1)[2],
    "unbind": lambda h: h.unbind(2)[3],
    "cat": lambda h: torch.cat([h, h[:, :5]], 1),
    "cat of others": lambda h: torch.cat([h[:, :, 0], h[:, :, 3]], -1),
    "stack of views": lambda h: torch.cat([h.view(2, 12, 2, 2, 6), h.view(2, 12, 2, 2, 6)], 2),
    "stack": lambda h: torch.stack([h, h.clone()], 2),
    "stack of others": lambda h: torch.stack([h[:, :, 0], h[:, :, 3]], -1),
    "flip": lambda h: h.flip(1, -1),
    "mT": lambda h: h.mT,
    "roll": lambda h: h.roll((1, 2), (0, -1)),
    "flip of merged ones": lambda h: h.flatten(1, 2).flip(1),
    "nearest upsampling": lambda h: F.interpolate(h, scale_factor=2),
    "exact upsampling": lambda h: F.interpolate(h, size=(9, 7), mode="nearest-exact"),
    "bilinear upsampling": lambda h: F.interpolate(h, scale_factor=2, mode="bilinear"),
    "expand": lambda h: h[:, :, :1].expand(-1, -1, 5, 6),
    "expand to more": lambda h: h.expand(3, 2, 12, 4, 6),
    "repeat": lambda h: h.repeat(1, 2, 1, 3),
    "repeat to more": lambda h: h[0].repeat(5, 1, 1, 1),
    "clone": lambda h: h.contiguous().clone(),
    "mean": lambda h: h.mean((0, -1)),
    "mean, kept": lambda h: h.mean(0, keepdim=True),
    "max": lambda h: h.amax(-1),
    "pool": lambda h: F.max_pool2d(h, 2),
    "adaptive pool": lambda h: F.adaptive_avg_pool2d(h, 2),
    "pad": lambda h: F.pad(h, (1, 2)),
}


@pytest.mark.parametrize("name", MOVES)
@settings(deadline=None, max_examples=8)
@given(varying=st.lists(st.booleans(), min_size=4, max_size=4))
def test_facts_move_as_elements_do(name: str, varying: list[bool]) -> None:
    sizes = [n if varies else 1 for n, varies in zip((2, 12, 4, 6), varying, strict=True)]
    facts = torch.arange(torch.Size(sizes).numel(), dtype=torch.float64).reshape(sizes)
    elements = facts.expand(2, 12, 4, 6).contiguous()
    gm = make_fx(MOVES[name], pre_dispatch=True, tracing_mode="fake")(elements)
    expected = dict(_values(gm, elements))
    known: dict[object, Spread] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            axes = tuple((size,) for size in (2, 12, 4, 6))
            known[node] = Spread(axes, facts)
        elif node.op == "call_function" and is_move(node):
            spread = moved(node, known.get, _agree)
            if spread is not None:
                known[node] = spread
                if not _mixes(name):
                    facts_now = whole(spread)
                    assert bool(((facts_now == expected[node]) | facts_now.isnan()).all()), node
    (result,) = next(iter(gm.graph.find_nodes(op="output"))).all_input_nodes
    if not any(varying):
        assert result in known
    elif sum(varying) == 1 and varying[1] and not _mixes(name):
        assert result in known, "facts that vary along the channels alone get through all of these"


def _mixes(name: str) -> bool:
    """Padding brings elements of its own, which take the facts of their neighbours."""
    return name == "pad"


def _agree(data: list[Tensor]) -> Tensor:
    """NaN where elements that share a fact differ."""
    first = data[0]
    for other in data[1:]:
        first = torch.where(first == other, first, torch.nan)
    return first


def _values(gm: fx.GraphModule, x: Tensor) -> list[tuple[fx.Node, Tensor]]:
    """What each node computes."""
    seen: list[tuple[fx.Node, Tensor]] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            value = super().run_node(n)
            seen.append((n, value))
            return value

    Recorder(gm).run(x)
    return seen
