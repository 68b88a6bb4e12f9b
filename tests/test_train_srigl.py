"""SRigL on models: what holds after every step, what every option changes, what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fanin_compile.train import SRigL
from fanin_compile.train.optimizer_state import is_elementwise
from tests.train_support import (
    ConvNet,
    assert_agreement,
    assert_constant_fan_in,
    assert_same_bits,
    fan_ins,
    mlp,
    parameters,
    srigl,
    train,
    weight_and_mask,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd foreach": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01, weight_decay=1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 0.01),
    "adamax": lambda p: torch.optim.Adamax(p, 0.01),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05, t0=5.0),  # starts to average, so that it has state
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], 0.01),  # dense updates: masked again
}


def test_start_by_eye() -> None:
    model = nn.Sequential(nn.Linear(640, 8), nn.ReLU(), nn.Linear(8, 4))
    dense = model[0].get_parameter("weight").detach().clone()
    sparse = srigl(model, sparsity=0.9, include="0")
    (layer,) = sparse.layers
    assert fan_ins(layer) == [64] * 8
    weight, mask = weight_and_mask(model[0])
    assert (mask.dtype, mask.shape) == (torch.bool, (8, 640))
    torch.testing.assert_close(weight, dense * mask * (640 / 64) ** 0.5)
    assert "weight_mask" not in dict(model[2].named_buffers())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mask_weight_gradient_and_state_agree_after_every_step(name: str) -> None:
    model = mlp(24, 32, 16, 4)
    optimizer = OPTIMIZERS[name](model.parameters())
    sparse = srigl(model, optimizer, allocation="uniform", dense_first=False, gamma_sal=0.5)
    first = [layer.mask.clone() for layer in sparse.layers]
    for _ in range(30):
        train(model, optimizer, sparse, 1)
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)
    assert any(not torch.equal(a, b.mask) for a, b in zip(first, sparse.layers, strict=True))


def test_torch_s_elementwise_optimizers_cost_no_masking_of_weights() -> None:
    model = mlp(8, 4)
    others = {name for name, build in OPTIMIZERS.items() if not is_elementwise(build(model.parameters()))}
    assert others == {"muon"}


@settings(deadline=None, max_examples=25)
@given(
    widths=st.lists(st.integers(6, 24), min_size=3, max_size=4),
    sparsity=st.sampled_from([0.3, 0.5, 0.8]),
    ablation=st.sampled_from([{"ablation": False}, *({"gamma_sal": gamma} for gamma in (0.0, 0.3, 0.99))]),
    delta_t=st.integers(1, 3),
    allocation=st.sampled_from(["erk", "uniform"]),
    seed=st.integers(0, 1000),
)
def test_constant_fan_in_within_budget_after_every_update(
    widths: list[int], sparsity: float, ablation: Any, delta_t: int, allocation: Any, seed: int
) -> None:
    model = mlp(*widths, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    sparse = SRigL(
        model, optimizer, total_steps=16, delta_t=delta_t, sparsity=sparsity, allocation=allocation, seed=seed,
        dense_first=False, **ablation,
    )  # fmt: skip
    for _ in range(16):
        train(model, optimizer, sparse, 1)
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)
    for layer in sparse.layers:
        counts = fan_ins(layer)
        alive = sum(k > 0 for k in counts)
        assert alive * layer.dense_fan_in >= layer.budgets[0], "the ablation guard"
        if not layer.ablate:
            assert alive == layer.neurons


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_kind_of_convolution(optimizer: str) -> None:
    torch.manual_seed(0)
    model = ConvNet()
    opt = OPTIMIZERS[optimizer](model.parameters())
    sparse = srigl(model, opt, allocation="uniform", dense_first=False, sparsity=0.6)
    assert [layer.dense_fan_in for layer in sparse.layers] == [36, 18, 60, 18, 320]
    assert [fan_ins(layer)[0] for layer in sparse.layers] == [14, 7, 24, 7, 128]
    for _ in range(12):
        opt.zero_grad()
        model(torch.randn(4, 4, 6, 6)).square().mean().backward()
        opt.step()
        sparse.step()
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)


def test_grown_weights_start_at_zero_with_clean_state() -> None:
    model = mlp(24, 32, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    sparse = srigl(model, optimizer, delta_t=5)
    train(model, optimizer, sparse, 4)
    before = [layer.mask.clone() for layer in sparse.layers]
    train(model, optimizer, sparse, 1)
    grown = 0
    for layer, old in zip(sparse.layers, before, strict=True):
        new = layer.mask & ~old
        grown += int(new.sum())
        assert not layer.param[new].any()
        assert not optimizer.state[layer.param]["exp_avg"][new].any()
        assert not optimizer.state[layer.param]["exp_avg_sq"][new].any()
    assert grown > 0


def test_adagrad_state_of_inactive_weights_is_its_initial_value() -> None:
    model = mlp(24, 32, 4)
    optimizer = torch.optim.Adagrad(model.parameters(), 0.05, initial_accumulator_value=0.5)
    sparse = srigl(model, optimizer)
    train(model, optimizer, sparse, 6)
    for layer in sparse.layers:
        assert optimizer.state[layer.param]["sum"][~layer.mask].eq(0.5).all()


def test_ablation_stops_at_the_guard_and_spares_the_last_layer() -> None:
    model = mlp(8, 32, 32, 8)
    sparse = srigl(model, gamma_sal=1.0, sparsity=0.5, allocation="uniform", dense_first=False, alpha=0.9)
    train(model, sparse.optimizer, sparse, 29)
    alive = [sum(k > 0 for k in fan_ins(layer)) for layer in sparse.layers]
    assert alive[0] < 32
    assert all(a * x.dense_fan_in >= x.budgets[0] for a, x in zip(alive, sparse.layers, strict=True))
    assert alive[-1] == 8


@pytest.mark.parametrize("tie", ["weight", "module"])
def test_outputs_computed_by_an_earlier_weight_are_spared(tie: str) -> None:
    """The weight that the last module holds counts, where it was registered first too."""
    model = mlp(16, 16, 16, 16)
    if tie == "weight":
        model[4].weight = model[0].weight
    else:
        model[4] = model[0]
    sparse = srigl(model, gamma_sal=1.0, sparsity=0.5, alpha=0.9)
    train(model, sparse.optimizer, sparse, 29)
    alive = {layer.name: sum(k > 0 for k in fan_ins(layer)) for layer in sparse.layers}
    assert sparse.plan.last == "0.weight"
    assert alive["0.weight"] == 16
    assert alive["2.weight"] < 16


def test_the_repr_says_which_layers_are_never_ablated() -> None:
    def spared(**options: Any) -> list[str]:
        lines = repr(srigl(mlp(16, 32, 24, 6), **options)).splitlines()[1:]
        return [line.split(":")[0].strip() for line in lines if line.endswith(", never ablated")]

    assert spared() == ["4.weight"]
    assert spared(no_ablation="0") == ["0.weight", "4.weight"]
    assert spared(ablate_last=True) == spared(ablation=False) == []


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator() -> None:
    states = []
    for noise in (1, 2):
        model = mlp(16, 32, 4)
        torch.manual_seed(noise)
        sparse = srigl(model, seed=3)
        train(model, sparse.optimizer, sparse, 10)
        states.append(parameters(model))
    assert_same_bits(*states)


class CountingSGD(torch.optim.SGD):
    """Keeps of each entry whether and how often its gradient was not 0."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            for key, dtype in (("seen", torch.bool), ("count", torch.int64)):
                state.setdefault(key, torch.ones_like(param, dtype=dtype))
                state[key] += (param.grad != 0).to(dtype)


class NoisySGD(torch.optim.SGD):
    """Langevin dynamics: noise in every weight and every momentum, active or not."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for param in self.param_groups[0]["params"]:
            param += 1e-3 * torch.randn_like(param)
            self.state[param]["momentum_buffer"] += 1e-3 * torch.randn_like(param)


@pytest.mark.parametrize("kind", [CountingSGD, NoisySGD])
def test_optimizers_of_others_are_kept_clear_off_the_mask(kind: type[torch.optim.SGD]) -> None:
    model = mlp(24, 32, 16, 4)
    optimizer = kind(model.parameters(), 0.05, momentum=0.9)
    sparse = srigl(model, optimizer, gamma_sal=0.5)
    for _ in range(8):
        train(model, optimizer, sparse, 1)
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)
    assert sparse.layers[0].explored is not None
    assert not torch.equal(sparse.layers[0].explored, sparse.layers[0].mask), "there were updates"


def test_explored_share_only_grows_and_starts_at_the_density() -> None:
    model = mlp(16, 32, 4)
    sparse = srigl(model)
    layer = sparse.layers[0]
    shares = []
    for _ in range(10):
        assert layer.explored is not None
        shares.append(int(layer.explored.sum()))
        assert (layer.explored | ~layer.mask).all()
        train(model, sparse.optimizer, sparse, 1)
    assert all(a <= b for a, b in itertools.pairwise(shares))
    assert shares[0] < shares[-1]
