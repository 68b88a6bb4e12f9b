"""condense(): the same outputs from a smaller state_dict, the model untouched, nothing it meets a reason to fail."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fanin_compile
from fanin_compile import MaskError, OptionError, condense
from fanin_compile.candidates import candidates
from fanin_compile.layers import CondensedConv, CondensedLayer, CondensedLinear
from fanin_compile.packed import Packed, unpack
from tests.compile_support import MLP, any_type, assert_equals_dense, fan_in_mask, randn, sparse_linear
from tests.strategies import Masked, masked_weights


@settings(max_examples=40, deadline=None)
@given(masked_weights(), st.sampled_from((0, 1, 3)), st.booleans(), st.booleans())
def test_equals_the_masked_dense_layer(masked: Masked, batch: int, has_bias: bool, hooked: bool) -> None:
    out, fan_in, *kernel = masked.weight.shape
    dense: nn.Module
    if kernel:
        kinds: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        dense = kinds[len(kernel)](fan_in, out, tuple(kernel), padding=1, bias=has_bias)
    else:
        dense = nn.Linear(fan_in, out, bias=has_bias)
    dense.weight = nn.Parameter(masked.effective)
    model = copy.deepcopy(dense)
    if hooked:
        prune.custom_from_mask(model, "weight", masked.mask)
        model.weight_orig = nn.Parameter(
            masked.weight
        )  # NaN outside of the mask, as after a diverged training
        condensed = condense(model)
    else:
        condensed = condense(model, masks={"weight": masked.mask})
    if not isinstance(condensed, CondensedLayer):
        assert masked.mask.all() or "would not shrink" in _reasons(model, masks={"weight": masked.mask})[""]
        return
    x = randn(batch, fan_in, *(k + 2 for k in kernel))
    with torch.no_grad():
        y = condensed(x)
    assert_equals_dense(y, dense, x, k=masked.weight[0].numel())
    assert torch.equal(condensed.condensed.mask(), masked.mask)
    assert torch.equal(condensed.weight, masked.effective)


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([sparse_linear(64, 64, 6, seed=i) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if float(x.sum()) > i or not x.tolist():
                x = torch.relu(layer(x))
        return x


def test_control_flow_stays_the_models_own() -> None:
    model, x = _Untraceable(), randn(5, 64)
    condensed = condense(model)
    assert [type(layer) for layer in condensed.layers] == [CondensedLinear] * 3  # type: ignore[union-attr]
    expected = copy.deepcopy(model).double()(x.double())
    scale = float(expected.abs().max())
    torch.testing.assert_close(condensed(x).double(), expected, rtol=0, atol=1e-5 * scale)


def test_gather_matmuls_show_in_an_fx_graph() -> None:
    traced = fx.symbolic_trace(condense(MLP()))
    targets = [node.target for node in traced.graph.nodes]
    assert targets.count(torch.ops.fanin.gather_matmul) == 2
    assert_equals_dense(traced(randn(5, 64)), MLP(), randn(5, 64))
    exported = torch.export.export(condense(MLP()), (randn(5, 64),))
    ops = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.fanin.gather_matmul.default) == 2
    assert torch.ops.aten.linear.default not in ops


def test_the_model_is_left_as_it_was() -> None:
    model = MLP().train()
    prune.l1_unstructured(model.a, "weight", 0.9)
    model.b.eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    pruned = model.a.weight
    condense(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert model.a.weight is pruned
    assert (model.training, model.a.training, model.b.training) == (True, True, False)


def test_after_a_forward_with_gradients() -> None:
    model, x = MLP(), randn(5, 64)
    prune.l1_unstructured(model.a, "weight", 0.9)
    model(x)  # leaves a non-leaf .weight, which deepcopy refuses
    y = condense(model)(x)
    prune.remove(model.a, "weight")
    assert_equals_dense(y, model, x)


def test_flags_and_hooks_are_carried() -> None:
    model, x = MLP().train(), randn(5, 64)
    model.b.eval().requires_grad_(False)
    seen: list[str] = []
    model.a.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    model.a.register_forward_hook(lambda module, args, kwargs, y: y * 2, with_kwargs=True)
    condensed = condense(model)
    assert seen == []
    x = x.double()
    torch.testing.assert_close(condensed(x), model.double()(x))
    assert seen == ["pre", "pre"]
    a, b = condensed.a, condensed.b
    assert isinstance(a, CondensedLinear)
    assert isinstance(b, CondensedLinear)
    assert (condensed.training, a.training, b.training) == (True, True, False)
    assert (a.values.requires_grad, b.values.requires_grad) == (True, False)
    assert a.bias is not None
    assert b.bias is not None
    assert (a.bias.requires_grad, b.bias.requires_grad) == (True, False)


def test_gradients_equal_those_of_the_dense_model() -> None:
    model = MLP()
    condensed = condense(model)
    x, z = randn(5, 64).requires_grad_(), randn(5, 64).requires_grad_()
    model(x).square().sum().backward()
    condensed(z).square().sum().backward()
    assert x.grad is not None
    rounding = 1e-6 * float(x.grad.norm())  # the two sum in different orders
    torch.testing.assert_close(z.grad, x.grad, rtol=1e-5, atol=rounding)
    for name in ("a", "b"):
        layer, dense = getattr(condensed, name), getattr(model, name)
        by_weight = unpack(Packed(layer.values.grad, layer.structure)).to_dense()
        torch.testing.assert_close(
            by_weight, dense.weight.grad * layer.condensed.mask(), rtol=1e-5, atol=rounding
        )
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-5, atol=rounding)


def test_state_dict_shrinks_and_travels() -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, x = (
        nn.Sequential(sparse_linear(512, 512, 51), nn.ReLU(), sparse_linear(512, 10, 51)),
        randn(5, 512),
    )
    condensed = condense(model)
    sizes = [sum(t.nbytes for t in m.state_dict().values()) for m in (model, condensed)]
    assert sizes[1] < 0.2 * sizes[0]
    buffer = io.BytesIO()
    torch.save(condensed.state_dict(), buffer)
    buffer.seek(0)
    states = [
        torch.load(buffer, weights_only=True),
        safetensors.load(safetensors.save(condensed.state_dict())),
    ]
    for state in states:
        for assign in (False, True):
            other = condense(nn.Sequential(sparse_linear(512, 512, 7), nn.ReLU(), sparse_linear(512, 10, 9)))
            other.load_state_dict(state, assign=assign)
            assert torch.equal(other(x), condensed(x))
    assert_equals_dense(condensed(x), model, x)


def test_twice_is_once() -> None:
    model, x = MLP(), randn(5, 64)
    once = condense(model)
    twice = condense(once)
    assert torch.equal(twice(x), once(x))
    torch.testing.assert_close(twice.state_dict(), once.state_dict(), rtol=0, atol=0)


def test_masks_and_filter_of_the_caller() -> None:
    model, x = any_type(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))), randn(5, 64)
    masks = {"0": fan_in_mask(32, 64, 6), "1.weight": fan_in_mask(16, 32, 3)}
    condensed = condense(model, masks=masks, filter_fn=lambda module, name: name != "1")
    assert [type(m) for m in condensed] == [CondensedLinear, nn.Linear]  # type: ignore[attr-defined]
    with torch.no_grad():
        model[0].weight *= masks["0"]
    assert_equals_dense(condensed[0](x), model[0], x)  # type: ignore[index]


def test_values_dtype() -> None:
    model, x = MLP(), randn(5, 64)
    condensed = condense(model, values_dtype=torch.bfloat16)
    assert condensed.a.values.dtype == torch.bfloat16  # type: ignore[union-attr]
    y = condensed(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, model(x), atol=0.05, rtol=0.02)
    with pytest.raises(
        OptionError, match=r"values_dtype is torch.int8, expected None or one of torch.float32"
    ):
        condense(model, values_dtype=torch.int8)


def test_a_mask_that_does_not_fit() -> None:
    with pytest.raises(
        MaskError, match=r"a.weight: mask has shape \(3, 3\), expected that of its weight, \(48, 64\)"
    ):
        condense(MLP(), masks={"a": torch.ones(3, 3)})


def _reasons(model: nn.Module, **kwargs: Any) -> dict[str, str]:
    return {c.name: "" if c.skip is None else str(c.skip) for c in candidates(model, **kwargs)}


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Asks(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("not without my context")


def test_every_layer_left_is_left_for_a_reason_with_values() -> None:
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(8, 8),
            "barely": nn.Linear(64, 32),
            "scaled": _Scaled(64, 32),
            "asks": _Asks(64, 32),
            "circular": nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular"),
            "uneven": nn.Conv1d(8, 8, 4, padding="same"),
            "even": nn.Conv1d(8, 8, 3, padding="same"),
            "attention": nn.MultiheadAttention(32, 4),
        }
    )
    for name in ("scaled", "asks", "circular", "uneven", "even"):
        prune.random_unstructured(model[name], "weight", 0.9)
    prune.random_unstructured(model["barely"], "weight", 0.02)
    prune.random_unstructured(any_type(model["attention"]).out_proj, "weight", 0.9)
    reasons = _reasons(model)
    assert reasons["dense"] == "every weight is active"
    assert reasons["barely"].startswith("would not shrink (sparsity 2.0%, bytes ")
    assert reasons["scaled"] == "its forward is not that of the plain layer (type _Scaled)"
    assert reasons["asks"] == "its forward is not that of the plain layer (type _Asks)"
    assert reasons["circular"] == "only zero padding is supported (padding_mode circular)"
    assert reasons["uneven"] == "'same' padding is uneven (kernel (4,), padding same)"
    assert reasons["even"] == ""
    assert reasons["attention.out_proj"] == "nn.MultiheadAttention reads its weights past its layers"
    assert _reasons(model, filter_fn=lambda m, name: False)["even"] == "excluded by filter_fn"
    condensed = condense(model)
    kept = {name for name, m in condensed.named_modules() if isinstance(m, CondensedLayer)}
    assert kept == {"even"}
    assert isinstance(condensed["even"], CondensedConv)  # type: ignore[index]


@pytest.mark.parametrize("layers", [0, 2])
def test_transformers_stay_right_on_their_fast_path(layers: int) -> None:
    model: nn.Module = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    if layers:
        model = nn.TransformerEncoder(model, layers)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                prune.random_unstructured(layer, "weight", 0.9)
                prune.remove(layer, "weight")
    model.eval()
    x, hidden = randn(2, 5, 32), torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 3:] = True
    condensed = condense(model)
    with torch.no_grad():
        y, expected = condensed(x, src_key_padding_mask=hidden), model(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(y[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(condensed(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(m, CondensedLinear) for m in condensed.modules()) == 2 * max(layers, 1)


def test_shared_modules_stay_shared() -> None:
    shared = sparse_linear(64, 64, 6)
    condensed = condense(nn.Sequential(shared, nn.ReLU(), shared))
    assert condensed[0] is condensed[2]  # type: ignore[index]


def test_probing_runs_no_hook_of_the_users() -> None:
    class Masked(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight * (self.weight.abs() > 0), self.bias)

    layer = Masked(64, 32)
    prune.random_unstructured(layer, "weight", 0.9)
    calls: list[int] = []
    layer.register_forward_hook(lambda *args: calls.append(1))
    condensed = condense(nn.Sequential(layer))
    assert isinstance(condensed[0], CondensedLinear)  # type: ignore[index]
    assert calls == []
    condensed(randn(5, 64))
    assert calls == [1]


def test_deep_copies_and_pickles() -> None:
    condensed, x = any_type(condense(MLP())), randn(5, 64)
    buffer = io.BytesIO()
    torch.save(condensed, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(condensed), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), condensed(x))
        other.a.values.data.zero_()
    assert float(condensed.a.values.abs().sum()) > 0


def test_a_progress_bar_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    condense(MLP())
    assert capsys.readouterr().out == ""
    condense(MLP(), progress=True)
    assert "condensing" in capsys.readouterr().out
    condense(MLP(), example_inputs=(randn(5, 64),))
    assert "condensing" not in capsys.readouterr().out
    condense(MLP(), progress=True, example_inputs=(randn(5, 64),))
    assert "condensing" in capsys.readouterr().out


def test_sizes_are_those_of_the_report() -> None:
    model = MLP()
    report = fanin_compile.explain(model)
    state = condense(model).state_dict()
    sizes = {
        name: sum(t.nbytes for key, t in state.items() if key.startswith(f"{name}.") and "bias" not in key)
        for name in ("a", "b")
    }
    assert {layer.name: layer.bytes_after for layer in report.layers} == sizes
    condensed = fanin_compile.explain(condense(model))
    assert {layer.name: layer.bytes_after for layer in condensed.layers} == sizes
