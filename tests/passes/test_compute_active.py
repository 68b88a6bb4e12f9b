"""Dense layers whose ablated neurons must stay: the active ones alone are computed, the others are their bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fanin_compile import condense, cost
from fanin_compile.export import RESULT, _drop_asserts
from fanin_compile.graph import CONDENSED, LAYER
from fanin_compile.passes.compute_active import compute_active
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.pipeline import Gate, PassResult, PipelineResult
from fanin_compile.records import Layer, Skip
from tests.compile_support import any_type, assert_equals_dense, assert_equals_model, randn, recorded
from tests.passes.support import calls, context, graph_of, run

aten = torch.ops.aten
CONVS: dict[int, type[Any]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PASSES = (condense_linear, condense_conv, compute_active)


def _active_pays(layer: Layer) -> Skip:
    return Skip(layer.name, "for the test", active=layer.active_share < 1)


def _never(layer: Layer) -> Skip:
    return Skip(layer.name, "for the test")


def _ablate(layer: nn.Module, every: int = 3) -> Any:
    """All of every so many rows is 0, and a few weights of others."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight[::every] = 0
        weight[1::2].flatten(1)[:, :1] = 0
    return layer.eval()


def _run(model: nn.Module, x: Tensor, gate: Gate = _active_pays) -> tuple[fx.GraphModule, PassResult]:
    gm = graph_of(model, x)
    return gm, run(gm, *PASSES, ctx=context(gm, gate=gate), inputs=(x,))


def _shape_of(node: object) -> tuple[int, ...]:
    assert isinstance(node, fx.Node)
    return tuple(node.meta["val"].shape)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_computes_its_active_rows(bias: bool) -> None:
    torch.manual_seed(0)
    model, x = _ablate(nn.Linear(8, 9, bias=bias)), randn(5, 8)
    gm, result = _run(model, x)
    (node,) = calls(gm, aten.linear.default)
    assert _shape_of(node.args[1]) == (6, 8)
    assert (node.meta[LAYER].shape, node.meta[LAYER].ablated) == ((6, 8), 0)
    assert node.meta[CONDENSED].n_active == 6
    (placed,) = calls(gm, aten.index_copy.default)
    assert (CONDENSED in placed.meta, LAYER in placed.meta) == (False, False)
    assert [(r.became, r.detail) for r in result.rewritten] == [("active", "6 of 9 neurons computed")]
    assert not result.skipped
    ablated = gm(x)[:, ::3]
    assert torch.equal(ablated, (model.bias[::3] if bias else torch.zeros(3)).expand(5, 3))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_images_are_placed_by_their_memory_format(format: torch.memory_format) -> None:
    torch.manual_seed(0)
    model, x = (
        _ablate(nn.Conv2d(4, 9, 3)).to(memory_format=format),
        randn(2, 4, 6, 7).to(memory_format=format),
    )
    gm, _ = _run(model, x)
    assert len(calls(gm, aten.where.self)) == (format == torch.contiguous_format)
    assert len(calls(gm, aten.index_copy.default)) == (format == torch.channels_last)
    assert gm(x).stride() == model(x).stride()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), dims=st.integers(0, 3), bias=st.booleans(), seed=st.integers(0, 2**20))
def test_any_layer(data: st.DataObject, dims: int, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    out, channels = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 5))
    batch = data.draw(st.sampled_from([None, 0, 1, 2, 3, 5]))  # None: unbatched
    lead = [] if batch is None else [batch]
    if dims == 0:
        model: Any = nn.Linear(channels, out, bias=bias)
        x = torch.randn(*lead, *data.draw(st.sampled_from([(), (3,), (2, 3)])), channels)
    else:
        options = {
            "stride": data.draw(st.integers(1, 2)),
            "padding": data.draw(st.sampled_from([0, 1, 2, "valid"])),
            "dilation": data.draw(st.integers(1, 2)),
        }
        model = CONVS[dims](channels, out, data.draw(st.integers(1, 3)), bias=bias, **options)
        x = torch.randn(
            *lead, channels, *data.draw(st.lists(st.integers(5, 7), min_size=dims, max_size=dims))
        )
        if dims > 1 and batch is not None and data.draw(st.booleans()):
            last = torch.channels_last if dims == 2 else torch.channels_last_3d
            model, x = model.to(memory_format=last), x.to(memory_format=last)
    ablated = data.draw(st.lists(st.integers(0, out - 1), min_size=1, max_size=out - 1, unique=True))
    with torch.no_grad():
        model.weight[ablated] = 0
    gm = graph_of(model, x)
    (y,) = gm.graph.find_nodes(op="output")[0].all_input_nodes
    strides = y.meta["val"].stride()  # as captured: that real ones of channels_last_3d differ is torch's
    result = run(gm, *PASSES, ctx=context(gm, gate=_active_pays), inputs=(x,))
    assert [r.detail for r in result.rewritten] == [f"{out - len(ablated)} of {out} neurons computed"]
    with torch.no_grad():
        assert gm(x).stride() == strides
        assert_equals_dense(gm(x), model, x, k=channels * 3**dims)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(8, 9), lambda: nn.Conv1d(8, 9, 1)])
def test_keeps_the_dtype(kind: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = _ablate(kind()).to(dtype), randn(2, 8, 8).to(dtype)
    gm, result = _run(model, x)
    assert len(result.rewritten) == 1
    y = gm(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize(
    ("model", "gate", "x"),
    [
        (nn.Linear(8, 9), _active_pays, (5, 8)),  # none ablated
        (_ablate(nn.Linear(8, 9)), _never, (5, 8)),
        (_ablate(nn.Linear(8, 9), every=1), _active_pays, (5, 8)),  # all are
        (_ablate(nn.Conv2d(4, 8, 3, groups=2)), _active_pays, (2, 4, 6, 6)),
        (_ablate(nn.ConvTranspose1d(4, 9, 3)), _active_pays, (2, 4, 6)),
    ],
    ids=["none ablated", "gate", "all ablated", "grouped", "transposed"],
)
def test_leaves(model: nn.Module, gate: Any, x: tuple[int, ...]) -> None:
    model = copy.deepcopy(model)
    with torch.no_grad():
        any_type(model).weight[..., 1] = 0  # masked in any case
    gm, result = _run(model, randn(*x), gate)
    assert result == PassResult()
    assert not [n for n in gm.graph.nodes if n.target in (aten.index_copy.default, aten.where.self)]


def test_leaves_what_is_condensed() -> None:
    gm, result = _run(_ablate(nn.Linear(8, 9)), randn(5, 8), gate=lambda layer: None)
    assert result == PassResult()
    assert len(calls(gm, torch.ops.fanin.gather_matmul.default)) == 1


def test_leaves_what_was_narrowed() -> None:
    """Nobody reads the ablated neurons of the first; those of the second are the output."""
    torch.manual_seed(0)
    model = nn.Sequential(_ablate(nn.Linear(8, 9)), nn.Tanh(), _ablate(nn.Linear(9, 12)))
    x = randn(5, 8)
    gm = graph_of(model, x)
    passes = (fold_constant_channels, remove_unread_neurons, *PASSES)
    result = run(gm, *passes, ctx=context(gm, gate=_active_pays), inputs=(x,))
    assert [(r.layer, r.detail) for r in result.rewritten] == [("2", "8 of 12 neurons computed")]
    assert [_shape_of(node.args[1]) for node in calls(gm, aten.linear.default)] == [(6, 8), (8, 6)]


def test_a_computed_bias_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _ablate(nn.Linear(8, 9))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, x.sum() * self.layer.bias)

    _, result = _run(Model(), randn(5, 8))
    assert not result.rewritten
    assert [s.reason for s in result.skipped] == ["ablated neurons are computed: its bias is not constant"]


def test_an_output_in_an_order_of_its_own_is_named() -> None:
    torch.manual_seed(0)
    model, x = _ablate(nn.Conv2d(4, 9, 1)), randn(2, 4, 7, 6)
    gm = graph_of(model, x)
    (node,) = calls(gm, aten.conv2d.default)
    node.meta["val"] = node.meta["val"].transpose(2, 3).contiguous().transpose(2, 3)
    result = run(gm, *PASSES, ctx=context(gm, gate=_active_pays), inputs=(x,))
    assert not result.rewritten
    assert [s.reason for s in result.skipped] == ["ablated neurons are computed: its output is strided"]


def test_a_layer_called_twice_is_selected_from_once() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = _ablate(nn.Linear(8, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.layer(x * 2).tanh()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    gm, result = _run(Model(), randn(5, 8))
    assert len(result.rewritten) == 2
    first, second = calls(gm, aten.linear.default)
    assert first.args[1:3] == second.args[1:3]


def test_free_sizes_stay_free() -> None:
    torch.manual_seed(0)
    free = torch.export.Dim.DYNAMIC
    model = any_type(nn.Sequential(_ablate(nn.Conv2d(4, 9, 3)), nn.ReLU()).eval())
    for format in (torch.contiguous_format, torch.channels_last):
        model, x = model.to(memory_format=format), randn(3, 4, 8, 9).to(memory_format=format)
        with torch.no_grad():
            program = torch.export.export(
                model, (x,), dynamic_shapes=({0: free, 2: free, 3: free},), strict=False
            )
        gm = program.module(check_guards=False)
        assert isinstance(gm, fx.GraphModule)
        _drop_asserts(gm)
        symbols = _symbols(gm)
        ctx = context(gm, gate=_active_pays)
        # support.run compares sizes, which fixes symbols
        *_, result = [run_pass(gm, ctx) for run_pass in (find_masked_layers, *PASSES)]
        assert len(result.rewritten) == 1
        assert _symbols(gm) == symbols
        gm.recompile()
        for shape in ((1, 4, 5, 6), (0, 4, 7, 7), (6, 4, 10, 5)):
            other = randn(*shape).to(memory_format=format)
            with torch.no_grad():
                torch.testing.assert_close(gm(other), model(other))


def _symbols(gm: fx.GraphModule) -> list[str]:
    (relu,) = calls(gm, aten.relu.default)
    assert isinstance(relu.args[0], fx.Node)
    return [str(node.meta["val"].shape) for node in (relu.args[0], relu)]


class _Model(nn.Module):
    """Ablated channels are pinned: those of the stem by the output, those of the mixer by a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ablate(nn.Conv2d(3, 24, 3, padding=1))
        self.mixer = _ablate(nn.Linear(24, 24, bias=False))
        self.norm = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        return h, self.norm(self.mixer(h.flatten(2).mT)).relu()


def _rates(condensed: float, place: float) -> cost.Rates:
    return cost.Rates(
        1, (9.0,) * 5, (condensed,) * 5, (place,) * 5, (9.0,) * 3, (condensed,) * 3, (place,) * 3
    )


def _details(result: PipelineResult | None) -> dict[str, str]:
    assert result is not None
    return {r.layer: r.detail for r in result.rewritten if r.became == "active"}


ALL = {"stem": "16 of 24 neurons computed", "mixer": "16 of 24 neurons computed"}


@pytest.mark.usefixtures("dynamo")
def test_through_the_backend_with_a_free_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "host_rates", lambda threads, **_: _rates(0.1, 100.0))
    torch.manual_seed(0)
    model, last = _Model().eval(), torch.channels_last
    f = torch.compile(model, backend="fanin", options={"strict": True}, dynamic=True)
    with recorded() as compilations:
        counts = []
        for x in (randn(4, 3, 8, 8), randn(5, 3, 8, 8), randn(7, 3, 8, 8).to(memory_format=last)):
            y = f(x)
            assert_equals_model(y, model, x)
            assert [t.stride() for t in y] == [t.stride() for t in model(x)]
            counts.append(len(compilations))
    assert counts[0] == counts[1]
    assert all(_details(c.result) == ALL for c in compilations)


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("condensed", "place"), [(100.0, 100.0), (0.1, 0.01)])
def test_the_backend_leaves_it_where_it_does_not_pay(
    monkeypatch: pytest.MonkeyPatch, condensed: float, place: float
) -> None:
    monkeypatch.setattr(cost, "host_rates", lambda threads, **_: _rates(condensed, place))
    model, x = _Model().eval(), randn(3, 3, 8, 8)
    with recorded() as compilations:
        assert_equals_model(torch.compile(model, backend="fanin", options={"strict": True})(x), model, x)
    assert _details(compilations[0].result) == {}


@pytest.mark.usefixtures("dynamo")
def test_changed_weights_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "host_rates", lambda threads, **_: _rates(0.1, 100.0))
    torch.manual_seed(0)
    model, x = _Model().eval(), randn(3, 3, 8, 8)
    f = torch.compile(model, backend="fanin", options={"strict": True})

    def change(what: Any) -> None:
        before = f(x)[0]
        what()
        for _ in range(2):  # the first may step aside, the second is compiled
            y = f(x)
            assert not torch.allclose(y[0], before, atol=1e-3)
            assert_equals_model(y, model, x)

    stem = any_type(model.stem)
    with recorded() as compilations:
        change(lambda: stem.weight.mul_(-1.5))
        change(lambda: stem.bias.add_(1.0))  # of the ablated neurons, too
        change(lambda: stem.weight.copy_(stem.weight.roll(1, 0)))  # as many ablated, others
        assert len(compilations) == 1
        change(lambda: stem.weight[:3].fill_(0.5))  # neurons are back
    assert [_details(c.result) for c in compilations] == [ALL, ALL | {"stem": "17 of 24 neurons computed"}]


@pytest.mark.parametrize("filtered", [False, True])
def test_through_the_graph_door(filtered: bool) -> None:
    """It goes by bytes, and by filter_fn."""
    torch.manual_seed(0)
    model, x = _Model().eval(), randn(3, 3, 8, 8)
    condensed = any_type(condense)(
        model, example_inputs=(x,), filter_fn=(lambda *_: False) if filtered else None
    )
    # the mixer's constant inputs are folded: condensed it is smaller still
    assert _details(condensed.meta[RESULT]) == ({} if filtered else {"stem": ALL["stem"]})
    for batch in (1, 4):
        x = randn(batch, 3, 8, 8)
        assert_equals_model(condensed(x), model, x)
