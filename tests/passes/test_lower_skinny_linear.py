from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fanin_compile
from fanin_compile.passes.compute_active import compute_active
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.lower_skinny_linear import lower_skinny_linear
from fanin_compile.pipeline import PassResult
from fanin_compile.records import Skip
from tests.compile_support import (
    compiled,
    no_warning_of_ours,
    randn,
    recorded,
    sparse_linear,
)
from tests.passes.support import calls, context, graph_of, position, run

linear, skinny = torch.ops.aten.linear.default, torch.ops.fanin.skinny_linear.default
HEAD = 4 * 64 * 40  # bytes of the head's weight


@pytest.fixture(autouse=True)
def any_large_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lower_skinny_linear.__globals__, "LEAST_BYTES", HEAD)


class _Decoder(nn.Module):
    """A masked layer between an embedding and a dense head, which share one weight."""

    def __init__(self, *, bias: bool = False, tied: bool = True, masked: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(40, 64)
        self.layer = sparse_linear(64, 64, 4 if masked else 64)
        self.head = nn.Linear(64, 40, bias=bias)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        h: Tensor = self.head(F.relu(self.layer(self.tokens(ids))))
        return h


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(0))


def _assert_right(actual: Tensor, model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(ids)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def _lower(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, PassResult]:
    gm = graph_of(model, x)
    return gm, run(gm, condense_linear, lower_skinny_linear, inputs=(x,))


@pytest.mark.parametrize("shape", [(1,), (16,), (1, 1), (4, 4), (2, 3, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_takes_a_dense_head_of_few_rows(shape: tuple[int, ...], bias: bool, tied: bool) -> None:
    gm, result = _lower(_Decoder(bias=bias, tied=tied), _ids(*shape))
    (call,) = calls(gm, skinny)
    assert not calls(gm, linear)
    rows = torch.Size(shape).numel()
    assert [(r.layer, r.became, r.detail) for r in result.rewritten] == [
        (call.name, "skinny-linear", f"{rows} rows, streaming kernel")
    ]
    assert not result.skipped


@pytest.mark.parametrize("shape", [(17,), (3, 6), (0,)])
def test_many_rows_and_none_are_torchs(shape: tuple[int, ...]) -> None:
    gm, result = _lower(_Decoder(), _ids(*shape))
    assert (len(calls(gm, linear)), len(calls(gm, skinny))) == (1, 0)
    assert result == PassResult()


def test_a_weight_that_stays_in_cache_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lower_skinny_linear.__globals__, "LEAST_BYTES", HEAD + 1)
    gm, result = _lower(_Decoder(), _ids(1))
    assert len(calls(gm, linear)) == 1
    assert result == PassResult()


def test_a_graph_without_a_condensed_layer_is_left_alone() -> None:
    gm, result = _lower(_Decoder(masked=False), _ids(1))
    assert len(calls(gm, linear)) == 2
    assert result == PassResult()


def test_a_masked_layer_that_stays_dense_is_left_alone() -> None:
    model = nn.Sequential(sparse_linear(64, 64, 4), sparse_linear(64, 40, 20))
    x = randn(1, 64)
    gm = graph_of(model, x)
    ctx = context(gm, gate=lambda layer: Skip(layer.name, "no") if layer.name == "1" else None)
    result = run(gm, condense_linear, compute_active, lower_skinny_linear, ctx=ctx, inputs=(x,))
    assert len(calls(gm, linear)) == 1
    assert result == PassResult()


def test_other_dtypes_are_named() -> None:
    class Wide(_Decoder):
        def forward(self, ids: Tensor) -> Tensor:
            h: Tensor = self.head(F.relu(self.layer(self.tokens(ids).float())).double())
            return h

    model = Wide(tied=False)
    model.head.double()
    gm, result = _lower(model, _ids(1))
    assert len(calls(gm, linear)) == 1
    (skip,) = result.skipped
    assert skip.reason == "skinny linear: the kernel knows float32 alone"
    assert skip.values == {"dtypes": [torch.float64, torch.float64]}


def test_stands_behind_all_that_asks_for_linears() -> None:
    assert position(compute_active) < position(lower_skinny_linear)


# ---- through both doors ----------------------------------------------------------------------------------


def test_a_decoder_in_both_doors(dynamo: None) -> None:
    model, ids = _Decoder().eval(), _ids(2, 1)
    with recorded() as compilations, no_warning_of_ours():
        f = compiled(model)
        _assert_right(f(ids), model, ids)
    (compilation,) = compilations
    assert compilation.result is not None
    assert "skinny-linear" in {r.became for r in compilation.result.rewritten}
    with torch.no_grad():
        small = fanin_compile.condense(model, example_inputs=(ids,))
        assert isinstance(small, fx.GraphModule)
        assert len(calls(small, skinny)) == 1
        _assert_right(small(ids), model, ids)
    notes = fanin_compile.explain(model, ids, options={"cost_gate": False}).notes
    assert any("skinny-linear, 2 rows, streaming kernel" in note for note in notes)


def test_the_heads_weight_stays_the_models_own(dynamo: None) -> None:
    model, ids = _Decoder(tied=False).eval(), _ids(2, 1)
    with recorded() as compilations:
        f = compiled(model)
        f(ids)
        with torch.no_grad():
            model.head.weight.mul_(2)
        _assert_right(f(ids), model, ids)
    assert len(compilations) == 1


def test_a_number_of_rows_that_changes(dynamo: None) -> None:
    model = _Decoder().eval()
    with recorded() as compilations, no_warning_of_ours():
        f = compiled(model, dynamic=True)
        for rows in (2, 3, 16, 17, 40):
            _assert_right(f(_ids(rows)), model, _ids(rows))
    done = [{r.became for r in c.result.rewritten} for c in compilations if c.result is not None]
    assert all("skinny-linear" in became for became in done)
    with torch.no_grad():
        small = fanin_compile.condense(model, example_inputs=(_ids(2),))
        for rows in (2, 3, 17):
            _assert_right(small(_ids(rows)), model, _ids(rows))


def test_many_rows_at_first_stay_torchs(dynamo: None) -> None:
    model = _Decoder().eval()
    with recorded() as compilations:
        f = compiled(model, dynamic=True)
        for rows in (40, 2):
            _assert_right(f(_ids(rows)), model, _ids(rows))
    done = {r.became for c in compilations if c.result is not None for r in c.result.rewritten}
    assert "skinny-linear" not in done
