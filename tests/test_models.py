"""Whole transformers and CNNs, each with masks from another source, equal to the masked dense model in every door."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fanin_compile
from fanin_compile.backend import Compilation, record
from fanin_compile.bench.models import MAKERS, ModelCase, OneInput, make_model, mask_constant_fan_in, maskable
from tests.compile_support import assert_equals_model, compiled

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("dynamo")
SOURCES = ("zeros", "prune", "parametrize", "buffer")


class _Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return weight * self.mask


def _case(name: str, source: str, *, batch: int = 2) -> tuple[OneInput, Tensor]:
    """A small model of constant fan-in at 90 %, half of the hidden neurons ablated, its masks kept as `source` says."""
    case = make_model(name, small=True, batch=batch)
    masks = mask_constant_fan_in(case.model, 0.9, ablate=0.5)
    for key, mask in masks.items():
        path, parameter = key.rpartition(".")[::2]
        module = case.model.get_submodule(path)
        if source == "prune":
            prune.custom_from_mask(module, parameter, mask)
        elif source == "parametrize":
            parametrize.register_parametrization(module, parameter, _Mask(mask))
        elif source == "buffer":
            module.register_buffer(f"{parameter}_mask", mask)
    return OneInput(case).eval(), next(iter(case.inputs.values()))


def _assert_as_exact(model: OneInput, x: Tensor, *outputs: Tensor) -> None:
    """Each output is as close to the fp64 model as the fp32 masked dense model is, up to a factor."""
    exact_model = copy.deepcopy(model).double()
    exact_model._others = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in model._others.items()
    }
    exact = exact_model(x.double() if x.is_floating_point() else x)
    scale = exact.abs().max()
    dense_error = (model(x) - exact).abs().max() / scale
    for output in outputs:
        assert output.shape == exact.shape
        error = (output - exact).abs().max() / scale
        assert error <= 4 * dense_error + 1e-6, f"{error:.1e}, dense {dense_error:.1e}"


def _condensed_layers(compilations: list[Compilation]) -> int:
    results = [c.result for c in compilations]
    assert None not in results, [c.untouched for c in compilations]
    return sum(r.bytes is not None for result in results if result for r in result.rewritten)


@pytest.mark.parametrize(
    ("name", "source"), [(name, SOURCES[i % len(SOURCES)]) for i, name in enumerate(sorted(MAKERS))]
)
def test_every_masked_layer_is_condensed_and_outputs_are_equal(name: str, source: str) -> None:
    model, x = _case(name, source)
    expected = len(list(maskable(model.model)))
    with torch.no_grad(), record() as compilations:
        through_backend = compiled(model)(x)
    assert _condensed_layers(compilations) == expected
    with torch.no_grad():
        condensed = fanin_compile.condense(model)
        _assert_as_exact(model, x, through_backend, condensed(x))
    assert sum(layer.rewritten for layer in fanin_compile.explain(condensed).layers) == expected


@pytest.mark.parametrize("name", ["vit", "bert", "resnet50", "mlp"])
def test_the_graph_door_removes_ablated_neurons(name: str) -> None:
    model, x = _case(name, "zeros")
    condensed = fanin_compile.condense(model, example_inputs=(x,))
    report = fanin_compile.explain(condensed)
    with torch.no_grad():
        _assert_as_exact(model, x, condensed(x))
        other = torch.cat([x, x.flip(0), x])  # sizes stay free
        _assert_as_exact(model, other, condensed(other))
    narrowed = [
        change
        for layer in report.layers
        for change in layer.changes
        if "neurons" in change and "->" in change
    ]
    assert narrowed, report
    assert sum(t.nbytes for t in condensed.state_dict().values()) < sum(
        t.nbytes for t in model.state_dict().values()
    )


# chains of feed-forward layers, one a block, and whether they are gated; T5 has an encoder and a decoder
CHAINS = {"llama": (2, True), "bert": (2, False), "gpt2": (2, False), "vit": (2, False), "t5": (4, True)}


@pytest.mark.parametrize("name", CHAINS)
def test_feed_forward_layers_are_one_call_a_block(name: str) -> None:
    count, gated = CHAINS[name]
    model, x = _gated_t5() if name == "t5" else _case(name, "zeros")
    with torch.no_grad(), record() as compilations:
        _assert_as_exact(model, x, compiled(model)(x))
    (compilation,) = compilations
    assert compilation.result is not None
    chain = torch.ops.fanin.gather_matmul_chain.default
    nodes = list(compilation.result.graph_module.graph.find_nodes(op="call_function", target=chain))
    assert [node.args[5] for node in nodes].count(gated) == count, compilation.result.skipped
    assert {node.args[4] for node in nodes if node.args[5] == gated} == {
        {"llama": "silu", "gpt2": "gelu_tanh", "t5": "gelu_tanh"}.get(name, "gelu")
    }


def _gated_t5() -> tuple[OneInput, Tensor]:
    """Version 1.1 of T5, its gelu written out."""
    import transformers

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")  # type: ignore[arg-type]
    model = transformers.T5ForConditionalGeneration(config).requires_grad_(False)
    ids = torch.randint(2, 99, (2, 9))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}
    mask_constant_fan_in(model, 0.9)
    return OneInput(ModelCase("t5", model, inputs, "logits")).eval(), ids


def test_changing_batch_and_length_recompiles_at_most_twice() -> None:
    model, _ = _case("bert", "zeros")
    fast = compiled(model)
    with torch.no_grad(), record() as compilations:
        for batch, length in ((2, 9), (3, 9), (5, 12), (4, 7), (7, 30)):
            ids = torch.randint(0, 99, (batch, length))
            _assert_as_exact(model, ids, fast(ids))
    assert len(compilations) <= 3


def test_an_lstm_passes_through_and_is_named() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(16, 32, batch_first=True)
            self.head = nn.Linear(32, 8)
            prune.random_unstructured(self.head, "weight", 0.9)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.lstm(x)[0]
            out: Tensor = self.head(hidden)
            return out

    model, x = Tagger().eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        assert_equals_model(torch.compile(model, backend="fanin")(x), model, x)
    report = fanin_compile.explain(model, x)
    assert "lstm" in str(report).lower(), report
