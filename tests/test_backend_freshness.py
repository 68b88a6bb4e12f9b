"""A compiled graph never serves weights that are no longer the model's, however they changed."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import fanin_compile
from fanin_compile import guards
from tests.compile_support import (
    MLP,
    STRICT,
    any_type,
    assert_equals_dense,
    assert_equals_model,
    compiled,
    fan_in_mask,
    randn,
    recorded,
    sparse_linear,
    sparse_weight,
)

pytestmark = pytest.mark.usefixtures("dynamo")


def _load(model: MLP) -> None:
    model.load_state_dict(MLP(seed=7).state_dict())


def _load_assign(model: MLP) -> None:
    model.load_state_dict(MLP(seed=7).state_dict(), assign=True)


def _new_parameter(model: MLP) -> None:
    model.a.weight = nn.Parameter(sparse_weight(48, 64, 6, seed=7))


def _data(model: MLP) -> None:
    model.a.weight.data = sparse_weight(48, 64, 6, seed=7)


def _in_place(model: MLP) -> None:
    model.a.weight.mul_(-1.5)


def _bias(model: MLP) -> None:
    model.a.bias.mul_(-1.5)  # of the ablated neurons, too


def _inference_mode(model: MLP) -> None:
    with torch.inference_mode():
        model.a.weight.mul_(-1.5)


def _swap(model: MLP) -> None:
    torch.utils.swap_tensors(model.a.weight, nn.Parameter(sparse_weight(48, 64, 6, seed=7)))


def _vector(model: MLP) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.25, model.parameters())


def _init(model: MLP) -> None:
    nn.init.sparse_(model.a.weight, 0.9)  # another fan-in in other rows


def _denser(model: MLP) -> None:
    model.a.weight.copy_(sparse_weight(48, 64, 9, seed=3))


def _same_fan_in(model: MLP) -> None:
    model.a.weight.copy_(sparse_weight(48, 64, 6, ablated=2, seed=3))


def _neuron_back(model: MLP) -> None:
    model.a.weight[-1, :6] = 1.0
    model.b.weight[:, -1] = 1.0


def _dense(model: MLP) -> None:
    model.a.weight.copy_(randn(48, 64))


def _sgd(model: MLP, *, fused: bool) -> None:
    _step(torch.optim.SGD(model.parameters(), lr=0.5, fused=fused), model)


def _adam(model: MLP, *, fused: bool) -> None:
    _step(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), model)


def _step(optimizer: torch.optim.Optimizer, model: MLP) -> None:
    with torch.enable_grad():
        model(randn(3, 64)).square().sum().backward()
    for layer in (model.a, model.b):
        assert layer.weight.grad is not None
        layer.weight.grad.mul_(layer.weight != 0)
    optimizer.step()


CHANGES: dict[str, Callable[[MLP], None]] = {
    "load_state_dict": _load,
    "load_state_dict assign": _load_assign,
    "m.weight = Parameter": _new_parameter,
    ".data =": _data,
    "in place": _in_place,
    "bias in place": _bias,
    "in place in inference mode": _inference_mode,
    "swap_tensors": _swap,
    "vector_to_parameters": _vector,
    "init": _init,
    "other mask, other k": _denser,
    "other mask, same k": _same_fan_in,
    "ablated neuron back": _neuron_back,
    "no longer sparse": _dense,
    "SGD": lambda m: _sgd(m, fused=False),
    "SGD fused": lambda m: _sgd(m, fused=True),
    "AdamW": lambda m: _adam(m, fused=False),
    "AdamW fused": lambda m: _adam(m, fused=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change: str) -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model)
    with recorded() as compilations:
        before = f(x)
        CHANGES[change](model)
        for _ in range(2):  # the first may step aside, the second is compiled
            y = f(x)
            assert not torch.allclose(y, before, atol=1e-3)
            assert_equals_dense(y, model, x)
    assert len(compilations) <= 2
    result = compilations[-1].result
    assert result is not None
    condensed = {r.layer for r in result.rewritten if r.bytes is not None}
    assert condensed == ({"b"} if change == "no longer sparse" else {"a", "b"})


def _to_bfloat16(model: MLP) -> None:
    model.bfloat16()  # through .data: Dynamo's own guard on dtypes is left to us


def _to_double(model: MLP) -> None:
    model.double()


def _fewer_neurons(model: MLP) -> None:
    model.a.weight = nn.Parameter(model.a.weight[:40].clone())
    model.a.bias = nn.Parameter(model.a.bias[:40].clone())
    model.b.weight = nn.Parameter(model.b.weight[:, :40].clone())


def _one_bias(model: MLP) -> None:
    model.a.bias.data = model.a.bias[:1].clone()  # broadcast


KINDS = {f.__name__[1:]: f for f in (_to_bfloat16, _to_double, _fewer_neurons, _one_bias)}


@pytest.mark.parametrize("change", KINDS)
def test_another_dtype_or_shape_is_seen_by_the_next_call(change: str) -> None:
    model = MLP()
    f = compiled(model)
    with recorded() as compilations:
        f(randn(5, 64))
        freed: list[bool] = []
        weakref.finalize(model.a.weight.untyped_storage(), freed.append, True)
        KINDS[change](model)
        x = randn(5, 64).to(model.a.weight.dtype)
        for _ in range(3):
            y = f(x)
            assert y.dtype == x.dtype
            torch.testing.assert_close(y, model(x), atol=0.2 if y.dtype == torch.bfloat16 else 1e-5, rtol=0)
    assert len(compilations) == 2
    compilations.clear()
    gc.collect()
    assert freed or change in ("fewer_neurons", "one_bias")  # of the others, the parameters are the same


def test_weights_that_a_graph_reads_as_they_are_stay_guarded_by_dynamo() -> None:
    model = nn.Sequential(sparse_linear(64, 48, 6), nn.Linear(48, 40)).eval()
    f = compiled(model)
    x = randn(5, 64)
    f(x)
    for parameter in model[1].parameters():
        parameter.data = parameter[:7].clone()
    assert_equals_model(f(x), model, x)  # the graph made for 40 outputs would have read past their end


def test_a_vector_that_a_graph_holds_a_copy_of_changes_its_size() -> None:
    model = nn.Sequential(sparse_linear(64, 48, 6), nn.LayerNorm(48)).eval()
    f = compiled(model)
    x = randn(5, 64)
    f(x)
    model[1].weight.data = torch.ones(1)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        f(x)  # as without us


def test_many_changes_of_values_compile_once() -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model)
    with recorded() as compilations:
        for _ in range(12):
            model.a.weight.mul_(1.1)
            assert_equals_dense(f(x), model, x)
    assert len(compilations) == 1


def test_a_factor_that_was_folded_is_watched() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = sparse_linear(64, 32, 6), sparse_linear(32, 9, 5)
            self.gamma, self.scale = nn.Parameter(randn(32)), nn.Buffer(torch.tensor(0.5))

        def forward(self, x: torch.Tensor) -> Any:
            return self.b(torch.relu(self.gamma * self.a(x)) + x[:, :32]) / self.scale

    model = Model()
    f, x = compiled(model), randn(5, 64)
    with recorded() as compilations:
        before = f(x)
        assert_equals_model(before, model, x)
        changes: tuple[Callable[[], object], ...] = (
            lambda: model.gamma.mul_(-1.5),
            lambda: model.gamma[3:9].zero_(),
            lambda: setattr(model.gamma, "data", randn(32, seed=5)),
            lambda: model.scale.add_(0.25),
            lambda: model.scale.fill_(0.0),  # infinite: it is compiled anew, and stays
        )
        for change in changes[:-1]:
            change()
            y = f(x)
            assert not torch.allclose(y, before, atol=1e-3)
            assert_equals_model(y, model, x)
            before = y
        assert len(compilations) == 1
        assert compilations[0].result is not None
        folded = [r.layer for r in compilations[0].result.rewritten if r.detail == "scale folded"]
        assert folded == ["a", "b"]
        changes[-1]()
        torch.testing.assert_close(f(x), model(x), equal_nan=True)


def test_what_ablated_neurons_pass_through_is_watched() -> None:
    layers = (sparse_linear(64, 32, 6, ablated=8), nn.BatchNorm1d(32), nn.ReLU(), sparse_linear(32, 9, 5))
    model = any_type(nn.Sequential(*layers).eval())
    f, x = compiled(model), randn(5, 64)
    with recorded():
        changes: tuple[Callable[[], object], ...] = (
            lambda: model[1].running_mean.add_(1.0),
            lambda: model[1].running_var.mul_(2.0),
            lambda: model[1].bias.add_(0.5),
            lambda: model[0].bias.add_(0.5),
            lambda: model[3].weight.mul_(2.0),
        )
        for change in changes:
            assert_equals_model(f(x), model, x)
            change()
        assert_equals_model(f(x), model, x)


def test_training_between_calls_moves_running_statistics() -> None:
    model = nn.Sequential(
        sparse_linear(64, 32, 6), nn.BatchNorm1d(32), nn.ReLU(), sparse_linear(32, 9, 5)
    ).eval()
    f, x = compiled(model), randn(5, 64)
    with recorded() as compilations:
        for _ in range(3):
            assert_equals_model(f(x), model, x)
            model.train()
            model(randn(20, 64) * 3 + 1)  # batch norm writes its statistics, and their versions stay
            model.eval()
        assert_equals_model(f(x), model, x)
    assert len(compilations) == 1
    assert compilations[0].result is not None
    assert any("batch norm folded" in r.detail for r in compilations[0].result.rewritten)


def test_a_dense_convolution_that_took_a_batch_norm_is_watched() -> None:
    conv = nn.Conv2d(4, 8, 1)
    with torch.no_grad():
        conv.weight.copy_(sparse_weight(8, 4, 2)[..., None, None])
    dense = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    model = any_type(nn.Sequential(dense, nn.BatchNorm2d(4), nn.ReLU6(), conv).eval())
    f, x = compiled(model), randn(2, 4, 7, 7)
    with recorded() as compilations:
        changes: tuple[Callable[[], object], ...] = (
            lambda: model[0].weight.mul_(-2.0),
            lambda: model[0].bias.add_(0.5),
            lambda: model[1].running_mean.add_(1.0),
            lambda: model[1].weight.mul_(1.5),
            lambda: model[1].bias.sub_(0.25),
        )
        y = f(x)
        for change in changes:
            assert_equals_model(y, model, x)
            change()
            before, y = y, f(x)
            assert not torch.allclose(y, before, atol=1e-3)
        model.train()
        model(randn(9, 4, 7, 7) * 3 + 1)  # batch norm writes its statistics, and their versions stay
        model.eval()
        assert_equals_model(f(x), model, x)
    assert len(compilations) == 1
    assert compilations[0].result is not None
    folded = [r.layer for r in compilations[0].result.rewritten if r.detail == "batch norm folded"]
    assert folded == ["0"]


def test_pruning_further_and_removing() -> None:
    model, x = any_type(MLP()), randn(5, 64)
    prune.custom_from_mask(model.a, "weight", fan_in_mask(48, 64, 6))
    f = compiled(model)
    with recorded():
        assert_equals_dense(f(x), _plain(model), x)
        model.a.weight_mask.copy_(fan_in_mask(48, 64, 6, seed=5))  # the same k
        assert_equals_dense(f(x), _plain(model), x)
        prune.l1_unstructured(model.a, "weight", 0.5)
        assert_equals_dense(f(x), _plain(model), x)
        prune.remove(model.a, "weight")
        assert_equals_dense(f(x), _plain(model), x)
        model.a.weight.mul_(2)
        assert_equals_dense(f(x), _plain(model), x)


def _plain(model: MLP) -> MLP:
    """With the weight that the mask leaves, and no hooks."""
    plain = MLP()
    for name in ("a", "b"):
        layer = getattr(model, name)
        pruned = hasattr(layer, "weight_orig")
        weight = layer.weight_orig * layer.weight_mask if pruned else layer.weight
        getattr(plain, name).weight.data = weight.detach().clone()
        getattr(plain, name).bias.data = layer.bias.detach().clone()
    return plain


def test_a_parametrizations_mask_changes() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Buffer(fan_in_mask(48, 64, 6))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * self.mask

    model, x = any_type(MLP()), randn(5, 64)
    parametrize.register_parametrization(model.a, "weight", Masked())
    f = compiled(model)
    with recorded() as compilations:
        f(x)
        for seed in range(3):
            model.a.parametrizations.weight[0].mask.copy_(fan_in_mask(48, 64, 6, seed=seed))
            assert_equals_model(f(x), model, x)
    assert len(compilations) == 1


def test_refresh_after_a_write_that_nothing_counts() -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model)
    with recorded():
        f(x)
        model.a.weight.data.mul_(2.0)
        fanin_compile.refresh()
        assert_equals_dense(f(x), model, x)
        model.a.weight.detach().numpy()[:] *= -1.0
        fanin_compile.refresh()
        assert_equals_dense(f(x), model, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(2.0),
        lambda w: w.data.neg_(),  # every sign bit flips, an even number of them
        lambda w: w.data.copy_(w.flip(1)),  # the same numbers elsewhere
        lambda w: w.detach().numpy().__imul__(3.0),
    ],
    ids=("scaled", "negated", "moved", "numpy"),
)
def test_verify_contents_sees_every_write(write: Callable[[torch.Tensor], object]) -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model, options={"verify_contents": True})
    with recorded():
        f(x)
        write(model.a.weight)
        assert_equals_dense(f(x), model, x)


def test_what_a_pruned_layer_keeps_of_its_weight_is_the_users() -> None:
    layer, x = any_type(nn.Linear(64, 32)), randn(5, 64)
    prune.custom_from_mask(layer, "weight", fan_in_mask(32, 64, 6))
    f = compiled(layer)
    with recorded():
        f(x)
        kept = layer.weight
        before = kept.clone()
        layer.weight_orig.mul_(2.0)
        f(x)
        assert torch.equal(kept, before)  # handed out earlier, so no longer ours to write
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        layer.weight.mul_(3.0)
        f(x)
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)


def test_models_of_one_class_do_not_take_turns_in_one_graph() -> None:
    models = [MLP(k=k, seed=k) for k in range(2, 6)]
    functions = [compiled(model) for model in models]
    x = randn(5, 64)
    with recorded() as compilations, torch._dynamo.config.patch(recompile_limit=2):
        for _ in range(2):
            for f, model in zip(functions, models, strict=True):
                assert_equals_dense(f(x), model, x)
    assert len(compilations) == len(models)


def test_a_graph_goes_with_its_model_and_leaves_the_recompile_limit_alone() -> None:
    x = randn(5, 64)
    count, alive, epochs = 0, [], dict(guards.epochs)
    for seed in range(4):
        model = MLP(seed=seed)
        f = compiled(model)
        with recorded() as compilations, torch._dynamo.config.patch(recompile_limit=2):
            f(x)
        count += len(compilations)
        alive.append(weakref.ref(model.a.weight))
        del model, f, compilations
        gc.collect()
    assert count == 4
    assert [ref() for ref in alive] == [None] * 4
    assert guards.epochs == epochs


def test_a_deep_copy_has_weights_of_its_own() -> None:
    model, x = MLP(), randn(5, 64)
    f = compiled(model)
    with recorded():
        f(x)
        other = any_type(copy.deepcopy(f))
        other.a.weight.mul_(2.0)
        assert_equals_dense(other(x), other._orig_mod, x)
        assert_equals_dense(f(x), model, x)


WORKER = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from tests.compile_support import MLP, assert_equals_dense, compiled, randn
model, x = MLP(), randn(5, 64)
with torch.no_grad():
    for layer in (model.a, model.b):  # other inputs and values, packed in as many bytes
        layer.weight.copy_(layer.weight.roll(int(sys.argv[1]), 1) * (1 + int(sys.argv[1])))
    assert_equals_dense(compiled(model)(x), model, x)
hits = torch._dynamo.utils.counters
print(hits["aot_autograd"]["autograd_cache_hit"] + hits["inductor"]["fxgraph_cache_hit"])
"""


def test_processes_which_share_inductors_cache_with_other_masks(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    hits = []
    for shift in ("0", "1"):  # one after the other: the second finds the cache of the first
        done = subprocess.run(
            [sys.executable, "-c", WORKER, shift],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        hits.append(int(done.stdout))
    assert hits[0] == 0 < hits[1], (
        "the second must run what the first compiled, on weights and masks of its own"
    )


def test_repacking_that_fails_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MLP(), randn(5, 64)
    f = torch.compile(model, backend="fanin", options={"cost_gate": False})
    with recorded():
        f(x)

        def broken(*args: object) -> None:
            raise ValueError("injected")

        monkeypatch.setattr("fanin_compile.backend.rewrite", broken)
        monkeypatch.setattr("fanin_compile.fresh_graph.rewrite", broken)
        model.a.weight.mul_(2.0)
        with pytest.warns(
            UserWarning, match="could not pack changed weights anew after ValueError: injected"
        ):
            assert_equals_dense(f(x), model, x)
        with pytest.warns(UserWarning, match="left a graph untouched after ValueError: injected"):
            assert_equals_dense(f(x), model, x)


def test_repacking_that_fails_raises_if_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = MLP(), randn(5, 64)
    f = torch.compile(model, backend="fanin", options=STRICT)
    with recorded():
        f(x)

        def broken(*args: object) -> None:
            raise ValueError("injected")

        monkeypatch.setattr("fanin_compile.fresh_graph.rewrite", broken)
        model.a.weight.mul_(2.0)
        with pytest.raises(fanin_compile.RewriteError, match="injected"):
            f(x)


def test_constants_of_neurons_that_stay_are_watched() -> None:
    class Model(MLP):
        def forward(self, x: torch.Tensor) -> Any:
            h = torch.relu(
                self.a(x)
            )  # seen whole, so its ablated neurons stay; b has them folded all the same
            return self.b(h), h

    model, x = Model(), randn(5, 64)
    f = compiled(model)
    with recorded() as compilations:
        assert_equals_model(f(x), model, x)
        model.a.bias.add_(1.0)
        assert_equals_model(f(x), model, x)
    assert len(compilations) == 1
    assert compilations[0].result is not None
    assert any("folded" in r.detail for r in compilations[0].result.rewritten)


def test_without_guards_on_torchs_modules_two_models_and_new_structures_are_told_apart() -> None:
    guards = {"guard_filter_fn": torch.compiler.skip_guard_on_inbuilt_nn_modules_unsafe}
    one, two = (nn.Sequential(sparse_linear(64, 48, k), nn.ReLU()) for k in (6, 9))
    x = randn(4, 64)
    with recorded() as compilations:
        first, second = compiled(one, options=guards), compiled(two, options=guards)
        for _ in range(2):
            assert_equals_dense(first(x), one, x)
            assert_equals_dense(second(x), two, x)
        assert len(compilations) == 2
        one[0].get_parameter("weight").copy_(sparse_weight(48, 64, 20))
        for _ in range(2):  # the first call runs the dense graph
            assert_equals_dense(first(x), one, x)
    assert len(compilations) == 3
