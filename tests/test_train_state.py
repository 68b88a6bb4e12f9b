"""What outlives a step: checkpoints, copies, masks that are there already, and the plain model in the end."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fanin_compile.errors import FaninError, MaskError, OptionError
from fanin_compile.train import SRigL, Static
from tests.train_support import (
    assert_agreement,
    assert_same_bits,
    batch,
    loss_of,
    mlp,
    parameters,
    srigl,
    train,
    weight_and_mask,
)


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


Parts = tuple[nn.Module, torch.optim.Optimizer, SRigL]


def start(**options: Any) -> Parts:
    model = mlp(16, 32, 24, 4)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return model, optimizer, srigl(model, optimizer, delta_t=3, gamma_sal=0.8, **options)


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_resume_between_two_micro_batches_is_bit_for_bit(grad_steps: int) -> None:
    """Cut after one of three micro-batches of the step that ends in an update."""

    def run(parts: Parts, *, cut: io.BytesIO | None = None, resumed: bool = False) -> None:
        model, optimizer, sparse = parts
        for step in range(sparse.steps, 10):
            done = 1 if resumed and step == 5 else 0
            if not done:
                optimizer.zero_grad()
            for micro in batch(model, step, 9).chunk(3)[done:]:
                (loss_of(model, micro) / 3).backward()
                if cut is not None and step == 5:
                    torch.save(
                        [model.state_dict(), optimizer.state_dict(), sparse.state_dict(grads=True)], cut
                    )
                    return
            optimizer.step()
            sparse.step()

    uncut = start(grad_steps=grad_steps)
    run(uncut)
    file = io.BytesIO()
    run(start(grad_steps=grad_steps), cut=file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, optimizer, sparse = resumed = start(grad_steps=grad_steps, seed=7)
    model.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    sparse.load_state_dict(states[2])
    run(resumed, resumed=True)
    assert_same_bits(parameters(uncut[0]), parameters(model))


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
