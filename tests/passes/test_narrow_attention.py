"""Removing neurons of queries, keys and values through the heads of attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fanin_compile.bench.masking import mask_constant_fan_in
from fanin_compile.bench.models import OneInput, make_model
from fanin_compile.condense import condense
from fanin_compile.export import RESULT
from fanin_compile.graph import CONDENSED
from fanin_compile.options import Options
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.pipeline import PassResult
from tests.compile_support import any_type, assert_equals_model, compiled, randn, recorded, sparse_linear
from tests.passes.support import calls, graph_of, narrowed, run

aten = torch.ops.aten
HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE


class Attention(nn.Module):
    """Masked projections around attention; ablated[p][h] are the neurons without inputs of head h of q, k or v."""

    def __init__(
        self,
        ablated: list[list[list[int]]],
        *,
        bias: tuple[bool, bool, bool] = (True, True, True),
        attend: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention,
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (sparse_linear(24, WIDTH, 6, seed=s) for s in range(3))
        self.out, self.attend = sparse_linear(WIDTH, 24, 20, seed=3), attend
        with torch.no_grad():
            for layer, heads, biased in zip((self.q, self.k, self.v), ablated, bias, strict=True):
                rows = [head * SIZE + i for head, dead in enumerate(heads) for i in dead]
                layer.weight[rows] = 0
                if not biased:
                    layer.bias[rows] = 0

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], HEADS, SIZE).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attend(*(self.heads(layer(x)) for layer in (self.q, self.k, self.v)))
        y: Tensor = self.out(h.transpose(1, 2).reshape(*x.shape[:-1], WIDTH))
        return y


def every_head(*dead: int) -> list[list[int]]:
    return [list(dead)] * HEADS


def narrow(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, PassResult]:
    gm = graph_of(model, x)
    return gm, run(gm, fold_constant_channels, remove_unread_neurons, inputs=(x,))


def head_sizes(gm: torch.fx.GraphModule) -> list[int]:
    (attention,) = calls(gm, aten.scaled_dot_product_attention.default)
    return [arg.meta["val"].shape[-1] for arg in attention.args[:3]]  # type: ignore[union-attr]


def shapes(gm: torch.fx.GraphModule) -> list[tuple[int, ...]]:
    return [node.meta[CONDENSED].shape for node in calls(gm, aten.linear.default)]


def test_dead_neurons_leave_every_head_and_the_scale_stays() -> None:
    x = randn(2, 5, 24)
    model = Attention([every_head(1, 2), every_head(1, 2), every_head(0, 7)])
    gm, result = narrow(model, x)
    assert [r.detail for r in result.rewritten] == ["32 -> 24 neurons"] * 3
    assert shapes(gm) == [(24, 24)] * 3 + [(24, 24)]
    assert head_sizes(gm) == [6, 6, 6]
    (attention,) = calls(gm, aten.scaled_dot_product_attention.default)
    assert attention.kwargs["scale"] == pytest.approx(SIZE**-0.5)


def test_each_head_may_lose_other_neurons() -> None:
    x = randn(2, 5, 24)
    dead = [[0, 1, 2], [5, 6, 7], [0, 3, 4], [2, 4, 6]]
    gm, _ = narrow(Attention([dead, dead, dead[::-1]]), x)
    assert head_sizes(gm) == [5, 5, 5]


def test_heads_keep_as_many_neurons_as_the_one_that_needs_most() -> None:
    x = randn(2, 5, 24)
    gm, result = narrow(Attention([[[0, 1, 2], [5, 6], [3, 4, 5, 6], [0, 1, 2]]] * 3), x)
    assert head_sizes(gm) == [6, 6, 6]
    reason = "ablated neurons stay: scaled_dot_product_attention needs as many in each of 8 groups"
    assert [(s.layer, s.reason, s.values) for s in result.skipped] == [
        (layer, reason, {"ablated": 4}) for layer in "qkv"
    ]


def test_a_head_keeps_one_neuron() -> None:
    x = randn(2, 5, 24)
    gm, _ = narrow(Attention([every_head(*range(SIZE))] * 3), x)
    assert head_sizes(gm) == [1, 1, 1]


def test_queries_and_values_of_one_size_run_fastest() -> None:
    """torch's flash kernel for CPUs takes no other: what the values need, queries and keys keep."""
    x = randn(2, 5, 24)
    gm, _ = narrow(Attention([every_head(0, 1, 2, 3), every_head(0, 1, 2, 3), every_head(7)]), x)
    assert head_sizes(gm) == [7, 7, 7]


@pytest.mark.parametrize(
    ("query", "key", "biased", "left"),
    [
        ((), (0, 1), (True, True, True), 6),  # a constant key adds as much to all logits of a query
        ((0, 1), (), (False, True, True), 6),  # a query of 0 adds nothing
        ((0, 1), (), (True, True, True), 8),  # but another constant adds multiples of the keys
        ((0,), (1,), (False, False, True), 6),
    ],
)
def test_what_a_softmax_does_not_see(
    query: tuple[int, ...], key: tuple[int, ...], biased: tuple[bool, bool, bool], left: int
) -> None:
    x = randn(2, 5, 24)
    gm, _ = narrow(Attention([every_head(*query), every_head(*key), every_head(3, 4)], bias=biased), x)
    assert head_sizes(gm) == [left] * 3


def _masked(mask: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q))


def _hides_first_rows(q: Tensor) -> Tensor:
    return (q[:, :1, :, :1] < 9).expand(-1, -1, -1, q.shape[2])


@pytest.mark.parametrize("biased", [True, False])
def test_constant_values_are_folded_only_where_weights_sum_to_one(biased: bool) -> None:
    """A row which a mask hides altogether is 0, not the constant."""
    x = randn(2, 5, 24)
    ablated = [every_head(1), every_head(1), every_head(2)]
    model = Attention(ablated, attend=_masked(_hides_first_rows), bias=(True, True, biased))
    gm, result = narrow(model, x)
    assert head_sizes(gm) == ([8] * 3 if biased else [7] * 3)
    reasons = {s.layer: s.reason for s in result.skipped}
    assert ("may hide all positions" in reasons.get("v", "")) == biased


def _seeing_all(q: Tensor) -> Tensor:
    """As transformers builds it: positions from 0 are at least 0."""
    positions = torch.arange(q.shape[2])[None, None, :, None] + 0
    return (positions >= 0).expand(q.shape[0], -1, q.shape[2], q.shape[2])


def test_a_mask_that_hides_nothing_is_seen_through() -> None:
    x = randn(2, 5, 24)
    ablated = [every_head(1), every_head(1), every_head(2)]
    gm, _ = narrow(Attention(ablated, attend=_masked(_seeing_all)), x)
    assert head_sizes(gm) == [7] * 3
    hidden = _masked(lambda q: torch.arange(q.shape[2])[None, None, None] >= 1)
    gm, _ = narrow(Attention(ablated, attend=hidden), x)
    assert head_sizes(gm) == [8] * 3


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q / SIZE**0.5) @ k.transpose(-2, -1)
    return torch.matmul(scores.softmax(-1), v)


def _batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads are part of the batch, as in nn.MultiheadAttention."""
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    scores = torch.bmm(q * 0.3, k.transpose(1, 2)) + 0.1
    h: Tensor = torch.bmm(scores.softmax(-1), v).unflatten(0, (-1, HEADS))
    return h


@pytest.mark.parametrize("attend", [_causal, _written_out, _batched])
def test_other_forms_of_attention(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    x = randn(2, 5, 24)
    dead = [[0, 1, 2], [5, 6, 7], [0, 3, 4], [2, 4, 6]]
    gm, _ = narrow(Attention([[[]] * HEADS, dead, dead], attend=attend), x)
    assert shapes(gm) == [(20, 24)] * 3 + [(24, 20)]


def _unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(q @ k.transpose(2, 3), v)


def test_scores_that_are_seen_keep_constant_keys() -> None:
    x = randn(2, 5, 24)
    model = Attention([every_head(), every_head(1), every_head()], attend=_unnormalised)
    gm, _ = narrow(model, x)
    assert shapes(gm) == [(32, 24)] * 3 + [(24, 32)]
    model = Attention(
        [every_head(), every_head(1), every_head()],
        attend=_unnormalised,
        bias=(True, False, True),
    )
    gm, _ = narrow(model, x)
    assert shapes(gm) == [(28, 24)] * 2 + [(32, 24), (24, 32)]


def _one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :1].expand(-1, HEADS, -1, -1), v)


def _rolled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.roll(1, -1), v)


def _swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Head and neuron trade places: [B, H, T, D] read as [B, D, T, H]."""
    q, k, v = (t.transpose(1, 3) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 3)


@pytest.mark.parametrize(
    ("attend", "pinned"),
    [
        (_rolled, "is read whole by roll"),
        (_swapped, "is read whole by transpose"),
        (lambda q, k, v: F.layer_norm(F.scaled_dot_product_attention(q, k, v), (SIZE,)), "layer_norm"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, q.softmax(-1), v), "softmax"),
    ],
    ids=["roll", "swap", "norm", "softmax"],
)
def test_what_mixes_neurons_pins_them(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], pinned: str
) -> None:
    x = randn(2, 5, 24)
    _, result = narrow(Attention([every_head(1)] * 3, attend=attend), x)
    assert result.rewritten == ()
    assert any(pinned in skip.reason for skip in result.skipped), result.skipped


def test_a_key_head_that_all_queries_share() -> None:
    x = randn(2, 5, 24)
    gm, _ = narrow(Attention([every_head(), every_head(1, 3), every_head(1, 2)], attend=_one_key_head), x)
    assert head_sizes(gm) == [6] * 3


def _grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of keys and values, each for two of queries, as Llama repeats them."""
    k, v = (
        t[:, ::2, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], HEADS, t.shape[2], SIZE) for t in (k, v)
    )
    return F.scaled_dot_product_attention(q, k, v)


def test_key_heads_that_groups_of_queries_share() -> None:
    x = randn(2, 5, 24)
    ablated = [every_head(), every_head(1, 3), every_head(1, 2)]
    gm, _ = narrow(Attention(ablated, attend=_grouped_queries), x)
    assert head_sizes(gm) == [6] * 3


def test_a_constant_for_heads_that_are_part_of_the_batch() -> None:
    """[B * H, T, D] + [D]: with other neurons left in each head there is no such constant any more."""
    offset = randn(SIZE, seed=7)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.unflatten(torch.bmm(weights, v + offset), 0, (-1, HEADS))

    model = Attention([every_head(), every_head(1, 3), every_head(0, 5)], attend=attend).eval()
    condensed = condense(model, example_inputs=(randn(2, 5, 24),))
    assert set(narrowed(condensed)) == {"q", "k"}
    reasons = [s.reason for s in any_type(condensed).meta[RESULT].skipped if s.layer == "v"]
    assert any("combines them with a tensor that is not a layer's" in reason for reason in reasons)
    with torch.no_grad():
        x = randn(3, 7, 24, seed=1)
        assert_equals_model(condensed(x), model, x)


PATTERNS = st.lists(
    st.lists(st.sets(st.integers(0, SIZE - 1)).map(sorted), min_size=HEADS, max_size=HEADS),
    min_size=3,
    max_size=3,
)


@settings(deadline=None, max_examples=25)
@given(
    PATTERNS,
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from(
        [F.scaled_dot_product_attention, _causal, _written_out, _batched, _one_key_head, _grouped_queries]
    ),
)
def test_any_neurons_may_be_ablated(
    ablated: list[list[list[int]]],
    biased: tuple[bool, bool, bool],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    x = randn(2, 5, 24)
    model = Attention(ablated, bias=biased, attend=attend)
    gm, _ = narrow(model, x)
    with torch.no_grad():
        assert_equals_model(gm(x), model, x)


class Packed(nn.Module):
    """nn.MultiheadAttention with masks in both of its weights."""

    def __init__(self, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights
        dead = [part * WIDTH + head * SIZE + i for part in range(3) for head in range(HEADS) for i in (1, 4)]
        with torch.no_grad():
            for weight in (any_type(self.attention.in_proj_weight), self.attention.out_proj.weight):
                weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
            any_type(self.attention.in_proj_weight)[dead] = 0
            self.attention.in_proj_bias.copy_(randn(3 * WIDTH, seed=2))
            self.attention.out_proj.bias.copy_(randn(WIDTH, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return y


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_with_any_batch_and_length(need_weights: bool) -> None:
    model = Packed(need_weights=need_weights).eval()
    condensed = condense(model, example_inputs=(randn(2, 5, WIDTH),))
    assert narrowed(condensed) == {"attention.in_proj_weight": "96 -> 72 neurons"}
    with torch.no_grad():
        for shape in ((2, 5, WIDTH), (3, 7, WIDTH)):
            x = randn(*shape, seed=4)
            assert_equals_model(condensed(x), model, x)


@pytest.mark.usefixtures("dynamo")
def test_multihead_attention_compiles_with_symbolic_sizes() -> None:
    """Where a number must not stay symbolic, Dynamo traces anew in the midst of the backend."""
    model = Packed(need_weights=False).eval()
    run_compiled = compiled(model, dynamic=True)
    with recorded() as compilations:
        for shape in ((3, 7, WIDTH), (2, 5, WIDTH)):
            x = randn(*shape, seed=4)
            assert_equals_model(run_compiled(x), model, x)
    assert narrowed(compilations[-1].result) == {"attention.in_proj_weight": "96 -> 72 neurons"}


@pytest.mark.usefixtures("dynamo")
def test_multihead_attention_compiles_with_a_changing_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    # rewritten graphs run node by node: inductor compiles such models elsewhere
    monkeypatch.setattr(Options, "finish", lambda self, gm, inputs, **patches: gm.forward)
    model = Packed(need_weights=False).eval()
    run_compiled = compiled(model)
    with recorded() as compilations:
        for batch in (2, 3, 5):
            x = randn(batch, 5, WIDTH, seed=batch)
            assert_equals_model(run_compiled(x), model, x)
    assert [narrowed(c.result) for c in compilations] == [
        {"attention.in_proj_weight": "96 -> 72 neurons"}
    ] * 2


ENDS = ("query", "key", "value", "q_proj", "k_proj", "v_proj", "c_attn")


def ablated_model(name: str) -> tuple[OneInput, Tensor, set[str]]:
    """A small model, a quarter of the neurons of each head of its projections ablated, others in every head."""
    case = make_model(name, small=True, batch=2)
    mask_constant_fan_in(case.model, 0.8)
    generator = torch.Generator().manual_seed(0)
    names = set()
    for path, module in case.model.named_modules():
        if path.endswith(ENDS) and hasattr(module, "weight"):
            layer = any_type(module)
            weight = layer.weight.t() if path.endswith("c_attn") else layer.weight
            dead = [
                start + int(i)
                for start in range(0, len(weight), 16)
                for i in torch.randperm(16, generator=generator)[:4]
            ]
            with torch.no_grad():
                weight[dead] = 0
                if layer.bias is not None:
                    layer.bias.normal_(generator=generator)
                    # the mask of GPT-2 is computed from positions: it might hide all of a row
                    layer.bias[dead] *= name != "gpt2"
            names.add(f"model.{path}")
    return OneInput(case).eval(), next(iter(case.inputs.values())), names


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "whisper-encoder"])
def test_transformers_lose_neurons_of_their_heads(name: str) -> None:
    pytest.importorskip("transformers")
    model, x, names = ablated_model(name)
    condensed = condense(model, example_inputs=(x,))
    done = narrowed(condensed)
    assert set(done) == names
    assert set(done.values()) <= {"64 -> 48 neurons", "192 -> 144 neurons"}
    with torch.no_grad():
        assert_equals_model(condensed(x), model, x, share=1e-5)
        other = torch.cat([x, x[:1]])
        assert_equals_model(condensed(other), model, other, share=1e-5)


@pytest.mark.usefixtures("dynamo")
def test_bert_compiles_with_fewer_neurons_in_its_heads() -> None:
    pytest.importorskip("transformers")
    model, x, names = ablated_model("bert")
    with recorded() as compilations:
        assert_equals_model(compiled(model)(x), model, x, share=1e-5)
    (compilation,) = compilations
    assert set(narrowed(compilation.result)) == names
