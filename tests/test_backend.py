"""torch.compile(model, backend="fanin") equals the masked dense model, whatever carries the mask and the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import fanin_compile
from fanin_compile.backend import record
from fanin_compile.layers import CondensedLinear
from tests.compile_support import (
    MLP,
    STRICT,
    any_type,
    assert_equals_dense,
    compiled,
    fan_in_mask,
    randn,
    recorded,
    rewritten,
    sparse_linear,
    sparse_weight,
)
from tests.helpers import assert_close_fp64
from tests.strategies import Masked, masked_weights

pytestmark = pytest.mark.usefixtures("dynamo")


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """x [batch, in] under strides and leading dimensions a kernel might take for contiguous ones."""
    padded = F.pad(x, (1, 2))
    return {
        "contiguous": x,
        "transposed": x.t().contiguous().t(),
        "sliced": padded[:, 1 : 1 + x.shape[1]],
        "every other": torch.stack([x, torch.full_like(x, float("nan"))], 2).flatten(1)[:, ::2],
        "expanded": x[:1].expand(3, -1),
        "3d": x.unsqueeze(1),
        "vector": x[0],
    }


@settings(max_examples=12, deadline=None)
@given(masked_weights(kernels=((),)), st.sampled_from((1, 3)), st.booleans(), st.data())
def test_a_linear_of_any_mask_on_inputs_of_any_layout(
    masked: Masked, batch: int, has_bias: bool, data: st.DataObject
) -> None:
    torch._dynamo.reset()
    out, fan_in = masked.weight.shape
    model = any_type(nn.Linear(fan_in, out, bias=has_bias))
    prune.custom_from_mask(model, "weight", masked.mask)
    with torch.no_grad():
        model.weight_orig.copy_(masked.weight.nan_to_num())
    layout = data.draw(st.sampled_from(sorted(_layouts(torch.zeros(1, 1)))))
    x = _layouts(randn(batch, fan_in))[layout]
    with recorded() as compilations:
        y = compiled(model)(x)
    weight = masked.effective.double()
    bias = model.bias.detach().double() if has_bias else torch.zeros(out, dtype=torch.float64)
    expected = x.double() @ weight.t() + bias
    magnitude = x.double().abs() @ weight.abs().t() + bias.abs()
    assert_close_fp64(y, expected, magnitude, k=fan_in)
    # found whatever the layout, unless the mask leaves nothing out
    assert rewritten(compilations) == [set() if masked.mask.all() else {""}]


class _Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class _MultipliesItself(nn.Linear):
    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask = nn.Buffer(mask.float())

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class Conv1D(nn.Module):
    """GPT-2's linear layer: weight [in, out]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.nf = weight.shape[1]
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(randn(self.nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def _source(kind: str) -> nn.Module:
    mask = fan_in_mask(32, 64, 6, ablated=2)
    layer = nn.Linear(64, 32)
    if kind == "zeros":
        layer = sparse_linear(64, 32, 6)
    elif kind == "custom":
        prune.custom_from_mask(layer, "weight", mask)
    elif kind == "unstructured":
        prune.l1_unstructured(layer, "weight", 0.9)
    elif kind == "random":
        prune.random_unstructured(layer, "weight", 0.9)
    elif kind == "structured":
        prune.ln_structured(layer, "weight", 0.5, n=2, dim=1)
    elif kind == "random structured":
        prune.random_structured(layer, "weight", 0.5, dim=0)
    elif kind == "twice":
        prune.random_unstructured(layer, "weight", 0.5)
        prune.l1_unstructured(layer, "weight", 0.8)
    elif kind == "removed":
        prune.custom_from_mask(layer, "weight", mask)
        prune.remove(layer, "weight")
    elif kind == "parametrize":
        parametrize.register_parametrization(layer, "weight", _Mask(mask))
    elif kind == "buffer":
        layer = sparse_linear(64, 32, 6)
        mask = layer.weight.detach() != 0
        layer.register_buffer("weight_mask", mask)
        with torch.no_grad():
            layer.weight.view(-1)[mask.flatten().nonzero()[::7]] = 0.0
    elif kind == "itself":
        layer = _MultipliesItself(mask)
    elif kind == "Conv1D":
        return Conv1D(sparse_weight(32, 64, 6).t().contiguous())
    return layer


SOURCES = (
    *("zeros", "custom", "unstructured", "random", "structured", "random structured", "twice", "removed"),
    *("parametrize", "buffer", "itself", "Conv1D"),
)


@pytest.mark.parametrize("kind", SOURCES)
def test_every_mask_source_through_both_doors(kind: str) -> None:
    model, x = _source(kind), randn(5, 64)
    with recorded() as compilations:
        y = compiled(model)(x)
        expected = model(x)
        condensed = fanin_compile.condense(model)
        z = condensed(x)
    assert rewritten(compilations) == [{""}]
    assert isinstance(condensed, CondensedLinear)
    assert condensed.bias is not None
    weight = condensed.weight.double()
    magnitude = x.double().abs() @ weight.abs().t() + condensed.bias.double().abs()
    exact = x.double() @ weight.t() + condensed.bias.double()
    for result in (y, z, expected):
        assert_close_fp64(result, exact, magnitude, k=64)


def test_a_zero_inside_the_mask_stays_active_in_both_doors() -> None:
    model, x = _source("buffer"), randn(5, 64)
    with recorded() as compilations:
        compiled(model)(x)
    assert compilations[0].result is not None
    assert compilations[0].result.found[0].fan_in == (6, 6)
    condensed = fanin_compile.condense(model)
    assert condensed.condensed.fan_in == 6  # type: ignore[union-attr]


@pytest.mark.parametrize("k", [1, 63, 64])
def test_a_live_neuron_whose_weights_sum_to_0_is_not_ablated(k: int) -> None:
    model = nn.Linear(64, 2)
    with torch.no_grad():
        model.weight.zero_()
        model.weight[0, :k] = torch.arange(k) - (k - 1) / 2  # symmetric: sums to 0
        model.weight[0, 0] += 0.5 if k == 1 else 0.0
        model.weight[1, 3] = 1.0
    x = randn(5, 64)
    with recorded():
        y, z = compiled(model)(x), fanin_compile.condense(model)(x)
    assert_equals_dense(y, model, x, k=k)
    assert_equals_dense(z, model, x, k=k)


def test_every_neuron_ablated_gives_the_bias() -> None:
    model, x = sparse_linear(64, 32, 6, ablated=32), randn(5, 64)
    with recorded():
        y, z = compiled(model)(x), fanin_compile.condense(model)(x)
    assert torch.equal(y, model.bias.expand(5, 32))
    assert torch.equal(z, y)


def test_ablated_neurons_give_the_activated_bias_in_place() -> None:
    model, x = any_type(nn.Sequential(sparse_linear(64, 32, 6, ablated=5), nn.GELU())), randn(5, 64)
    with recorded():
        y = compiled(model)(x)
    assert y.shape == (5, 32)
    torch.testing.assert_close(y[:, 27:], F.gelu(model[0].bias[27:]).expand(5, 5))


def test_layers_without_bias() -> None:
    model = nn.Sequential(
        sparse_linear(64, 48, 6, bias=False, ablated=3), nn.ReLU(), sparse_linear(48, 9, 5, bias=False)
    )
    x = randn(5, 64)
    with recorded() as compilations:
        y, z = compiled(model)(x), fanin_compile.condense(model)(x)
    assert rewritten(compilations) == [{"0", "2"}]
    assert_equals_dense(y, model, x)
    assert_equals_dense(z, model, x)


def test_batches_change_with_a_bounded_number_of_compilations() -> None:
    model = MLP().eval()
    for dynamic, bound in ((None, 4), (True, 3)):
        torch._dynamo.reset()
        f = compiled(model, dynamic=dynamic)
        with recorded() as compilations:
            for batch in (4, 4, 5, 6, 1, 7, 0, 1):
                x = randn(batch, 64, seed=batch)
                assert_equals_dense(f(x), model, x)
        assert len(compilations) <= bound, dynamic
        assert all(layers == {"a", "b"} for layers in rewritten(compilations))


def test_dynamic_sequence_and_leading_dimensions() -> None:
    model = MLP().eval()
    f = compiled(model, dynamic=True)
    with recorded() as compilations:
        for shape in ((2, 3, 64), (4, 7, 64), (3, 5, 64)):
            x = randn(*shape)
            assert_equals_dense(f(x), model, x)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(8, 12, 3, padding=1, stride=2), (21,)),
        (nn.Conv2d(8, 12, 3, padding="same", groups=4, bias=False), (9, 7)),
        (nn.Conv3d(4, 6, (1, 2, 3), dilation=(1, 1, 2)), (3, 6, 9)),
    ],
    ids=("conv1d", "conv2d", "conv3d"),
)
def test_convolutions(module: nn.Module, size: tuple[int, ...]) -> None:
    prune.random_unstructured(module, "weight", 0.9)
    prune.remove(module, "weight")
    model = nn.Sequential(module, nn.ReLU())
    x = randn(2, 4 if len(size) == 3 else 8, *size)
    with recorded() as compilations:
        y, z = compiled(model)(x), fanin_compile.condense(model)(x)
    assert rewritten(compilations) == [{"0"}]
    assert_equals_dense(y, model, x)
    assert_equals_dense(z, model, x)


def test_half_precision_models() -> None:
    model, x = MLP().to(torch.bfloat16), randn(5, 64).bfloat16()
    with recorded() as compilations:
        y = compiled(model)(x)
    assert rewritten(compilations) == [{"a", "b"}]
    assert y.dtype == torch.bfloat16
    wide = MLP()
    wide.load_state_dict(model.state_dict())
    # the hidden layer is stored in bfloat16 as well
    torch.testing.assert_close(y.float(), wide(x.float()), atol=0.05, rtol=0.02)


def test_float64_models_stay_dense_and_exact() -> None:
    model, x = MLP().double(), randn(5, 64).double()
    with recorded() as compilations:
        y = compiled(model)(x)
    assert torch.allclose(y, model(x), rtol=1e-14)
    assert compilations[0].result is not None
    reasons = {s.layer: s.reason for s in compilations[0].result.skipped}
    assert reasons["a"] == reasons["b"] == "no kernel for this dtype"


def test_values_dtype_stores_condensed_values_narrow() -> None:
    model, x = sparse_linear(64, 32, 6), randn(5, 64)
    with recorded() as compilations:
        y = compiled(model, options={"values_dtype": torch.bfloat16})(x)
    assert rewritten(compilations) == [{""}]
    rounded = nn.Linear(64, 32)
    rounded.load_state_dict(model.state_dict())
    rounded.weight.data = model.weight.detach().bfloat16().float()
    assert_equals_dense(y, rounded, x)


def test_the_door_without_entry_points_and_fullgraph() -> None:
    model, x = MLP(), randn(5, 64)
    f = torch.compile(model, backend=fanin_compile.fanin, options=STRICT, fullgraph=True)
    with recorded() as compilations:
        assert_equals_dense(f(x), model, x)
    assert rewritten(compilations) == [{"a", "b"}]
    assert "fanin" in torch._dynamo.list_backends()


def test_a_condensed_model_goes_through_the_backend_with_its_epilogues_fused() -> None:
    model, x = MLP(), randn(5, 64)
    condensed = fanin_compile.condense(model)
    with recorded() as compilations:
        assert_equals_dense(compiled(condensed)(x), model, x)
    assert compilations[0].result is not None
    assert [r.detail for r in compilations[0].result.rewritten] == [
        *("+ relu", "chained into b", "chained onto a")
    ]


class TestGradients:
    def test_of_the_input(self) -> None:
        model = MLP().requires_grad_(False)
        f = compiled(model)
        self._same_gradients(f, model)

    def test_of_the_parameters(self) -> None:
        model = MLP()
        f = compiled(model)
        self._same_gradients(f, model)

    def test_frozen_and_then_unfrozen(self) -> None:
        model, x = MLP().requires_grad_(False), randn(5, 64)
        f = compiled(model)
        with record() as compilations:
            assert_equals_dense(f(x), model, x)
        assert rewritten(compilations) == [{"a", "b"}]  # grad is enabled and nothing needs it
        model.b.bias.requires_grad_(True)
        f(x).sum().backward()
        assert torch.equal(model.b.bias.grad, torch.full((10,), 5.0))  # type: ignore[arg-type]
        model.requires_grad_(True)
        self._same_gradients(f, model)
        model.requires_grad_(False)
        assert_equals_dense(f(x), model, x)

    def _same_gradients(self, f: Callable[..., Any], model: nn.Module) -> None:
        gradients = []
        for function in (f, model):
            model.zero_grad()
            x = randn(5, 64).requires_grad_()
            function(x).square().sum().backward()
            gradients.append([x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
