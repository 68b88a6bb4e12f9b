"""Whole transformers and CNNs, with masks from every source, equal to the masked dense model in every door."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree as pytree

import fanin_compile
from fanin_compile.backend import Compilation, record
from fanin_compile.bench.masking import mask_constant_fan_in, maskable
from fanin_compile.bench.models import MAKERS, ModelCase, OneInput, compared, make_model
from fanin_compile.mask import MaskedWeight, masked_weights
from fanin_compile.options import Options
from fanin_compile.train import SRigL
from tests.compile_support import (
    MLP,
    any_type,
    assert_equals_model,
    compiled,
    fan_in_mask,
    model_in_fp64,
    randn,
)
from tests.helpers import assert_close_at_scale

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("dynamo")


class _Mask(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        return weight * self.mask


def _twice(module: nn.Module, parameter: str, mask: Tensor) -> None:
    prune.random_unstructured(module, parameter, 0.3)
    prune.custom_from_mask(module, parameter, mask)


def _removed(module: nn.Module, parameter: str, mask: Tensor) -> None:
    prune.custom_from_mask(module, parameter, mask)
    prune.remove(module, parameter)


def _multiplies_itself(module: nn.Module, parameter: str, mask: Tensor) -> None:
    module.register_buffer("mask", mask.float())
    module.__class__ = _multiplying(type(module))


def _multiplying(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose own forward multiplies its weight by its mask."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        layer = any_type(self)
        weight = layer.weight * layer.mask
        if isinstance(self, nn.Linear):
            return F.linear(x, weight, self.bias)
        if isinstance(self, nn.Conv1d | nn.Conv2d):
            return layer._conv_forward(x, weight, layer.bias)  # type: ignore[no-any-return]
        y: Tensor = torch.addmm(layer.bias, x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])  # GPT-2's
        return y

    return type(f"Multiplying{kind.__name__}", (kind,), {"forward": forward})


# How a mask gets onto the weight `parameter` of a module. Values outside it are not 0 before.
CARRIERS: dict[str, Callable[[nn.Module, str, Tensor], object]] = {
    "zeros": lambda module, parameter, mask: getattr(module, parameter).mul_(mask),
    "prune": prune.custom_from_mask,
    "prune, twice": _twice,
    "prune, removed": _removed,
    "parametrize": lambda module, parameter, mask: parametrize.register_parametrization(
        module, parameter, _Mask(mask)
    ),
    "the module multiplies": _multiplies_itself,
}
TRAINED = "SRigL"  # which makes masks of its own
SOURCES = (*CARRIERS, TRAINED)


def _case(name: str, sources: str | Sequence[str] = "zeros", *, batch: int = 2) -> tuple[OneInput, Tensor]:
    """A small model of constant fan-in at 90 %, half of its hidden neurons ablated, and an input.

    Args:
        sources: of all masks, or of those of its layers in turn.
    """
    case = make_model(name, small=True, batch=batch)
    model, x = OneInput(case).eval(), next(iter(case.inputs.values()))
    turn = itertools.cycle([sources] if isinstance(sources, str) else sources)
    source_of = {f"{path}.weight": next(turn) for path, *_ in maskable(case.model)}
    masks = mask_constant_fan_in(case.model, 0.9, ablate=0.5)
    with torch.no_grad():
        for key, mask in masks.items():
            weight = case.model.get_parameter(key)
            weight.copy_(torch.where(mask, weight, torch.randn_like(weight) * weight[mask].std()))
    _train(model, x, [f"model.{key}" for key, source in source_of.items() if source == TRAINED])
    with torch.no_grad():
        for key, source in source_of.items():
            if source != TRAINED:
                CARRIERS[source](case.model.get_submodule(key.removesuffix(".weight")), "weight", masks[key])
    return model, x


def _train(model: OneInput, x: Tensor, names: list[str]) -> None:
    """One step of SRigL on the weights of these names, which changes their masks."""
    if not names:
        return
    weights = [model.get_parameter(name).requires_grad_() for name in names]
    optimizer = torch.optim.SGD(weights, 0.01)
    # 75 %, which leaves an input to neurons with four of them
    options = {
        "include": names,
        "total_steps": 4,
        "delta_t": 1,
        "allocation": "uniform",
        "dense_first": False,
    }
    sparse = SRigL(model, optimizer, sparsity=0.75, **any_type(options))
    compared(model(x)).square().mean().backward()
    optimizer.step()
    sparse.step()
    sparse.finalize()
    model.requires_grad_(False)
    optimizer.zero_grad()


def _assert_as_exact(model: OneInput, x: Tensor, *outputs: object) -> None:
    """Each tensor of an output is as close to the fp64 model's as the fp32 masked dense model's is, up to a factor."""
    expected, dense = _expected(model, x)
    for output in outputs:
        _assert_close(output, expected, dense)


def _expected(model: OneInput, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the model's output in fp64, and in fp32."""
    exact_model = any_type(model_in_fp64(model))
    exact_model._others = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in model._others.items()
    }
    exact = pytree.tree_leaves(exact_model(x.double() if x.is_floating_point() else x))
    return exact, pytree.tree_leaves(model(x))


def _assert_close(output: object, expected: list[Tensor], dense: list[Tensor]) -> None:
    for tensor, dense_tensor, exact in zip(pytree.tree_leaves(output), dense, expected, strict=True):
        scale = exact.abs().max()
        dense_error = (dense_tensor - exact).abs().max() / scale
        assert tensor.shape == exact.shape
        error = (tensor - exact).abs().max() / scale
        assert error <= 4 * dense_error + 1e-6, f"{error:.1e}, dense {dense_error:.1e}"


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_layer_shows_in_the_output(name: str) -> None:
    """Otherwise comparing outputs, here and in benchmarks, would prove nothing of the layers that do not."""
    model, x = _case(name)
    with torch.no_grad():
        expected, dense = _expected(model, x)
        output, scale = dense[0], dense[0].abs().max()
        other = randn(*x.shape, seed=1) if x.is_floating_point() else torch.where(x > 0, x - 1, x + 1)
        change = (compared(model(other)) - output).abs().max() / scale
        assert change > 1e-2
        assert 0.1 < scale < 1e3
        for path, _, weight, _ in maskable(model.model):
            weight.neg_()
            wrong = model(x)
            weight.neg_()
            with pytest.raises(AssertionError, match="dense"):
                _assert_close(wrong, expected, dense)
            assert (compared(wrong) - output).abs().max() / scale > 1e-2, path


def _condensed_layers(compilations: list[Compilation]) -> int:
    results = [c.result for c in compilations]
    assert None not in results, [c.untouched for c in compilations]
    return sum(r.bytes is not None for result in results if result for r in result.rewritten)


def _without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend rewrites and watches graphs as ever, which then run node by node."""
    monkeypatch.setattr(Options, "finish", lambda self, gm, inputs, **patches: gm.forward)


@pytest.mark.parametrize(
    ("name", "source"), [(name, SOURCES[i % len(SOURCES)]) for i, name in enumerate(sorted(MAKERS))]
)
def test_every_masked_layer_is_condensed_and_outputs_are_equal(name: str, source: str) -> None:
    model, x = _case(name, source)
    expected = len(list(maskable(model.model)))
    with torch.no_grad(), record() as compilations:
        through_backend = compiled(model, fullgraph=True)(x)
        _assert_as_exact(model, x, through_backend)
    assert len(compilations) == 1
    assert _condensed_layers(compilations) == expected


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_source_of_masks_is_found_in_every_model(name: str) -> None:
    """The layers of a model carry their masks each in another way, so that few graphs hold all pairs of the two."""
    count = len(list(maskable(make_model(name, small=True).model)))
    for first in range(0, len(SOURCES), count):
        model, x = _case(name, SOURCES[first:] + SOURCES[:first])
        layers = {f"model.{path}": (found.mask, found.transposed) for path, found in _masks(model)}
        report = fanin_compile.explain(model, x, options={"cost_gate": False, "strict": True})
        assert {layer.name for layer in report.rewritten} == set(layers), report
        for layer in report.rewritten:
            mask, transposed = layers[layer.name]
            fan_in = (mask.t() if transposed else mask.flatten(1)).sum(1)
            assert layer.ablated == int((fan_in == 0).sum()), layer
            assert layer.fan_in == (int(fan_in[fan_in > 0].min()), int(fan_in.max())), layer


def _masks(model: OneInput) -> list[tuple[str, MaskedWeight]]:
    names = {path for path, *_ in maskable(model.model)}
    return [(path, found) for path, _, found in masked_weights(model.model) if path in names]


@pytest.mark.parametrize("source", [*SOURCES, "the caller"])
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_source_of_masks_is_condensed_in_every_model(name: str, source: str) -> None:
    given = source == "the caller"
    model, x = _case(name, "zeros" if given else source)
    # a weight of 64 elements takes no fewer bytes packed: what is left dense must be masked all the same
    expected = {f"model.{path}" for path, found in _masks(model) if found.weight.numel() > 64}
    carrying, masks = model, None
    if given:
        masks = {f"model.{path}": found.mask for path, found in _masks(model)}
        carrying = copy.deepcopy(model)
        for key, mask in masks.items():
            carrying.get_parameter(f"{key}.weight").masked_fill_(~mask, 1.0)
    with torch.no_grad():
        condensed = fanin_compile.condense(carrying, masks=masks)
        _assert_as_exact(model, x, condensed(x))
    assert {layer.name for layer in fanin_compile.explain(condensed).rewritten} == expected


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
def test_feed_forward_layers_are_one_call_a_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_inductor(monkeypatch)  # which compiles them above
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


def test_the_blocks_of_a_convnext_end_in_their_scaled_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    _without_inductor(monkeypatch)
    model, x = _case("convnext", "zeros")
    with torch.no_grad(), record() as compilations:
        for name, parameter in model.named_parameters():
            if "layer_scale" in name:  # 1e-6 each, which would hide a block
                parameter.copy_(randn(*parameter.shape))
        _assert_as_exact(model, x, compiled(model)(x))
    (compilation,) = compilations
    assert compilation.result is not None
    for detail in ("scale folded", "+ residual"):
        layers = {r.layer for r in compilation.result.rewritten if r.detail == detail}
        assert len(layers) == 4, f"{detail}: {layers}"
    graph = compilation.result.graph_module.graph
    for target in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor):
        assert not graph.find_nodes(op="call_function", target=target)


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


SIZES = {
    **dict.fromkeys(("bert", "gpt2", "llama", "t5"), ((2, 9), (3, 9), (5, 12), (4, 7), (7, 30))),
    **dict.fromkeys(("roberta", "distilbert"), ((2, 9), (3, 9), (5, 12), (4, 7))),
    "vit": ((2, 3, 32, 32), (3, 3, 32, 32), (7, 3, 32, 32), (5, 3, 32, 32)),
    "deit": ((2, 3, 32, 32), (3, 3, 32, 32), (7, 3, 32, 32)),  # which, as ViT, takes one size of image
    "whisper-encoder": ((2, 80, 100), (3, 80, 100), (5, 80, 100)),
    "resnet50": ((2, 3, 64, 64), (3, 3, 64, 64), (7, 3, 64, 64), (5, 3, 96, 96), (4, 3, 80, 80)),
    # whose padding asks, layer by layer, whether sizes are even: 80 x 80 is a graph of its own for Dynamo
    "mobilenet_v2": ((2, 3, 64, 64), (3, 3, 64, 64), (7, 3, 64, 64), (5, 3, 96, 96)),
    "convnext": ((2, 3, 64, 64), (3, 3, 64, 64), (4, 3, 96, 64)),
}


@pytest.mark.parametrize("name", SIZES)
def test_changing_sizes_recompile_at_most_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name != "bert":  # inductor's kernels for free sizes take a minute to build
        _without_inductor(monkeypatch)
    model, _ = _case(name)
    if name == "t5":
        model = _SameForDecoder(model)
    inputs = [randn(*shape) if len(shape) > 2 else torch.randint(3, 99, shape) for shape in SIZES[name]]
    fast = compiled(model)
    with torch.no_grad(), record() as compilations:
        for x in inputs:
            _assert_as_exact(model, x, fast(x))
    assert len(compilations) <= min(3, _graphs_of_dynamo(model, inputs))
    assert all(_condensed_layers([c]) == len(list(maskable(model.model))) for c in compilations)


def _graphs_of_dynamo(model: nn.Module, inputs: Sequence[Tensor | tuple[Tensor, ...]]) -> int:
    """How many graphs Dynamo captures for these inputs, one after the other, with a backend that does nothing."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    plain = torch.compile(model, backend=counter)
    with torch.no_grad():
        for x in inputs:
            plain(*x if isinstance(x, tuple) else (x,))
    return counter.frame_count


class _SameForDecoder(OneInput):
    """T5 whose decoder reads what its encoder reads, so that their sizes change together."""

    def __init__(self, model: OneInput) -> None:
        super().__init__(model._case)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self._case.tensor(self.model(**{self._key: x}, **self._others | {"decoder_input_ids": x}))


def _mask_all(model: nn.Module) -> set[str]:
    """Zero all but six inputs of each neuron, attention's packed projections included; the layers' names in reports."""
    names = set()
    with torch.no_grad():
        for path, module, found in masked_weights(model):
            weight = getattr(module, found.name)
            out, fan_in = weight.shape
            weight.mul_(fan_in_mask(out, fan_in, 6))
            names.add(path if found.name == "weight" else f"{path}.{found.name}")
    return names


def _layers_of(compilations: list[Compilation]) -> set[str]:
    (compilation,) = compilations
    return {name.partition(" (use")[0] for name in compilation.rewritten_layers}


def test_a_whole_transformer() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 2, 2, 64, batch_first=True).eval()
    names = _mask_all(model)
    assert len(names) == 2 * 4 + 2 * 6
    source, target = randn(2, 7, 32), randn(2, 5, 32, seed=1)
    source_mask = torch.zeros(7, 7).masked_fill_(torch.eye(7).flip(0) > 0, -torch.inf)
    target_mask = nn.Transformer.generate_square_subsequent_mask(5)
    # whether they are causal is said, as finding it out depends on data, where Dynamo gives up on torch's own frame
    inputs = (source, target, source_mask, target_mask, None, None, None, None, False, True)
    with torch.no_grad(), record() as compilations:
        assert_equals_model(compiled(model)(*inputs), model, *inputs)
    assert _layers_of(compilations) == names
    with torch.no_grad():
        condensed = fanin_compile.condense(model)
        assert_equals_model(condensed(*inputs), model, *inputs)
        graph = fanin_compile.condense(model, example_inputs=inputs)
        assert_equals_model(graph(*inputs), model, *inputs)
    report = fanin_compile.explain(condensed)
    assert {layer.name for layer in report.rewritten} == {
        n for n in names if n.split(".")[-1] in ("linear1", "linear2")
    }
    assert {layer.name for layer in fanin_compile.explain(graph).rewritten} >= names


def test_changing_sizes_recompile_a_whole_transformer_as_often_as_dynamo_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _without_inductor(monkeypatch)
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    names = _mask_all(model)
    sizes = ((2, 7, 5), (3, 7, 5), (5, 9, 6), (4, 11, 8))
    inputs = [(randn(batch, source, 32), randn(batch, target, 32, seed=1)) for batch, source, target in sizes]
    fast = compiled(model)
    with torch.no_grad(), record() as compilations:
        for pair in inputs:
            assert_equals_model(fast(*pair), model, *pair)
    assert 1 <= len(compilations) <= _graphs_of_dynamo(model, inputs)
    assert all(_layers_of([c]) == names for c in compilations)


@pytest.mark.parametrize("nested", [False, True])
def test_an_encoder_with_padding(nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    names = _mask_all(model)
    x, hidden = randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    hidden[0, 4:] = hidden[2, 1:] = True
    fast = compiled(model)
    condensed = fanin_compile.condense(model)
    with torch.no_grad(), record() as compilations:
        exact = copy.deepcopy(model).double()(x.double(), src_key_padding_mask=hidden)
        for f in (fast, condensed):
            y = f(x, src_key_padding_mask=hidden)
            # the nested fast path writes 0 where there is padding, other paths what they come to
            assert_close_at_scale(y[~hidden], exact[~hidden])
            assert y.shape == exact.shape
            assert_equals_model(f(x), model, x)
    for compilation in compilations:
        assert _layers_of([compilation]) == names


class _Rest(nn.Module):
    """A masked head behind layers that have no condensed form, their weights masked as well."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose1d(16, 16, 3, padding=1), nn.Linear(16, 64)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.around = nn.Conv1d(64, 8, 3, padding=1, padding_mode="circular")
        with torch.no_grad():
            self.up.weight.mul_(torch.rand(16, 16, 3) < 0.1)
            self.attend.in_proj_weight.mul_(torch.rand(48, 16) < 0.1)
            for layer in (self.attend.out_proj, self.head, self.around):
                prune.random_unstructured(layer, "weight", 0.9)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).transpose(1, 2)
        y: Tensor = self.around(self.head(self.attend(h, h, h, need_weights=False)[0]).transpose(1, 2))
        return y


def test_what_has_no_condensed_form_passes_through_and_is_named() -> None:
    torch.manual_seed(0)
    model, x = _Rest().eval(), randn(2, 16, 5)
    condensed = fanin_compile.condense(model)
    with torch.no_grad():
        assert_equals_model(compiled(model)(x), model, x)
        assert_equals_model(condensed(x), model, x)
    through_graphs = fanin_compile.explain(model, x, options={"cost_gate": False})
    (note,) = through_graphs.notes
    assert note.startswith("up: transposed convolutions stay dense (op aten.conv_transpose1d.default")
    # torch pads by itself before a convolution with padding_mode, which is an ordinary one in a graph
    layers = {"attend.in_proj_weight", "attend.out_proj", "head", "around"}
    assert {layer.name for layer in through_graphs.rewritten} == layers
    for report in (fanin_compile.explain(model), fanin_compile.explain(condensed)):
        assert {layer.name for layer in report.rewritten} == {"head"}
        reasons = {layer.name: layer.reason for layer in report.left}
        assert set(reasons) == layers - {"head"}
        for name in ("attend.in_proj_weight", "attend.out_proj"):
            assert reasons[name] == "nn.MultiheadAttention reads its weights past its layers"
        assert reasons["around"] == "only zero padding is supported (padding_mode circular)"
        (note,) = report.notes
        assert note.startswith("up: transposed convolutions stay dense (type ConvTranspose1d, sparsity ")


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_pass_through_and_are_named(kind: type[nn.LSTM | nn.GRU]) -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = kind(16, 32, batch_first=True), nn.Linear(32, 24)
            with torch.no_grad():
                weight = any_type(self.recurrent).weight_hh_l0
                weight.mul_(torch.rand(weight.shape) < 0.1)
                prune.random_unstructured(self.head, "weight", 0.9)

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.recurrent(x)[0]
            y: Tensor = self.head(hidden)
            return y

    model, x = Tagger().eval(), randn(2, 5, 16)
    condensed = fanin_compile.condense(model)
    with torch.no_grad():
        assert_equals_model(torch.compile(model, backend="fanin")(x), model, x)
        assert_equals_model(condensed(x), model, x)
    stays = "stays as it is, one operator of torch holds all its weights"
    notes = fanin_compile.explain(model, x).notes
    assert f"recurrent: {kind.__name__} {stays}" in notes, notes
    for report in (fanin_compile.explain(model), fanin_compile.explain(condensed)):
        assert {layer.name for layer in report.rewritten} == {"head"}
        (note,) = report.notes
        assert note.startswith(f"recurrent.weight_hh_l0: {stays} (type {kind.__name__}, sparsity ")


class _Tagger(nn.Module):
    """Dynamo skips its frame because of the recurrent layer, and captures those of the modules called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.mlp = nn.LSTM(16, 64, batch_first=True), MLP()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.recurrent(x)[0])
        return y


def test_layers_in_frames_of_submodules_have_their_names_in_the_model() -> None:
    model, x = nn.Sequential(_Tagger(), nn.Linear(10, 16), _Tagger()).eval(), randn(2, 5, 16)
    report = fanin_compile.explain(model, x, options={"cost_gate": False})
    layers = {layer.name: layer.became for layer in report.rewritten}
    assert layers == {  # two of one shape and one code, yet each is seen
        f"{tagger}.mlp.{layer}": became
        for tagger in (0, 2)
        for layer, became in (
            ("a", f"gather-matmul + relu, chained into {tagger}.mlp.b"),
            ("b", f"gather-matmul, chained onto {tagger}.mlp.a"),
        )
    }
    unseen = [note for note in report.notes if "is in no graph" in note]
    assert unseen == ["1: Linear is in no graph that Dynamo captured, or was not called"]


def test_dense_layers_without_condensed_form_are_not_mentioned() -> None:
    model = nn.ModuleList([nn.LSTM(4, 4), nn.ConvTranspose2d(2, 2, 3), nn.Linear(4, 4)])
    assert fanin_compile.explain(model).notes == ()
