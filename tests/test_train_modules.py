"""Attention, GPT-2's Conv1D, tied and frozen weights, and saying which layers are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fanin_compile.errors import OptionError
from fanin_compile.train import SRigL, prune_to_fan_in
from fanin_compile.train.layers import find_layers
from tests.train_support import assert_agreement, assert_constant_fan_in, fan_ins, mlp, train, weight_and_mask


class Attention(nn.Module):
    """x [B, T, 16] -> the same; keys and values from the first ``kdim`` features."""

    def __init__(self, kdim: int = 16) -> None:
        super().__init__()
        self.kdim = kdim
        self.mha = nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = x[..., : self.kdim]
        y: Tensor = self.mha(x, memory, memory)[0]
        return y


def start(model: nn.Module, **options: Any) -> SRigL:
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    return SRigL(model, optimizer, **({"total_steps": 40, "delta_t": 2, "sparsity": 0.5} | options))


def train_on(sparse: SRigL, x: Tensor, steps: int = 8) -> None:
    for _ in range(steps):
        sparse.optimizer.zero_grad()
        (sparse.model(x) - x.roll(1, -1)).square().mean().backward()
        sparse.optimizer.step()
        sparse.step()
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)


@pytest.mark.parametrize(("blocks", "count"), [("matrix", 1), ("projection", 3), ("head", 12)])
def test_attention_input_projection_in_blocks(blocks: Any, count: int) -> None:
    """Each block keeps its own budget: heads cannot take inputs from each other."""
    torch.manual_seed(0)
    model = Attention()
    sparse = start(
        model, mha_blocks=blocks, gamma_sal=0.95, alpha=0.9, allocation="uniform", dense_first=False
    )
    projection, output = sparse.layers
    assert (projection.name, projection.blocks) == ("mha.in_proj_weight", count)
    assert projection.budgets == (48 * 16 // 2 // count,) * count
    assert weight_and_mask(model.mha, "in_proj_weight")[1].shape == (48, 16)
    assert (output.name, output.blocks) == ("mha.out_proj.weight", 1)
    train_on(sparse, torch.randn(4, 5, 16))
    per_block = [sum(k > 0 for k in block.sum(dim=1)) for block in projection.mask.chunk(12)]
    assert min(per_block) < 4, "some neurons were ablated"
    if blocks == "head":
        assert min(per_block) >= 2, "a head's 32 weights need 2 of its neurons"


def test_a_state_of_other_blocks_is_refused() -> None:
    state = start(Attention(), mha_blocks="head").state_dict()
    with pytest.raises(OptionError, match=r"'mha.in_proj_weight': the state is of 12 blocks; expected 3"):
        start(Attention(), mha_blocks="projection").load_state_dict(state)


def test_attention_with_other_key_and_value_widths() -> None:
    torch.manual_seed(0)
    model = Attention(kdim=8)
    sparse = start(model, allocation="uniform", dense_first=False)
    assert [(x.name, x.dense_fan_in) for x in sparse.layers] == [
        ("mha.q_proj_weight", 16),
        ("mha.k_proj_weight", 8),
        ("mha.v_proj_weight", 8),
        ("mha.out_proj.weight", 16),
    ]
    train_on(sparse, torch.randn(4, 5, 16))


def test_gpt2_conv1d_counts_inputs_down_its_columns() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    sparse = start(model, sparsity=0.75, allocation="uniform", dense_first=False)
    names = [layer.name for layer in sparse.layers]
    assert "transformer.h.0.attn.c_attn.weight" in names
    assert "lm_head.weight" not in names, "it is tied to the embedding"
    first = sparse.layers[0]
    assert (first.neurons, first.dense_fan_in, first.mask.shape) == (96, 32, (32, 96))
    assert fan_ins(first) == [8] * 96
    ids = torch.randint(0, 50, (2, 16))
    for _ in range(6):
        sparse.optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        sparse.optimizer.step()
        sparse.step()
        assert_agreement(sparse)
        assert_constant_fan_in(sparse)


def test_tied_layers_share_one_mask_and_either_name_means_them() -> None:
    model = mlp(16, 16, 16, 4)
    model[2].weight = model[0].weight
    sparse = start(model, include=["2"])
    (layer,) = sparse.layers
    assert layer.tied_names == ["0.weight", "2.weight"]
    assert weight_and_mask(model[0])[1] is weight_and_mask(model[2])[1]
    train(sparse.model, sparse.optimizer, sparse, 6)
    assert_agreement(sparse)


def test_tied_convolutions_in_another_memory_format_keep_one_mask() -> None:
    """.to(memory_format=...) gives each owner a buffer of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    model[2].weight = model[0].weight
    sparse = start(model, sparsity=0.8)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has no stub for it
    train_on(sparse, torch.randn(4, 8, 6, 6))
    for layer in (model[0], model[2]):
        weight, mask = weight_and_mask(layer)
        assert not weight[~mask].any()
        assert torch.equal(mask, sparse.layers[0].mask)
    assert sparse.layers[0].explored is not None
    assert not torch.equal(sparse.layers[0].explored, sparse.layers[0].mask), "there were updates"


def test_a_mask_is_found_under_any_of_the_names_of_a_tied_weight() -> None:
    model = mlp(16, 16, 16, 4)
    prune_to_fan_in(model, 0.5, include="2")
    model[0].weight = model[2].weight
    before = weight_and_mask(model[2])[1].clone()
    start(model)
    assert torch.equal(weight_and_mask(model[0])[1], before)
    assert torch.equal(weight_and_mask(model[2])[1], before)


def test_weights_that_cannot_be_sparse_are_named_with_the_reason() -> None:
    model = nn.Sequential(
        *(nn.Linear(4, 4) for _ in range(5)), nn.ConvTranspose1d(4, 4, 3), nn.Embedding(4, 4)
    )
    model[1].requires_grad_(False)
    nn.utils.parametrizations.weight_norm(model[2])
    prune.l1_unstructured(model[3], "weight", 0.5)
    model[4].weight = model[6].weight
    layers, dense = find_layers(model)
    assert [layer.name for layer in layers] == ["0.weight"]
    assert dense == {
        "1.weight": "frozen",
        "2.weight": "computed from other parameters",
        "3.weight": "computed from other parameters",
        "4.weight": "tied to a weight that is always dense",
    }
    with pytest.raises(OptionError, match=r"no layer is left to make sparse.*2.weight: computed"):
        start(model, exclude="0")


def test_a_lazy_module_without_a_shape_is_refused() -> None:
    with pytest.raises(OptionError, match=r"0.weight has no shape yet"):
        find_layers(nn.Sequential(nn.LazyLinear(4)))


def test_layers_are_meant_by_name_glob_type_or_predicate() -> None:
    def chosen(**options: Any) -> list[str]:
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"conv": nn.Conv2d(8, 8, 3), "blocks": mlp(16, 32, 16), "head": nn.Linear(16, 8)}
        )
        options = {"allocation": "uniform", "dense_first": False} | options
        return [layer.name.removesuffix(".weight") for layer in start(model, **options).layers]

    assert chosen() == ["conv", "blocks.0", "blocks.2", "head"]
    assert chosen(include="blocks.0") == ["blocks.0"]
    assert chosen(include="blocks.0.weight") == ["blocks.0"]
    assert chosen(include="blocks.*", exclude="*.2") == ["blocks.0"]
    assert chosen(include=nn.Conv2d) == ["conv"]
    assert chosen(include=[nn.Conv2d, "head"]) == ["conv", "head"]
    assert chosen(exclude=lambda module, name: "blocks" in name or isinstance(module, nn.Conv2d)) == ["head"]
    assert chosen(allocation="uniform", dense_first=None) == ["blocks.0", "blocks.2", "head"]
    assert chosen(dense_first=True, overrides={"conv": 0.25}) == ["conv", "blocks.0", "blocks.2", "head"]


def test_overrides_take_the_first_match_and_leave_the_rest_to_the_rule() -> None:
    model = mlp(40, 40, 40, 40)
    sparse = start(model, sparsity=0.9, overrides={"2": 0.5, "*": 0.75}, dense_first=False)
    assert [fan_ins(layer)[0] for layer in sparse.layers] == [10, 20, 10]
    model = mlp(40, 40, 40, 40)
    sparse = start(model, sparsity=0.9, overrides={"2": 0.0}, dense_first=False)
    assert [fan_ins(layer)[0] for layer in sparse.layers] == [4, 4]
    assert sparse.plan.dense == {"2.weight": "allocated density 1"}


def test_repr_says_what_was_made_of_every_layer() -> None:
    sparse = start(mlp(40, 40, 40, 40), sparsity=0.9, exclude="4", allocation="uniform", dense_first=True)
    lines = repr(sparse).splitlines()
    assert lines[1:] == [
        "  2.weight: 40 of 40 neurons with 4 of 40 inputs",
        "  4.weight: dense (excluded)",
        "  0.weight: dense (first layer)",
    ]
