"""Training loops as users write them: accumulation, clipping, AMP, compiled steps, learning-rate schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fanin_compile.train import SRigL
from tests.helpers import assert_close_at_scale
from tests.train_support import (
    assert_agreement,
    assert_constant_fan_in,
    assert_same_bits,
    batch,
    loss_of,
    mlp,
    parameters,
    train,
)

F64 = torch.float64


def start(
    dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
    model = mlp(16, 32, 24, 4, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    options = {"total_steps": 40, "delta_t": 3, "sparsity": 0.75, "gamma_sal": 0.8} | options
    return model, optimizer, SRigL(model, optimizer, **options)


def accumulate(model: nn.Module, step: int, parts: int) -> None:
    """Backward of one batch in micro-batches: their summed gradient is the whole batch's."""
    for part in batch(model, step).chunk(parts):
        (loss_of(model, part) / parts).backward()


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_accumulated_micro_batches_choose_as_the_whole_batch_does(grad_steps: int) -> None:
    """In float64, where rounding of the sum cannot change a rank."""
    states = []
    for parts in (1, 4):
        model, optimizer, sparse = start(F64, grad_steps=grad_steps)
        for step in range(20):
            optimizer.zero_grad()
            accumulate(model, step, parts)
            optimizer.step()
            sparse.step()
            assert_agreement(sparse)
        states.append(parameters(model))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])


def test_gradients_zeroed_in_place_choose_as_fresh_ones_do() -> None:
    states = []
    for to_none in (True, False):
        model, optimizer, sparse = start(grad_steps=2)
        for step in range(12):
            optimizer.zero_grad(set_to_none=to_none)
            accumulate(model, step, 2)
            optimizer.step()
            sparse.step()
            assert_agreement(sparse)
        states.append(parameters(model))
    assert_same_bits(*states)


def test_the_recorded_gradient_is_the_dense_one_summed_over_the_window() -> None:
    """Three steps of two micro-batches before the update at step 5."""
    model, optimizer, sparse = start(F64, grad_steps=3, delta_t=5)
    layer = sparse.layers[0]
    dense: list[torch.Tensor] = []
    layer.param.register_hook(lambda g: dense.append(g.clone()))
    for step in range(5):
        optimizer.zero_grad()
        accumulate(model, step, 2)
        if step == 1:
            assert layer.gradient is None, "nothing is recorded outside the window"
            dense.clear()
        if step == 4:
            assert layer.gradient is not None
            assert layer.earlier is not None
            assert len(dense) == 6
            torch.testing.assert_close(layer.gradient + layer.earlier, sum(dense))
        optimizer.step()
        sparse.step()
    assert layer.gradient is None
    assert layer.earlier is None


def test_clipping_sees_the_norm_of_active_weights_only() -> None:
    model, optimizer, sparse = start(delta_t=1)
    for step in range(8):
        optimizer.zero_grad()
        loss_of(model, batch(model, step)).backward()
        inside = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        for layer in sparse.layers:
            assert layer.gradient is not None
            assert layer.gradient[~layer.mask].any(), "the dense gradient is kept aside"
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        exact = torch.stack([g.double().norm() for g in inside]).norm()
        assert_close_at_scale(norm, exact)
        assert_agreement(sparse)
        optimizer.step()
        sparse.step()
        assert_constant_fan_in(sparse)


def test_clipping_does_not_reach_the_gradient_that_ranks() -> None:
    """Clipping scales active entries only: ranked together with inactive ones, they would lose their place."""
    masks = []
    for clip in (None, 1e-6):
        model = mlp(16, 32, 4)
        optimizer = torch.optim.SGD(
            model.parameters(), 0.0
        )  # the weights stay, so that only gradients matter
        sparse = SRigL(model, optimizer, total_steps=10, delta_t=2, sparsity=0.75, gamma_sal=0.9)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model, batch(model, step)).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            sparse.step()
        masks.append([layer.mask for layer in sparse.layers])
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_grad_scaler_changes_nothing_but_the_scale() -> None:
    states = []
    for scale in (None, 2.0**12):
        model, optimizer, sparse = start()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for step in range(12):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, batch(model, step))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            sparse.step()
            assert_agreement(sparse)
        states.append(parameters(model))
    assert_same_bits(*states)  # a power of two scales exactly


def test_an_update_waits_for_a_finite_gradient() -> None:
    model, optimizer, sparse = start(delta_t=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    before = [layer.mask.clone() for layer in sparse.layers]
    updated = []
    for step in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, batch(model, step))
        scaler.scale(loss * (torch.inf if step in (3, 4) else 1.0)).backward()
        scaler.step(optimizer)  # skips the steps that overflowed
        scaler.update()
        if step == 4:
            assert all(torch.equal(a, b.mask) for a, b in zip(before, sparse.layers, strict=True))
        updated.append(sparse.step())
        assert_constant_fan_in(sparse)
        if step not in (3, 4):  # inf * 0 is NaN, which the scaler has to see
            assert_agreement(sparse)
    assert updated == [False] * 5 + [True]


def test_autocast_trains_and_agrees() -> None:
    model, optimizer, sparse = start()
    for step in range(9):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(model, step))
        loss.backward()
        optimizer.step()
        sparse.step()
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)


def test_float16_autocast_with_a_scaler_that_overflows_at_first() -> None:
    """Steps that the scaler skips count as steps, and an update waits whose gradient overflowed."""
    model, optimizer, sparse = start(delta_t=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    first, skipped, waited, updates = [layer.mask.clone() for layer in sparse.layers], 0, 0, 0
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, batch(model, step))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
        finite = all(x.param.grad is not None and x.param.grad.isfinite().all() for x in sparse.layers)
        updated = sparse.step()
        waited += not finite and step % 2
        assert finite or not updated
        updates += updated
        assert_constant_fan_in(sparse)
        if finite:
            assert_agreement(sparse)
    assert skipped > 2
    assert waited > 1
    assert updates > 2
    assert any(not torch.equal(a, b.mask) for a, b in zip(first, sparse.layers, strict=True))


def test_bfloat16_weights_train_and_agree() -> None:
    model, optimizer, sparse = start(torch.bfloat16)
    train(model, optimizer, sparse, 9)
    assert_agreement(sparse)
    assert_constant_fan_in(sparse)


def sgd_start(model: nn.Module) -> tuple[torch.optim.Optimizer, SRigL]:
    """SGD, because a compiled Adam computes its bias correction in float32 and an eager one in float64."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return optimizer, SRigL(model, optimizer, total_steps=40, delta_t=3, sparsity=0.75, gamma_sal=0.8)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_step_equals_the_eager_one(backend: str) -> None:
    """The whole step in the user's torch.compile, and SRigL given the compiled model."""
    eager, model = mlp(16, 32, 24, 4, dtype=F64), mlp(16, 32, 24, 4, dtype=F64)
    compiled = torch.compile(nn.Sequential(model), backend=backend)
    assert isinstance(compiled, nn.Module)
    optimizer, sparse = sgd_start(compiled)
    assert [layer.name for layer in sparse.layers] == ["0.0.weight", "0.2.weight", "0.4.weight"]

    @torch.compile(backend=backend)
    def whole_step(x: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss_of(compiled, x).backward()
        optimizer.step()

    for step in range(9):
        whole_step(batch(model, step))
        sparse.step()
        assert_agreement(sparse)
    train(eager, *sgd_start(eager), 9)
    for name, value in parameters(eager).items():
        torch.testing.assert_close(value, parameters(model)[name])


def test_a_compiled_optimizer_agrees() -> None:
    model, optimizer, sparse = start()
    take_step = torch.compile(optimizer.step, backend="aot_eager")
    for step in range(7):
        optimizer.zero_grad()
        loss_of(model, batch(model, step)).backward()
        take_step()
        sparse.step()
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)


def test_a_learning_rate_schedule_runs_beside_it() -> None:
    model, optimizer, sparse = start()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=12)
    rates = []
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model, batch(model, step)).backward()
        optimizer.step()
        sparse.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        assert_agreement(sparse)
    assert len(set(rates)) == 12
    assert sparse.steps == 12
