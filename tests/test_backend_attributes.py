"""Weights which Dynamo's graph holds itself, as get_attr nodes, instead of taking them as arguments at each call."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from fanin_compile import condense
from fanin_compile.backend import record
from fanin_compile.capture import capture
from tests.compile_support import (
    MLP,
    assert_equals_model,
    compiled,
    fan_in_mask,
    no_warning_of_ours,
    randn,
    recorded,
    rewritten,
    sparse_weight,
)
from tests.helpers import assert_close_at_scale

pytestmark = pytest.mark.usefixtures("dynamo")


class Plain(nn.Module):
    """Plain tensor attributes alone: a weight and its mask, a weight with zeros, a scale that stays dense."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        self.w, self.m = randn(48, 64, seed=seed), fan_in_mask(48, 64, 6, seed=seed).float()
        self.v = sparse_weight(10, 48, 5, seed=seed)
        self.scale = randn(64, seed=seed + 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(F.linear(x * self.scale.exp(), self.w * self.m)), self.v)


@contextmanager
def _marked(model: nn.Module, x: Tensor) -> Iterator[None]:
    for tensor in vars(model).values():
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor, guard=True)
    yield


@contextmanager
def _frozen_before(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Attributes keep the mark that Dynamo sets on them while freezing is on."""
    with inductor_config.patch(freezing=True), torch.no_grad():
        torch.compile(model, backend="eager")(x)
    torch._dynamo.reset()
    yield


@contextmanager
def _freezing(model: nn.Module, x: Tensor) -> Iterator[None]:
    with inductor_config.patch(freezing=True):
        yield


@contextmanager
def _freezing_after(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Attributes keep the mark of the first compilation: Dynamo guards their sizes, not which tensors they are."""
    with torch.no_grad():
        torch.compile(model, backend="eager")(x)
    torch._dynamo.reset()
    with inductor_config.patch(freezing=True):
        yield


@contextmanager
def _prepared(model: nn.Module, x: Tensor) -> Iterator[None]:
    with torch._dynamo.config.patch(prepare_freezing=True):
        yield


WAYS = (_marked, _frozen_before, _freezing, _freezing_after, _prepared)
ways = pytest.mark.parametrize("way", WAYS, ids=[way.__name__[1:] for way in WAYS])


def _graphs_with_tensors(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each graph that reaches the backend from now on holds."""
    counts: list[int] = []

    def counted(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        captured = capture(gm, example_inputs)
        counts.append(len(captured.held))
        return captured

    monkeypatch.setattr("fanin_compile.backend.capture", counted)
    return counts


@ways
def test_attributes_are_condensed(way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = Plain(), _graphs_with_tensors(monkeypatch)
    with way(model, randn(5, 64)), recorded() as compilations, no_warning_of_ours():
        f = torch.compile(model, backend="fanin", options={"cost_gate": False})  # not strict: it would warn
        for seed in range(2):
            x = randn(5, 64, seed=seed)
            assert_equals_model(f(x), model, x)
    assert rewritten(compilations) == [{"w", "v"}]
    assert counts == [4]


CHANGES: dict[str, Callable[[Plain], object]] = {
    "weight in place": lambda m: m.w.mul_(-1.5),
    "mask in place": lambda m: m.m.copy_(fan_in_mask(48, 64, 6, seed=5)),
    "mask of another k": lambda m: m.m.copy_(fan_in_mask(48, 64, 9, seed=6)),
    "weight's data": lambda m: setattr(m.w, "data", randn(48, 64, seed=7)),
    "another weight": lambda m: setattr(m, "w", randn(48, 64, seed=8)),
    "another mask": lambda m: setattr(m, "m", fan_in_mask(48, 64, 6, seed=9).float()),
    "zeros elsewhere": lambda m: m.v.copy_(sparse_weight(10, 48, 5, seed=3)),
    "dense in place": lambda m: m.scale.mul_(2.0),
    "dense data": lambda m: setattr(m.scale, "data", randn(64, seed=4)),
    "another dense tensor": lambda m: setattr(m, "scale", randn(64, seed=5)),
    "dense data of another shape": lambda m: setattr(m.scale, "data", randn(1, seed=6)),
}


def _assert_changes_are_seen(model: Plain, f: Callable[..., Any]) -> None:
    x = randn(5, 64)
    with recorded(), torch._dynamo.config.patch(recompile_limit=4 * len(CHANGES)):
        y = f(x)
        for name, change in CHANGES.items():
            change(model)
            before, y = y, f(x)
            assert not torch.allclose(y, before, atol=1e-3), name
            assert_equals_model(y, model, x)
            assert_equals_model(f(x), model, x)  # the first may step aside, the second is compiled


@pytest.mark.parametrize("way", [_marked, _freezing, _prepared])
def test_changes_are_seen_by_the_next_call(way: Callable[..., Any]) -> None:
    model = Plain()
    with way(model, randn(5, 64)):
        _assert_changes_are_seen(model, compiled(model))


def test_changes_are_seen_under_freezing_as_an_option() -> None:
    model = Plain()
    with _marked(model, randn(5, 64)):
        _assert_changes_are_seen(model, compiled(model, options={"inductor": {"freezing": True}}))


@pytest.mark.parametrize("way", [_marked, _frozen_before, _prepared])
def test_values_that_change_are_packed_anew_without_compiling(way: Callable[..., Any]) -> None:
    model, x = Plain(), randn(5, 64)
    with way(model, x), recorded() as compilations:
        f = compiled(model)
        for _ in range(3):
            assert_equals_model(f(x), model, x)
            model.w.mul_(1.1)
            model.scale.mul_(1.1)
        assert_equals_model(f(x), model, x)
    assert len(compilations) == 1


@pytest.mark.parametrize("freezing", ["global", "option", "option only"])
def test_freezing_serves_no_stale_parameters(freezing: str) -> None:
    class WithDense(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Any:
            return self.dense(super().forward(x))

    options = {} if freezing == "global" else {"inductor": {"freezing": True}}
    model, x = WithDense(), randn(5, 64)
    with recorded() as compilations, inductor_config.patch(freezing=freezing != "option only"):
        f = compiled(model, options=options)
        for write in (
            lambda: model.a.weight.mul_(-1.5),
            lambda: model.b.bias.add_(1.0),
            lambda: model.dense.weight.mul_(2.0),
            lambda: model.load_state_dict(MLP(seed=7).state_dict(), strict=False),
        ):
            assert_equals_model(f(x), model, x)
            write()  # the first call after it may step aside, the second is compiled
            for _ in range(2):
                assert_equals_model(f(x), model, x)
    assert all(names == {"a", "b"} for names in rewritten(compilations))


def test_freezing_serves_no_stale_running_statistics() -> None:
    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(48)

        def forward(self, x: Tensor) -> Any:
            return self.b(torch.relu(self.norm(self.a(x))))

    model, x = Normed().eval(), randn(5, 64)
    with recorded() as compilations, inductor_config.patch(freezing=True):
        f = compiled(model)
        for _ in range(2):
            assert_equals_model(f(x), model, x)
            model.train()
            model(randn(20, 64) * 3 + 1)  # batch norm writes its statistics, and their versions stay
            model.eval()
        assert_equals_model(f(x), model, x)
        assert_equals_model(f(x), model, x)
    assert {"a", "b"} <= rewritten(compilations)[-1]


def test_a_counter_that_the_graph_writes_is_no_constant() -> None:
    class Counting(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.calls = nn.Buffer(torch.zeros(10))

        def forward(self, x: Tensor) -> Any:
            self.calls.add_(1.0)
            return super().forward(x) + self.calls

    model, x = Counting(), randn(5, 64)
    exact = copy.deepcopy(model).double()
    with recorded() as compilations, inductor_config.patch(freezing=True):
        f = compiled(model)
        for _ in range(3):
            expected = exact(x.double())
            torch.testing.assert_close(
                f(x).double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max())
            )
    assert model.calls.tolist() == [3.0] * 10
    assert len(compilations) == 1


@ways
def test_two_layers_share_a_weight(way: Callable[..., Any]) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.m = randn(64, 64), fan_in_mask(64, 64, 6).float()

        def forward(self, x: Tensor) -> Tensor:
            w = self.w * self.m
            return F.linear(torch.relu(F.linear(x, w)), w)

    model, x = Shared(), randn(5, 64)
    with way(model, x), recorded() as compilations:
        f = compiled(model)
        assert_equals_model(f(x), model, x)
        model.w.mul_(2.0)
        assert_equals_model(f(x), model, x)
    assert rewritten(compilations)[0] == {"w", "w (use 2)"}


def test_of_a_submodule_and_of_no_module() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x) @ outside.t().to(x.dtype)

    outside = sparse_weight(20, 10, 3)
    torch._dynamo.mark_static_address(outside, guard=True)
    model, x = Outer(), randn(5, 64)
    with _marked(model.inner, x), recorded() as compilations:
        f = compiled(model)
        assert_equals_model(f(x), model, x)
        outside.mul_(2.0)
        assert_equals_model(f(x), model, x)
    (names,) = rewritten(compilations)
    assert {"inner.w", "inner.v"} < names
    assert len(names) == 3


def test_a_deep_copy_has_attributes_of_its_own() -> None:
    model, x = Plain(), randn(5, 64)
    with _marked(model, x), recorded():
        f = compiled(model)
        f(x)
        other: Any = copy.deepcopy(f)
        other.w.mul_(2.0)
        assert_equals_model(other(x), other._orig_mod, x)
        assert_equals_model(f(x), model, x)


def test_models_of_one_class_get_a_graph_each_which_goes_with_its_model() -> None:
    x, alive = randn(5, 64), []
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            model = Plain(seed=seed)
            with _marked(model, x), recorded() as compilations:
                f = compiled(model)
                for _ in range(2):
                    assert_equals_model(f(x), model, x)
            assert len(compilations) == 1
            alive.append(weakref.ref(model.w))
            del model, f, compilations
            gc.collect()
    assert [ref() for ref in alive] == [None] * 3


def test_gradients_of_attributes() -> None:
    model, x = Plain(), randn(5, 64)
    with _marked(model, x), record() as compilations:
        f = compiled(model)
        assert_equals_model(f(x), model, x)
        model.w.requires_grad_(True)
        model.v.requires_grad_(True)
        gradients = [
            torch.autograd.grad(function(x).square().sum(), (model.w, model.v)) for function in (f, model)
        ]
    for mine, theirs in zip(*gradients, strict=True):
        assert_close_at_scale(mine, theirs)
    assert rewritten(compilations) == [{"w", "v"}, set()]
    assert compilations[1].untouched.startswith("gradients are enabled")


def test_made_in_inference_mode_they_are_refused() -> None:
    with torch.inference_mode():
        model = Plain()
    x = randn(5, 64)
    with (
        _marked(model, x),
        recorded(),
        pytest.raises(Exception, match=r"RewriteError.*made in inference mode"),
    ):
        compiled(model)(x)


@ways
def test_condense_reads_attributes(way: Callable[..., Any]) -> None:
    model, x = Plain(), randn(5, 64)
    with way(model, x), torch.no_grad():
        condensed: Any = condense(model, example_inputs=(x,))
        assert_equals_model(condensed(x), model, x)
    targets = [node.target for node in condensed.graph.nodes]
    assert torch.ops.fanin.gather_matmul_chain.default in targets
    assert torch.ops.aten.linear.default not in targets


@ways
def test_sizes_of_arguments_stay_free(way: Callable[..., Any]) -> None:
    model = Plain()
    with way(model, randn(5, 64)), recorded() as compilations:
        f = compiled(model, dynamic=True)
        for batch in (5, 7, 9):
            x = randn(batch, 64)
            assert_equals_model(f(x), model, x)
    assert rewritten(compilations) == [{"w", "v"}]
