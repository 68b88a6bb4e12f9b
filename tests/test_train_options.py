"""Options of SRigL: each changes the result, and what is out of range is refused before anything is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fanin_compile.errors import OptionError
from tests.train_support import assert_same_bits, mlp, parameters, srigl, train

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
