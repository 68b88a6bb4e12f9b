"""RigL, SET and static training on the shared machinery: what each keeps, grows and never touches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fanin_compile.errors import MaskError, OptionError
from fanin_compile.train import SET, RigL, SparseTraining, SRigL, Static
from tests.train_support import (
    assert_agreement,
    assert_same_bits,
    fan_ins,
    mlp,
    parameters,
    train,
)

METHODS: tuple[type[SparseTraining], ...] = (RigL, SET, Static)


def start(method: type[SparseTraining], model: nn.Module | None = None, **options: Any) -> SparseTraining:
    model = model or mlp(24, 32, 16, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    updates: dict[str, Any] = {} if method is Static else {"total_steps": 40, "delta_t": 2}
    settings: dict[str, Any] = {"sparsity": 0.8, **updates, **options}
    return method(model, optimizer, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_step_keeps_the_count_and_the_zeros(method: type[SparseTraining]) -> None:
    sparse = start(method)
    first = [layer.mask.clone() for layer in sparse.layers]
    for _ in range(20):
        train(sparse.model, sparse.optimizer, sparse, 1)
        assert_agreement(sparse)
        for layer, mask in zip(sparse.layers, first, strict=True):
            assert int(layer.mask.sum()) == int(mask.sum())
    changed = any(not torch.equal(a, b.mask) for a, b in zip(first, sparse.layers, strict=True))
    assert changed is (method is not Static)


def test_unstructured_methods_use_the_whole_budget_and_static_a_constant_fan_in() -> None:
    for method in (RigL, SET):
        for layer in start(method).layers:
            assert (int(layer.mask.sum()),) == layer.budgets
            assert len(set(fan_ins(layer))) > 1
    for layer in start(Static).layers:
        assert set(fan_ins(layer)) == {layer.budgets[0] // layer.neurons}


def test_rigl_grows_the_largest_gradients_and_set_does_not_look_at_them() -> None:
    """The same batch on the same weights: RigL's grown weights are the top of the dense gradient."""
    for method, expected in ((RigL, True), (SET, False)):
        sparse = start(method, delta_t=1, include="0", alpha=0.2)
        layer = sparse.layers[0]
        old = layer.mask.clone()
        dense: list[torch.Tensor] = []
        layer.param.register_hook(lambda g, to=dense: to.append(g.clone()))
        train(sparse.model, sparse.optimizer, sparse, 1)
        grown = layer.mask & ~old
        gradient = dense[0].abs().masked_fill(old, 0.0)
        best = gradient.flatten().topk(int(grown.sum())).values.min()
        assert bool((gradient[grown] >= best).all()) is expected


@pytest.mark.parametrize("method", METHODS)
def test_seeded_and_resumed_bit_for_bit(method: type[SparseTraining]) -> None:
    whole, part = start(method), start(method)
    train(whole.model, whole.optimizer, whole, 15)
    train(part.model, part.optimizer, part, 7)
    resumed = start(method, seed=5)
    resumed.model.load_state_dict(part.model.state_dict())
    resumed.optimizer.load_state_dict(part.optimizer.state_dict())
    resumed.load_state_dict(part.state_dict())
    train(resumed.model, resumed.optimizer, resumed, 8)
    assert_same_bits(parameters(whole.model), parameters(resumed.model))
    other = start(method, seed=1)
    assert any(
        not torch.equal(a.mask, b.mask) for a, b in zip(start(method).layers, other.layers, strict=True)
    )


@pytest.mark.parametrize("method", [*METHODS, SRigL])
def test_a_layer_left_without_weights_is_named(method: type[SparseTraining]) -> None:
    model = mlp(24, 32, 16, 4)
    before = parameters(model)
    with pytest.raises(OptionError, match=r"layer '4.weight'.*fan-in of 0"):
        start(method, model, overrides={"4": 0.995})
    assert_same_bits(before, parameters(model))


@pytest.mark.parametrize("method", [*METHODS, SRigL])
@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 16), r"4.weight: expected a bool buffer.*found torch.float32"),
        (torch.ones(4, 15, dtype=torch.bool), r"found torch.bool of shape \(4, 15\)"),
        (torch.zeros(4, 16, dtype=torch.bool), "layer '4.weight': 0 active weights"),
    ],
)
def test_a_mask_that_cannot_be_started_from_is_refused(
    method: type[SparseTraining], mask: torch.Tensor, message: str
) -> None:
    model = mlp(24, 32, 16, 4)
    model[4].register_buffer("weight_mask", mask)
    before = parameters(model)
    with (
        warnings.catch_warnings(action="ignore"),  # the mask is of another sparsity, too
        pytest.raises((MaskError, OptionError), match=message),
    ):
        start(method, model)
    assert_same_bits(before, parameters(model))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        (Static, {"total_steps": 40}),
        (Static, {"alpha": 0.5}),
        (Static, {"delta_t": 2}),
        (Static, {"t_end": 20}),
        (Static, {"grad_steps": 2}),
        (Static, {"mha_blocks": "head"}),
        (SET, {"grad_steps": 2}),
    ],
)
def test_options_that_would_change_nothing_are_refused(
    method: type[SparseTraining], option: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, OptionError), match=next(iter(option))):
        start(method, **option)
