"""One-shot pruning: which inputs stay, what is left alone, and that training goes on from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fanin_compile import condense
from fanin_compile.errors import OptionError
from fanin_compile.train import SRigL, Static, prune_to_fan_in
from tests.train_support import (
    ConvNet,
    assert_agreement,
    assert_constant_fan_in,
    assert_same_bits,
    batch,
    loss_of,
    mlp,
    parameters,
    train,
    weight_and_mask,
)


def test_magnitude_keeps_the_largest_inputs_of_each_neuron() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        model[0].get_parameter("weight").copy_(torch.tensor([[1.0, -4, 3, 2], [0.1, 0.2, -0.4, 0.3]]))
    plan = prune_to_fan_in(model, 0.5)
    weight, mask = weight_and_mask(model[0])
    assert mask.int().tolist() == [[0, 1, 1, 0], [0, 0, 1, 1]]
    torch.testing.assert_close(weight, torch.tensor([[0.0, -4, 3, 0], [0, 0, -0.4, 0.3]]))
    assert [layer.name for layer in plan.sparse] == ["0.weight"]


def test_every_kind_of_convolution_keeps_the_largest_of_each_channel() -> None:
    torch.manual_seed(0)
    model = ConvNet()
    dense = parameters(model)
    plan = prune_to_fan_in(model, 0.6)
    assert [(x.name, x.dense_fan_in, x.budgets[0] // x.neurons) for x in plan.sparse] == [
        ("conv2.weight", 36, 14),
        ("grouped.weight", 18, 7),
        ("conv1.weight", 60, 24),
        ("conv3.weight", 18, 7),
        ("head.weight", 320, 128),
    ]
    for layer in plan.sparse:
        rows = dense[layer.name].flatten(1)
        k = layer.budgets[0] // layer.neurons
        expected = torch.zeros_like(rows).scatter(1, rows.abs().topk(k).indices, 1.0) * rows
        assert torch.equal(layer.param.flatten(1), expected)
        assert torch.equal(layer.mask, layer.param != 0)


def test_gradient_keeps_what_the_loss_depends_on() -> None:
    """Input 0 is never there: its weights, though the largest, do not matter."""
    model = nn.Sequential(nn.Linear(4, 3))
    weight = model[0].get_parameter("weight")
    with torch.no_grad():
        weight[:, 0] = 100.0
    weight.grad = torch.full_like(weight, 7.0)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0.0
    prune_to_fan_in(model, 0.25, criterion="gradient", closure=lambda: model(x).square().mean().backward())
    assert weight_and_mask(model[0])[1].int().tolist() == [[0, 1, 1, 1]] * 3
    assert weight.grad.eq(7.0).all(), "gradients that were there are put back"


@pytest.mark.parametrize("method", [SRigL, Static])
def test_training_goes_on_from_a_pruned_model(method: type[SRigL] | type[Static]) -> None:
    model = mlp(24, 32, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(5):  # the optimizer has dense state by now
        optimizer.zero_grad()
        loss_of(model, batch(model, step)).backward()
        optimizer.step()
    prune_to_fan_in(model, 0.75)
    pruned = parameters(model)
    updates: dict[str, Any] = {"total_steps": 20, "delta_t": 2} if method is SRigL else {}
    sparse = method(model, optimizer, sparsity=0.75, **updates)
    assert_same_bits(pruned, parameters(model))
    assert_agreement(sparse)
    train(model, optimizer, sparse, 8)
    assert_agreement(sparse)
    assert_constant_fan_in(sparse)


def test_options_choose_layers_and_fan_ins() -> None:
    def fan_ins(**options: Any) -> list[int]:
        model = mlp(40, 20, 20, 10)
        plan = prune_to_fan_in(model, 0.8, **options)
        return [int(layer.mask.sum()) // layer.neurons for layer in plan.sparse]

    assert fan_ins() == [8, 4, 4]
    assert fan_ins(exclude="4") == [8, 4]
    assert fan_ins(include=["0", "4"]) == [8, 4]
    assert fan_ins(dense_first=True) == [4, 4]
    assert fan_ins(overrides={"2": 0.5}) == [8, 10, 4]
    # 280 of 1400 weights, shared as 60 : 40 : 30
    assert fan_ins(allocation="erk") == [6, 4, 6]
    assert fan_ins(allocation="erk", erk_power=0.0) == [8, 4, 4]


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (0.99, {}, r"layer '0.weight'.*fan-in of 0"),
        (0.5, {"criterion": "hessian"}, "criterion is 'hessian'"),
        (0.5, {"criterion": "gradient"}, "closure: none"),
        (0.5, {"closure": lambda: None}, "closure: one"),
        (0.5, {"criterion": "gradient", "closure": lambda: None}, "no gradient after closure"),
        (0.5, {"poison": torch.inf}, "layer '2.weight': 1 of its magnitude scores are infinite or NaN"),
        (0.5, {"poison": torch.nan}, "layer '2.weight': 1 of its magnitude scores are infinite or NaN"),
        (0.5, {"criterion": "gradient", "poison": torch.nan}, "layer '0.weight': 768 of its gradient scores"),
    ],
)
def test_refusals_leave_the_model_alone(sparsity: float, options: dict[str, Any], message: str) -> None:
    """``poison`` stands in one weight of the last layer, from which a gradient carries it to all of the first."""
    model = mlp(24, 32, 4)
    options = dict(options)
    if "poison" in options:
        with torch.no_grad():
            model[2].get_parameter("weight")[1, 2] = options.pop("poison")
        if options:
            options["closure"] = lambda: loss_of(model, batch(model, 0)).backward()
    before = parameters(model)
    with pytest.raises(OptionError, match=message):
        prune_to_fan_in(model, sparsity, **options)
    after = parameters(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0, equal_nan=True)


def test_blocks_which_cannot_change_a_choice_within_each_neuron_are_no_option() -> None:
    with pytest.raises(TypeError, match="mha_blocks"):
        prune_to_fan_in(nn.MultiheadAttention(16, 4), 0.5, mha_blocks="head")  # type: ignore[call-arg]


def assert_masks_are_what_the_model_computes(model: nn.Module) -> None:
    """No weight is off a mask, so that the compiler, which reads the masks, gives the model's outputs."""
    for name, mask in model.named_buffers():
        off = model.get_parameter(name.removesuffix("_mask"))[~mask]
        assert not off.any(), f"{name}: {int(off.count_nonzero())} weights off it"
    x = batch(model, 0)
    with torch.no_grad():
        torch.testing.assert_close(condense(model)(x), model(x))


@pytest.mark.parametrize("allocation", ["erk", "uniform"])
def test_every_pruned_layer_is_trained_with_its_mask(allocation: Any) -> None:
    """ERK allots the head density 1 here, and "uniform" leaves a first layer dense; their masks stay in force."""
    model = mlp(64, 384, 384, 8)
    prune_to_fan_in(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    sparse = SRigL(model, optimizer, total_steps=40, delta_t=3, allocation=allocation)
    assert [layer.name for layer in sparse.layers] == ["0.weight", "2.weight", "4.weight"]
    train(model, optimizer, sparse, 20)
    assert_masks_are_what_the_model_computes(sparse.finalize())


def test_going_on_with_the_same_options_keeps_dense_layers_dense() -> None:
    model = mlp(64, 384, 384, 8)
    plans = []
    for _ in range(2):
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        sparse = SRigL(model, optimizer, total_steps=20, delta_t=3)
        plans.append(([layer.name for layer in sparse.layers], sparse.plan.dense))
        train(model, optimizer, sparse, 10)
        sparse.finalize()
    assert plans[0] == plans[1] == (["0.weight", "2.weight"], {"4.weight": "allocated density 1"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": "2"}, r"layer '2.weight' has a mask, and would be left dense \(excluded\)"),
        ({"include": "0"}, r"layer '2.weight' has a mask.*\(not included\)"),
        ({"dense_first": True}, r"layer '0.weight' has a mask.*\(first layer\)"),
        (
            {"overrides": {"2": 0.0}},
            r"layer '2.weight' has a mask of sparsity 0.75, which stays; expected 0:",
        ),
        (
            {"overrides": {"2": 0.5}},
            r"layer '2.weight' has a mask of sparsity 0.75, which stays; expected 0.5",
        ),
    ],
)
def test_leaving_a_pruned_layer_out_is_refused(options: dict[str, Any], message: str) -> None:
    model = mlp(24, 32, 4)
    prune_to_fan_in(model, 0.75)
    before = parameters(model)
    with pytest.raises(OptionError, match=message):
        SRigL(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            total_steps=20,
            delta_t=2,
            sparsity=0.75,
            **options,
        )
    assert_same_bits(before, parameters(model))


def test_masks_of_another_sparsity_stay_and_are_warned_of() -> None:
    model = mlp(24, 32, 4)
    prune_to_fan_in(model, 0.5, overrides={"2": 0.75})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="sparsity is 0.9, but the masks that 1 layers have .* sparsity 0.5"):
        sparse = SRigL(model, optimizer, total_steps=20, delta_t=2, overrides={"2": 0.75})
    assert [layer.budgets for layer in sparse.layers] == [(12 * 32,), (8 * 4,)]
