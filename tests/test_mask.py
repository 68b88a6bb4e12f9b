"""Masks: each source gives the mask it means, and the weight the forward pass would use."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.pruning.sparsifier.utils import FakeSparsity
from torch.nn.utils import parametrizations, parametrize, prune

from fanin_compile.errors import MaskError
from fanin_compile.mask import (
    MaskedWeight,
    Source,
    active_rows,
    check_mask,
    fan_in,
    find_masked_weight,
    masked_weights,
)
from tests.strategies import Masked
from tests.strategies import masked_weights as masked_weight_cases

MASK = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.bool)


def linear() -> nn.Linear:
    """3 -> 2 with the weight [[1, 2, 3], [4, 5, 6]]."""
    layer = nn.Linear(3, 2)
    layer.weight.data = torch.arange(1.0, 7.0).view(2, 3)
    return layer


def find(module: nn.Module, name: str = "weight", mask: Tensor | None = None) -> MaskedWeight:
    found = find_masked_weight(module, name, mask)
    assert found is not None
    return found


def assert_masked(found: MaskedWeight, source: Source, mask: Tensor = MASK) -> None:
    """The mask, and the weight of linear() under it."""
    assert found.source == source
    assert found.mask.dtype == torch.bool
    assert torch.equal(found.mask, mask)
    assert torch.equal(found.weight, linear().weight * mask)
    assert not found.weight.requires_grad


class SelfMasked(nn.Linear):
    """A user's layer that masks by itself."""

    def __init__(self, mask: Tensor, attribute: str) -> None:
        super().__init__(3, 2)
        self.weight.data = linear().weight.data
        self.attribute = attribute
        self.register_buffer(attribute, mask)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * getattr(self, self.attribute), self.bias)


class Scale(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 2 * w


class Inverted(nn.Module):
    """A parametrization whose `mask` is True where a weight is dropped."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: Tensor) -> Tensor:
        return w.masked_fill(self.get_buffer("mask").bool(), 0)


# One test for each source.


def test_prune_custom_from_mask() -> None:
    assert_masked(find(prune.custom_from_mask(linear(), "weight", MASK)), "prune")


@pytest.mark.parametrize(
    "apply",
    [
        lambda m: prune.l1_unstructured(m, "weight", amount=2),
        lambda m: prune.random_unstructured(m, "weight", amount=0.5),
        lambda m: prune.ln_structured(m, "weight", amount=1, n=2, dim=0),
        lambda m: prune.random_structured(m, "weight", amount=1, dim=1),
        lambda m: prune.identity(m, "weight"),
        lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=3),
    ],
)
def test_every_method_of_prune(apply: Callable[[nn.Module], object]) -> None:
    layer = linear()
    apply(layer)
    assert_masked(find(layer), "prune", layer.get_buffer("weight_mask").bool())


def test_iterated_pruning_joins_its_masks() -> None:
    layer = prune.custom_from_mask(linear(), "weight", torch.tensor([[1, 1, 1], [0, 0, 0]]))
    prune.custom_from_mask(layer, "weight", torch.tensor([[1, 0, 1], [1, 1, 1]]))
    assert_masked(find(layer), "prune")


def test_prune_of_another_parameter_name() -> None:
    layer = nn.Module()
    layer.register_parameter("kernel", nn.Parameter(linear().weight.data))
    prune.custom_from_mask(layer, "kernel", MASK)
    found = find(layer, "kernel")
    assert found.name == "kernel"
    assert_masked(found, "prune")


def test_prune_removed_leaves_zeros() -> None:
    layer = prune.remove(prune.custom_from_mask(linear(), "weight", MASK), "weight")
    assert_masked(find(layer), "zeros")


def test_a_stale_pruned_attribute_is_not_read() -> None:
    """The hook sets .weight at the next forward only; until then it holds the old values."""
    layer = prune.custom_from_mask(linear(), "weight", MASK)
    with torch.no_grad():
        layer.get_parameter("weight_orig").mul_(10)
    assert torch.equal(find(layer).weight, 10 * linear().weight * MASK)


def test_fake_sparsity_of_torch_ao() -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", FakeSparsity(MASK.float()))
    assert_masked(find(layer), "parametrize")


def test_stacked_parametrizations_join_their_masks_and_are_all_applied() -> None:
    layer = linear()
    for step in (FakeSparsity(MASK | ~MASK[1:]), Scale(), FakeSparsity(MASK | MASK[:1])):
        parametrize.register_parametrization(layer, "weight", step)
    found = find(layer)
    assert found.mask.tolist() == [[True, False, True], [True, False, True]]
    assert torch.equal(found.weight, 2 * linear().weight * found.mask)


def test_an_active_zero_of_a_parametrized_weight_stays_active() -> None:
    layer = linear()
    layer.weight.data[0, 0] = 0
    parametrize.register_parametrization(layer, "weight", FakeSparsity(MASK.float()))
    assert torch.equal(find(layer).mask, MASK)


def test_a_parametrization_mask_that_lets_values_through_gives_way_to_the_zeros() -> None:
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Inverted(~MASK))
    assert_masked(find(layer), "zeros")


def test_reading_a_parametrization_leaves_the_module_as_it_was() -> None:
    layer = parametrizations.spectral_norm(linear()).train()
    layer.get_parameter("parametrizations.weight.original").data.copy_(
        torch.eye(2, 3)
    )  # far from the vectors found so far
    before = copy.deepcopy(layer.state_dict())
    find(layer)
    assert all(m.training for m in layer.modules())
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_a_mask_buffer_beside_the_parameter() -> None:
    layer = linear()
    layer.register_buffer("weight_mask", MASK)
    assert_masked(find(layer), "buffer")


@pytest.mark.parametrize(("attribute", "source"), [("mask", "module"), ("weight_mask", "buffer")])
def test_a_module_that_masks_by_itself(attribute: str, source: Source) -> None:
    layer = SelfMasked(MASK.float(), attribute)
    found = find(layer)
    assert_masked(found, source)
    x = torch.rand(4, 3)
    assert torch.equal(F.linear(x, found.weight, layer.bias), layer(x))


def test_a_module_that_masks_whole_inputs() -> None:
    assert_masked(
        find(SelfMasked(torch.tensor([[1, 0, 1]]), "mask")), "module", torch.tensor([[1, 0, 1]] * 2).bool()
    )


def test_a_mask_of_another_kind_is_no_mask_of_the_weight() -> None:
    layer = linear()
    layer.register_buffer("mask", torch.ones(7, 7).tril())  # attention
    assert_masked(find(layer), "zeros", torch.ones(2, 3, dtype=torch.bool))


def test_a_user_mask() -> None:
    assert_masked(find(linear(), mask=MASK.int()), "user")


def test_a_user_mask_and_the_mask_of_the_module_are_joined() -> None:
    layer = linear()
    layer.register_buffer("weight_mask", torch.tensor([[1, 1, 1], [0, 0, 0]]).bool())
    assert_masked(find(layer, mask=torch.tensor([[1, 0, 1], [1, 1, 1]])), "user")
    assert layer.get_buffer("weight_mask").sum() == 3  # read, not written


def test_plain_zeros() -> None:
    layer = linear()
    layer.weight.data *= MASK
    assert_masked(find(layer), "zeros")


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_csr_weight() -> None:
    layer = linear()
    layer.weight = nn.Parameter((layer.weight.data * MASK).to_sparse_csr(), requires_grad=False)
    assert_masked(find(layer), "zeros")


# What the mask means.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("source", ["prune", "parametrize", "buffer", "user"])
def test_nothing_outside_the_mask_counts(value: float, source: str) -> None:
    layer = linear()
    layer.weight.data[~MASK] = value
    if source == "prune":
        prune.custom_from_mask(layer, "weight", MASK)
    elif source == "parametrize":
        parametrize.register_parametrization(layer, "weight", FakeSparsity(MASK.float()))
    elif source == "buffer":
        layer.register_buffer("weight_mask", MASK)
    found = find(layer, mask=MASK if source == "user" else None)
    assert found.weight.tolist() == [[1, 0, 3], [0, 0, 0]]


def test_the_mask_decides_not_the_values() -> None:
    """Two faults of the paper's code: an active 0 is active, and a neuron that sums to 0 is alive."""
    layer = linear()
    layer.weight.data = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 2.0, 0.0]])
    layer.register_buffer("weight_mask", torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]]))
    mask = find(layer).mask
    assert fan_in(mask).tolist() == [2, 2, 0]
    assert active_rows(mask).tolist() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(
    masked_weight_cases(),
    st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16]),
)
def test_fan_in_and_active_rows_of_any_weight(m: Masked, dtype: torch.dtype) -> None:
    mask = check_mask(m.mask.to(dtype), m.weight)
    assert torch.equal(mask, m.mask)
    counts = [sum(row) for row in m.mask.flatten(1).tolist()]
    assert fan_in(mask).tolist() == counts
    assert active_rows(mask).tolist() == [i for i, k in enumerate(counts) if k]
    assert fan_in(mask).dtype == active_rows(mask).dtype == torch.int64


def test_the_effective_weight_is_a_copy() -> None:
    layer = linear()
    found = find(layer)
    layer.weight.data.zero_()
    assert torch.equal(found.weight, linear().weight)


@pytest.mark.parametrize(
    "module",
    [
        nn.ReLU(),
        nn.LazyLinear(3),
        nn.LayerNorm(3, elementwise_affine=False),
        nn.utils.spectral_norm(nn.Linear(3, 2)),  # weight computed by a hook
    ],
    ids=lambda m: type(m).__name__,
)
def test_none_where_no_weight_can_be_read(module: nn.Module) -> None:
    assert find_masked_weight(module) is None


def test_a_stored_weight_is_read_whatever_hooks_there_are() -> None:
    layer = linear()
    layer.register_forward_pre_hook(lambda module, args: None)
    assert_masked(find(layer), "zeros", torch.ones(2, 3, dtype=torch.bool))


# Refusals.


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 2), r"mask has shape \(3, 2\), expected that of its weight, \(2, 3\)"),
        (torch.ones(2, 3, dtype=torch.complex64), "mask has dtype torch.complex64"),
        (torch.ones(2, 3, device="meta"), "mask is on the device meta"),
        (torch.full((2, 3), 0.5), r"mask \(torch.float32\) has 6 values other than 0 and 1: 0.5"),
        (
            torch.tensor([[1, 0, -1], [2, 0, 0]]),
            r"mask \(torch.int64\) has 2 values other than 0 and 1: -1, 2",
        ),
        (torch.tensor([[1.0, 0, float("nan")], [0, 0, 0]]), "has 1 values other than 0 and 1: nan"),
    ],
)
def test_refuses_what_is_no_mask(mask: Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        find_masked_weight(linear(), mask=mask)


def test_refuses_weights_without_values() -> None:
    with pytest.raises(MaskError, match="weight is on the device meta"):
        find_masked_weight(nn.Linear(3, 2, device="meta"))


def test_fan_in_needs_rows() -> None:
    with pytest.raises(MaskError, match=r"mask has shape \(3,\), expected at least 2 dimensions"):
        fan_in(torch.ones(3, dtype=torch.bool))


def test_a_sparse_mask_is_read() -> None:
    assert torch.equal(check_mask(MASK.float().to_sparse(), linear().weight), MASK)


# Whole models.


class Conv1D(nn.Module):
    """As in GPT-2: y = x @ weight + bias, weight [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.rand(nx, nf))


def names(model: nn.Module, masks: dict[str, Tensor] | None = None) -> list[tuple[str, str, Source]]:
    return [(path, w.name, w.source) for path, _, w in masked_weights(model, masks)]


def test_weights_of_a_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    model.register_module("attention", nn.MultiheadAttention(6, 2))
    model.register_module("cross", nn.MultiheadAttention(6, 2, kdim=4, vdim=4))
    model.register_module("c_fc", Conv1D(8, 6))
    prune.random_unstructured(model[4], "weight", amount=0.5)
    assert names(model) == [
        ("0", "weight", "zeros"),
        ("4", "weight", "prune"),
        ("attention", "in_proj_weight", "zeros"),
        ("attention.out_proj", "weight", "zeros"),
        ("cross", "q_proj_weight", "zeros"),
        ("cross", "k_proj_weight", "zeros"),
        ("cross", "v_proj_weight", "zeros"),
        ("cross.out_proj", "weight", "zeros"),
        ("c_fc", "weight", "zeros"),
    ]
    assert next(masked_weights(model))[2].weight.shape == (6, 2, 3, 3)


def test_gpt2_conv1d_is_transposed() -> None:
    layer = Conv1D(8, 6)
    found = find(layer)
    weight, mask = found.by_neuron()
    assert found.transposed
    assert torch.equal(weight, layer.weight.t())
    assert mask.shape == (8, 6)
    assert find(linear()).by_neuron()[0].shape == (2, 3)


def test_pruned_attention_projections() -> None:
    """MultiheadAttention reads out_proj.weight itself: the hook there never fires and leaves it stale."""
    attention = nn.MultiheadAttention(4, 2)
    for module, name in ((attention, "in_proj_weight"), (attention.out_proj, "weight")):
        prune.random_unstructured(module, name, amount=0.5)
        with torch.no_grad():
            module.get_parameter(f"{name}_orig").fill_(3.0)
    for _, layer, found in masked_weights(attention):
        assert found.source == "prune"
        assert torch.equal(found.weight, 3 * layer.get_buffer(f"{found.name}_mask"))


def test_user_masks_by_parameter_or_module_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2), nn.MultiheadAttention(2, 1))
    given = {"0": MASK, "2.weight": MASK, "3": torch.ones(6, 2), "3.out_proj": torch.eye(2)}
    found = {f"{path}.{w.name}": w for path, _, w in masked_weights(model, given)}
    assert [name for name, w in found.items() if w.source == "user"] == [
        "0.weight",
        "2.weight",
        "3.in_proj_weight",
        "3.out_proj.weight",
    ]
    assert torch.equal(found["2.weight"].mask, MASK)


def test_a_shared_module_comes_once_and_is_found_by_each_of_its_names() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 2)})
    model["decoder"] = model["encoder"]
    assert names(model, {"decoder": MASK}) == [("encoder", "weight", "user")]
    with pytest.raises(MaskError, match=r"twice, the second time as 'decoder.weight'"):
        names(model, {"encoder": MASK, "decoder.weight": MASK})


def test_a_model_that_is_one_layer() -> None:
    assert names(linear(), {"weight": MASK}) == [("", "weight", "user")]


@pytest.mark.parametrize("key", ["fc2", "fc.weights", "fc.bias", "act", "weight"])
def test_unknown_keys_are_named(key: str) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(3, 2), "act": nn.ReLU()})
    with pytest.raises(MaskError, match=rf"name no weight of the model: \['{key}'\]; it has \['fc.weight'\]"):
        names(model, {key: MASK, "fc": MASK})


def test_a_module_name_must_mean_one_weight() -> None:
    model = nn.ModuleDict({"cross": nn.MultiheadAttention(6, 2, kdim=4, vdim=4)})
    with pytest.raises(
        MaskError, match=r"name no weight of the model: \['cross'\]; it has \['cross.q_proj_weight',"
    ):
        names(model, {"cross": torch.ones(6, 6)})


def test_errors_name_the_layer() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(3, 2)})
    with pytest.raises(MaskError, match=r"fc.weight: mask has shape \(3,\)"):
        names(model, {"fc": torch.ones(3)})
