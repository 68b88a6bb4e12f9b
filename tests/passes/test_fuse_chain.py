from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.passes import PIPELINE
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.fuse_chain import fuse_chain
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.pipeline import run_pipeline
from fanin_compile.records import Skip
from tests.compile_support import compiled, randn, recorded, sparse_linear
from tests.helpers import assert_close_fp64
from tests.passes.support import calls, context, graph_of, run

gather_matmul = torch.ops.fanin.gather_matmul.default
chain = torch.ops.fanin.gather_matmul_chain.default
PASSES = (drop_identities, condense_linear, fuse_epilogue, fuse_chain)

Forward = Callable[[Any, Tensor], Any]


class _Net(nn.Module):
    """Layers to build forwards of: a, g, u [64 -> 96], b [96 -> 64], c [64 -> 64]; some neurons without inputs."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.g, self.u = (sparse_linear(64, 96, 6, ablated=i, seed=i) for i in range(3))
        self.plain = sparse_linear(64, 96, 6, bias=False, seed=6)
        self.b, self.c = sparse_linear(96, 64, 9, seed=4), sparse_linear(64, 64, 9, ablated=3, seed=5)
        self.drop, self._forward = nn.Dropout(0.5), forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _fuse(forward: Forward, *shape: int) -> tuple[torch.fx.GraphModule, dict[str, str], tuple[Skip, ...]]:
    """Run the passes; what each layer became part of, and what was refused."""
    x = randn(*(shape or (2, 5, 64)))
    gm = graph_of(_Net(forward), x)
    result = run(gm, *PASSES, inputs=(x,))
    return gm, {r.layer: r.detail for r in result.rewritten}, result.skipped


CHAINS: dict[str, tuple[Forward, str]] = {
    "fused activation": (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
    "no activation": (lambda m, x: m.b(m.a(x)), "none"),
    "dropout before the activation": (lambda m, x: m.b(F.silu(m.drop(m.a(x)))), "silu"),
    "dropout after the activation": (lambda m, x: m.b(m.drop(F.relu(m.a(x), inplace=True))), "relu"),
    "a copy": (lambda m, x: m.b(F.relu(m.a(x)).contiguous().clone()), "relu"),
    "views": (lambda m, x: m.b(F.relu(m.a(x).view(-1, 96)).view(5, 2, 96)), "relu"),
    "a view with the last size left open": (lambda m, x: m.b(m.a(x).reshape(10, -1).sigmoid()), "sigmoid"),
    "flatten": (lambda m, x: m.b(F.hardswish(m.a(x).flatten(0, 1))), "hardswish"),
    "a residual at the end": (lambda m, x: m.b(F.relu(m.a(x))) + x, "relu"),
    "a residual and an activation at the end": (lambda m, x: F.relu(m.b(m.a(x).tanh()) + x), "tanh"),
    "the input is read by others": (lambda m, x: m.b(F.relu(m.a(x))) * x + m.c(x), "relu"),
    "an input with strides": (lambda m, x: m.b(F.relu(m.a(x.transpose(0, 1)))), "relu"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_two_layers_become_one_call(name: str) -> None:
    forward, activation = CHAINS[name]
    gm, details, skipped = _fuse(forward)
    (node,) = calls(gm, chain)
    assert details == {"a": "chained into b", "b": "chained onto a"}
    assert (node.args[4], node.args[5], node.args[9], node.args[10]) == (activation, False, 96, 64)
    assert [s for s in skipped if s.layer == "b"] == []


GATED: dict[str, Forward] = {
    "gate first": lambda m, x: m.b(F.silu(m.g(x)) * m.u(x)),
    "gate last": lambda m, x: m.b(m.u(x) * F.gelu(m.g(x))),
    "dropout": lambda m, x: m.b(m.drop(m.drop(F.silu(m.g(x))) * m.u(x))),
    "views of the product": lambda m, x: m.b((F.silu(m.g(x)) * m.u(x)).view(-1, 96)),
    "residual": lambda m, x: m.b(F.silu(m.g(x)) * m.u(x)) + x,
    "no activation": lambda m, x: m.b(m.g(x) * m.u(x)),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_and_its_partner_become_one_weight(name: str) -> None:
    gm, details, _ = _fuse(GATED[name])
    (node,) = calls(gm, chain)
    assert (node.args[5], node.args[9]) == (True, 96)
    assert details["g"] == details["u"] == "chained into b"
    assert details["b"] in ("chained onto g and u", "chained onto u and g")
    assert calls(gm, gather_matmul) == []


def test_a_bias_that_one_of_both_lacks_is_0() -> None:
    for forward in (
        lambda m, x: m.b(F.silu(m.plain(x)) * m.u(x)),
        lambda m, x: m.b(F.silu(m.u(x)) * m.plain(x)),
        lambda m, x: m.b(F.silu(m.plain(x)) * m.g(x)),
    ):
        gm, _, _ = _fuse(forward)
        (node,) = calls(gm, chain)
        assert node.args[3] is not None


def _in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    h = m.a(y)
    y.zero_()
    return m.b(F.relu(h)) + y  # type: ignore[no-any-return]


LEFT: dict[str, tuple[Forward, str]] = {
    "another reader": (lambda m, x: (m.b(h := F.relu(m.a(x))), h.sum(-1)), "its output is read by sum"),
    "a graph output": (
        lambda m, x: (m.b(h := F.relu(m.a(x))), h),
        "its output is read by the graph's output",
    ),
    "read before the activation": (
        lambda m, x: m.b(F.relu(h := m.a(x))) + h.sum(),
        "its output is read by sum",
    ),
    "a residual on the first": (
        lambda m, x: m.b(F.relu(m.a(x) + torch.cat([x, x[..., :32]], -1))),
        "a residual is added to its output",
    ),
    "h is the residual": (lambda m, x: m.c(h := m.c(x)) + h, "its output is"),
    "unknown activation": (lambda m, x: m.b(F.elu(m.a(x))), "no kernel computes elu"),
    "two activations": (lambda m, x: m.b(F.relu(m.a(x)).sigmoid()), "two activations"),
    "in place between": (_in_place, "zero_ (aten.zero_.default) between them works in place"),
    "gate and up read different inputs": (
        lambda m, x: m.b(F.silu(m.g(x)) * m.u(x + 1)),
        "gate and up projection read different inputs",
    ),
    "a shared gate": (
        lambda m, x: m.b(F.silu(m.g(x)) * m.u(x)) + m.b(F.silu(m.g(y := x + 1)) * m.u(y)),
        "a weight of the gate serves several calls",
    ),
    "both gated": (
        lambda m, x: m.b(F.silu(m.g(x)) * m.u(x).sigmoid()),
        "the gate alone may have an activation",
    ),
    "an activation of the product": (lambda m, x: m.b(F.relu(m.g(x) * m.u(x))), "the gate alone may have"),
    "the gate is read elsewhere": (
        lambda m, x: m.b(F.silu(h := m.g(x)) * m.u(x)) + h.sum(),
        "its output is read by sum",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_is_left_with_a_reason(name: str) -> None:
    forward, reason = LEFT[name]
    gm, details, skipped = _fuse(forward)
    assert calls(gm, chain) == []
    assert details == {}
    reasons = [s.reason for s in skipped if s.reason.startswith("not chained onto")]
    assert reasons
    assert all(reason in r for r in reasons), reasons


def test_what_is_no_chain_is_left_in_silence() -> None:
    for forward in (
        lambda m, x: m.c(F.layer_norm(m.c(x), (64,))),
        lambda m, x: m.b(F.relu(m.a(x)) * x.sum()),
        lambda m, x: m.b((h := m.a(x)) * h),
        lambda m, x: m.c(m.a(x).view(-1, 64)),  # the view crosses neurons
    ):
        gm, details, skipped = _fuse(forward)
        assert (calls(gm, chain), details) == ([], {})
        assert not [s for s in skipped if "chain" in s.reason]


def test_three_layers_are_a_chain_and_a_layer() -> None:
    gm, details, skipped = _fuse(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))))
    assert details == {"a": "chained into b", "b": "chained onto a"}
    assert [s.reason for s in skipped if s.layer == "c"] == ["not chained: its input is a chain already"]
    (node,) = calls(gm, chain)
    assert node.args[11] == "relu"


def test_a_shared_weight_chains_without_a_copy() -> None:
    gm, _, _ = _fuse(lambda m, x: m.b(F.relu(m.a(m.b(F.relu(m.a(x)))))))
    first, second = calls(gm, chain)
    assert first.args[1] is second.args[1]
    assert first.args[6] is second.args[6]


def test_half_precision() -> None:
    net = _Net(GATED["gate first"]).to(torch.bfloat16)
    x = randn(2, 5, 64).bfloat16()
    gm = graph_of(net, x)
    gm = run_pipeline(gm, PIPELINE, context(gm)).graph_module
    assert len(calls(gm, chain)) == 1
    torch.testing.assert_close(gm(x), net(x), rtol=0.05, atol=0.3)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", ["fused activation", "gate first"])
def test_equal_to_fp64_through_the_backend_and_after_the_weights_change(name: str) -> None:
    net = _Net(CHAINS[name][0] if name in CHAINS else GATED[name])
    f = compiled(net, dynamic=True)
    with recorded() as compilations:
        for batch in (3, 2, 40):
            x = randn(batch, 7, 64, seed=batch)
            exact = _Net(net._forward).double()
            exact.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
            expected = exact.eval()(x.double())
            for parameter in exact.parameters():
                parameter.abs_()
            magnitude = exact(x.double().abs()).abs() + 1
            assert_close_fp64(f(x), expected, magnitude, k=64)
            for parameter in net.parameters():
                parameter.mul_(-0.75)  # packed anew, into the same buffers
    (compilation,) = compilations
    assert compilation.result is not None
    assert sum(r.became == "chain" for r in compilation.result.rewritten) in (2, 3)
