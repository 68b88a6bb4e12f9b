"""The caller's masks decide at both doors of condense(), also where layers stay dense; the model keeps its weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fanin_compile
from fanin_compile import condense
from fanin_compile.layers import CondensedLinear
from fanin_compile.mask import find_masked_weight
from tests.compile_support import any_type, fan_in_mask, randn
from tests.helpers import assert_close_at_scale


def _carrying(carrier: str, layer: nn.Linear) -> nn.Linear:
    if carrier == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.02)
    elif carrier == "parametrized":
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    elif carrier == "normed":  # masking what is stored would change the norms
        nn.utils.parametrizations.weight_norm(layer)
    elif carrier == "shifted":  # a stored zero is none of the weight's
        parametrize.register_parametrization(layer, "weight", _Shifted())
    return layer


class _Shifted(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 1


_DENSE = {"filtered": "excluded by filter_fn", "would not shrink": "would not shrink", "fp64": ""}


@pytest.mark.parametrize("why", _DENSE)
@pytest.mark.parametrize("carrier", ["plain", "pruned", "parametrized", "normed", "shifted"])
@pytest.mark.parametrize("door", ["swap", "graph"])
@pytest.mark.filterwarnings("error:condense swaps layers only")
def test_the_callers_mask_decides_in_layers_that_stay_dense(door: str, carrier: str, why: str) -> None:
    layer = nn.Linear(64, 48, dtype=torch.float64 if why == "fp64" else None)
    model, x = nn.Sequential(_carrying(carrier, layer)).eval(), randn(3, 64).to(layer.weight.dtype)
    given = torch.rand(48, 64, generator=torch.Generator().manual_seed(0))
    mask = given < (0.95 if why == "would not shrink" else 0.1)
    found = find_masked_weight(layer, mask=mask)
    assert found is not None
    before, state = model(x), copy.deepcopy(model.state_dict())
    condensed = condense(
        model,
        masks={"0.weight": mask},
        filter_fn=(lambda module, name: name != "0") if why == "filtered" else None,
        example_inputs=(x,) if door == "graph" else None,
    )
    exact = F.linear(x.double(), found.weight.double(), layer.bias.double())
    assert_close_at_scale(condensed(x), exact)
    assert not torch.equal(before, condensed(x))
    assert torch.equal(before, model(x)), "the model itself keeps its weights"
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    (row,) = fanin_compile.explain(condensed).layers
    assert row.name == "0"
    assert row.sparsity == pytest.approx(1 - float(found.mask.float().mean()))
    if door == "graph":
        assert row.reason.startswith(_DENSE[why])
        assert not row.rewritten


@pytest.mark.parametrize("carrier", ["plain", "pruned", "parametrized", "normed"])
def test_the_model_keeps_its_own_weights_where_export_fails(carrier: str) -> None:
    class Branches(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.a = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            return y if float(y.sum()) > 0 else -y

    model, x = Branches(_carrying(carrier, nn.Linear(64, 48))).train(), randn(3, 64)
    before, kinds = model(x), [type(module) for module in model.modules()]
    kept = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    mask = fan_in_mask(48, 64, 6)
    with pytest.warns(UserWarning, match="condense swaps layers only"):
        condensed = condense(model, masks={"a": mask}, example_inputs=(x,))
    assert dict(model.named_parameters()).keys() == kept.keys()
    for name, parameter in model.named_parameters():
        assert parameter is kept[name][0]
        assert torch.equal(parameter, kept[name][1])
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(model(x), before)
    assert isinstance(condensed.a, CondensedLinear)


@pytest.mark.parametrize("door", ["swap", "graph"])
def test_the_callers_mask_on_the_pruned_output_of_attention(door: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.mha(x, x, x, need_weights=False)[0]
            return y

    model, x, mask = any_type(Attends().eval()), randn(2, 5, 32), fan_in_mask(32, 32, 3)
    plain = copy.deepcopy(model)
    prune.random_unstructured(model.mha.out_proj, "weight", 0.1)
    plain.mha.out_proj.weight.data = model.mha.out_proj.weight.detach() * mask
    inputs = (x,) if door == "graph" else None
    with torch.no_grad():
        condensed = condense(model, masks={"mha.out_proj": mask}, example_inputs=inputs)
        assert_close_at_scale(condensed(x), plain.double()(x.double()))


@pytest.mark.parametrize("door", ["swap", "graph"])
def test_equal_masks_on_tied_weights_that_stay_dense(door: str) -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)
    second.weight = first.weight
    model, x, mask = nn.Sequential(first, second).eval(), randn(3, 64), fan_in_mask(64, 64, 6)
    condensed = condense(
        model,
        masks={"0": mask, "1": mask},
        filter_fn=lambda module, name: False,
        example_inputs=(x,) if door == "graph" else None,
    )
    exact = copy.deepcopy(model).double()
    any_type(exact[0]).weight.data.mul_(mask)
    assert_close_at_scale(condensed(x), exact(x.double()))
    assert len({t.data_ptr() for t in condensed.state_dict().values() if t.ndim == 2}) == 1


@pytest.mark.parametrize("carrier", ["plain", "pruned", "parametrized"])
def test_a_filter_sees_a_layer_by_its_name_at_every_call(carrier: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = _carrying(carrier, nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(torch.relu(self.a(x)))
            return y

    model, x, mask = Twice().eval(), randn(3, 64), fan_in_mask(64, 64, 6)
    asked: list[tuple[nn.Module, str]] = []

    def keeps(module: nn.Module, name: str) -> bool:
        asked.append((module, name))
        return name != "a"

    condensed = condense(model, masks={"a": mask}, filter_fn=keeps, example_inputs=(x,))
    rows = fanin_compile.explain(condensed).layers
    assert [(row.name, row.reason) for row in rows] == [
        ("a", "excluded by filter_fn"),
        ("a (use 2)", "excluded by filter_fn"),
    ]
    assert set(asked) == {(model.a, "a")}
