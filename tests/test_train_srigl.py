"""SRigL on models: what holds after every step, what every option changes, what is refused."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fanin_compile.errors import FaninError, MaskError, OptionError
from fanin_compile.train import SRigL, Static
from fanin_compile.train.optimizer_state import is_elementwise
from tests.train_support import (
    ConvNet,
    assert_agreement,
    assert_constant_fan_in,
    assert_same_bits,
    batch,
    fan_ins,
    loss_of,
    mlp,
    parameters,
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


def srigl(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> SRigL:
    """SRigL with an update every other step, so that short trainings have many."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return SRigL(model, optimizer, **({"total_steps": 40, "delta_t": 2, "sparsity": 0.75} | options))


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


# Each of these changes the masks of the same training; an option that is accepted and dropped would not.
VARIANTS: dict[str, dict[str, Any]] = {
    "sparsity": {"sparsity": 0.7},
    "alpha": {"alpha": 0.9},
    "delta_t": {"delta_t": 5},
    "t_end": {"t_end": 4},
    "total_steps": {"total_steps": 12},
    "erk_power": {"erk_power": 0.5},
    "allocation": {"allocation": "uniform"},
    "dense_first": {"dense_first": True},
    "include": {"include": "0"},
    "exclude": {"exclude": "2"},
    "overrides": {"overrides": {"2": 0.5}},
    "init": {"init": "he"},
    "init xavier": {"init": "xavier"},
    "init keep": {"init": "keep"},
    "grad_steps": {"grad_steps": 2},
    "seed": {"seed": 1},
    "ablation": {"ablation": False, "gamma_sal": 0.3},
    "gamma_sal": {"gamma_sal": 0.6},
    "ablation_reference": {"ablation_reference": "dense"},
    "ablate_last": {"ablate_last": True},
    "no_ablation": {"no_ablation": "0"},
}


def masks_after(**options: Any) -> dict[str, Tensor]:
    model = mlp(16, 32, 24, 6)
    sparse = srigl(model, **options)
    train(model, sparse.optimizer, sparse, 20)
    return {layer.name: layer.mask for layer in sparse.layers}


@pytest.mark.parametrize("option", VARIANTS)
def test_every_option_changes_the_result(option: str) -> None:
    common = {
        "gamma_sal": 1.0 if option == "ablate_last" else 0.9
    }  # at 0.9 the last layer stays whole anyway
    plain, changed = masks_after(**common), masks_after(**common | VARIANTS[option])
    assert plain.keys() != changed.keys() or any(not torch.equal(plain[n], changed[n]) for n in plain)


def test_no_ablation_may_name_a_layer_that_stays_dense() -> None:
    sparse = srigl(mlp(16, 32, 4), exclude="2", no_ablation=["2"], gamma_sal=0.5)
    assert [layer.ablate for layer in sparse.layers] == [True]


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generator() -> None:
    states = []
    for noise in (1, 2):
        model = mlp(16, 32, 4)
        torch.manual_seed(noise)
        sparse = srigl(model, seed=3)
        train(model, sparse.optimizer, sparse, 10)
        states.append(parameters(model))
    assert_same_bits(*states)


def checkpoint(*parts: Any) -> list[Any]:
    """State dicts as they come back from torch.save with weights_only loading."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    loaded: list[Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("grad_steps", [1, 3])
def test_resume_is_bit_for_bit(cut: int, grad_steps: int) -> None:
    def fresh(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
        model = mlp(16, 32, 4, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        return model, optimizer, srigl(model, optimizer, delta_t=6, gamma_sal=0.9, grad_steps=grad_steps)

    model, optimizer, sparse = fresh(0)
    train(model, optimizer, sparse, cut)
    saved = checkpoint(model, optimizer, sparse)
    train(model, optimizer, sparse, 25 - cut)
    resumed = fresh(9)
    for part, state in zip(reversed(resumed), reversed(saved), strict=True):
        part.load_state_dict(state)
    train(*resumed, 25 - cut)
    assert_same_bits(parameters(model), parameters(resumed[0]))


def test_state_of_other_layers_or_another_method_is_refused() -> None:
    one, other = mlp(16, 32, 4), mlp(16, 24, 4)
    state = srigl(one).state_dict()
    with pytest.raises(OptionError, match="the state is of layers"):
        srigl(other).load_state_dict(state)
    with pytest.raises(OptionError, match="the state is of RigL"):
        srigl(mlp(16, 32, 4)).load_state_dict(state | {"method": "RigL"})


def test_finalize_leaves_a_plain_masked_model() -> None:
    for keep in (True, False):
        model = mlp(16, 32, 4)
        sparse = srigl(model)
        train(model, sparse.optimizer, sparse, 5)
        masks = [layer.mask.clone() for layer in sparse.layers]
        assert sparse.finalize(keep_masks=keep) is model
        assert sum(name.endswith("_mask") for name in model.state_dict()) == (len(masks) if keep else 0)
        model.zero_grad()
        loss_of(model, batch(model, 0)).backward()
        for layer, mask in zip(sparse.layers, masks, strict=True):
            assert not layer.param[~mask].any()
            assert layer.param.grad is not None
            assert layer.param.grad[~mask].any(), "gradients are dense again: no hook is left"
        with pytest.raises(FaninError, match="after finalize"):
            sparse.step()


def test_deepcopy_and_save_during_training_give_masked_models() -> None:
    model = mlp(16, 32, 4)
    sparse = srigl(model)
    train(model, sparse.optimizer, sparse, 5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_same_bits(parameters(model), parameters(other))
        loss_of(other, batch(other, 0)).backward()
        weight, mask = weight_and_mask(other[0])
        assert weight.grad is not None
        assert weight.grad[~mask].any(), "a copy is not hooked"
    train(model, sparse.optimizer, sparse, 5)
    assert_agreement(sparse)


def test_a_replaced_parameter_is_noticed_at_the_next_step() -> None:
    def assign(model: nn.Module) -> None:
        model.load_state_dict(mlp(16, 32, 4).state_dict(), strict=False, assign=True)

    def parametrize(model: nn.Module) -> None:
        nn.utils.parametrizations.weight_norm(model.get_submodule("0"))

    for replace in (assign, parametrize):
        model = mlp(16, 32, 4)
        sparse = srigl(model)
        train(model, sparse.optimizer, sparse, 1)
        replace(model)
        with pytest.raises(
            FaninError, match=r"0\.weight: the model holds another Parameter.*after fully_shard"
        ):
            sparse.step()
        with pytest.raises(FaninError, match="another Parameter"):
            sparse.finalize()
        assert sparse.steps == 1


def test_a_training_that_would_stay_hooked_to_the_original_is_not_copied() -> None:
    model = mlp(16, 32, 4)
    sparse = srigl(model)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(FaninError, match="SRigL cannot be copied or pickled"):
            copied((model, sparse.optimizer, sparse) if copied is not copy.copy else sparse)


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


def test_a_model_with_masks_starts_from_them_and_keeps_its_weights() -> None:
    model = mlp(16, 32, 4)
    sparse = srigl(model)
    train(model, sparse.optimizer, sparse, 5)
    before = parameters(sparse.finalize())
    again = srigl(model)
    assert_same_bits(before, parameters(model))
    assert [x.budgets for x in again.layers] == [(int(x.mask.sum()),) for x in again.layers]
    again.layers[0].mask[0, 0] ^= True
    with pytest.raises(OptionError, match="fan-ins"):
        srigl(model)


def test_weights_written_off_the_mask_are_reported_at_the_next_update() -> None:
    model = mlp(16, 32, 4)
    sparse = srigl(model)
    train(model, sparse.optimizer, sparse, 1)
    with torch.no_grad():
        sparse.layers[0].param.fill_(1.0)
    with pytest.raises(MaskError, match=r"0\.weight: \d+ weights off the mask"):
        train(model, sparse.optimizer, sparse, 1)


def test_weights_written_off_the_mask_after_the_last_update_are_reported_by_finalize() -> None:
    model, dense = mlp(16, 32, 4), mlp(16, 32, 4).state_dict()
    trained = srigl(model)
    train(model, trained.optimizer, trained, 31)  # the topology is final from step 30 on
    static_model = mlp(16, 32, 4)
    static = Static(static_model, torch.optim.SGD(static_model.parameters(), 0.05), sparsity=0.75)
    for sparse in (trained, static):
        sparse.model.load_state_dict(dense, strict=False)
        with pytest.raises(MaskError, match=r"0\.weight: \d+ weights off the mask are not 0"):
            sparse.finalize()
        train(sparse.model, sparse.optimizer, sparse, 1)
        for layer in sparse.layers:
            assert layer.param.grad is not None
            assert not layer.param.grad[~layer.mask].any(), "the hooks are still there"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is 1.0"),
        ({"sparsity": 0.999, "allocation": "uniform"}, r"layer '2.weight': 0 active weights over 4 neurons"),
        (
            {"exclude": "fc9"},
            "exclude: 'fc9' matches no layer; layers that can be sparse: 0.weight, 2.weight",
        ),
        ({"include": nn.Conv2d}, "include: .*Conv2d.* matches no layer"),
        ({"overrides": {"conv*": 0.5}}, r"overrides: 'conv\*'"),
        ({"no_ablation": "1"}, "no_ablation: '1'"),
        ({"exclude": "*"}, "no layer is left to make sparse.*0.weight: excluded, 2.weight: excluded"),
        ({"allocation": "erc"}, "allocation is 'erc'"),
        ({"init": "kaiming"}, "init is 'kaiming'"),
        ({"gamma_sal": 1.5}, "gamma_sal is 1.5"),
        ({"ablation_reference": "k"}, "ablation_reference is 'k'"),
        ({"ablation": False, "gamma_sal": 0.9}, "ablation is False, with gamma_sal; expected none"),
        ({"ablation": False, "ablate_last": True, "no_ablation": "0"}, "with ablate_last, no_ablation"),
        ({"ablation": False, "ablation_reference": "dense"}, "with ablation_reference"),
        ({"allocation": "uniform", "erk_power": 0.5}, "erk_power is 0.5"),
        ({"mha_blocks": "q"}, "mha_blocks is 'q'"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"grad_steps": 0}, "grad_steps is 0"),
    ],
)
def test_refusals_name_the_quantity_and_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = mlp(16, 32, 4)
    before = parameters(model)
    with pytest.raises(OptionError, match=message):
        srigl(model, **options)
    assert_same_bits(before, parameters(model))


def test_an_option_that_does_not_exist_is_refused_before_anything_is_changed() -> None:
    model = mlp(16, 32, 4)
    before = parameters(model)
    with pytest.raises(TypeError, match="sparsty"):
        srigl(model, sparsty=0.5)
    assert_same_bits(before, parameters(model))


def test_a_weight_that_the_optimizer_does_not_hold_is_refused() -> None:
    model = mlp(16, 32, 4)
    with pytest.raises(OptionError, match=r"layer '2.weight' is not among the optimizer's parameters"):
        srigl(model, torch.optim.SGD(model[0].parameters(), 0.1))


def test_a_training_too_short_for_any_update_warns() -> None:
    with pytest.warns(UserWarning, match="the topology will never change"):
        srigl(mlp(16, 32, 4), delta_t=30)


@pytest.mark.parametrize(("init", "variance"), [("he", 2 / 64), ("xavier", 2 / (64 + 32))])
def test_initial_variance_belongs_to_the_sparse_fan_in(init: Any, variance: float) -> None:
    """320 neurons with 64 of 640 inputs: each input is read by 32 neurons on average."""
    model = nn.Sequential(nn.Linear(640, 320), nn.ReLU(), nn.Linear(320, 2))
    sparse = srigl(model, init=init, include="0", sparsity=0.9)
    active = sparse.layers[0].param[sparse.layers[0].mask]
    assert active.numel() == 320 * 64
    # the variance of a normal sample of N has relative deviation sqrt(2 / N), here 1 %: five of them
    assert active.var().item() == pytest.approx(variance, rel=0.05)


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
