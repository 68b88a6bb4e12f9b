"""Whole models from transformers configurations, no downloads: full size to benchmark, small to test."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile.bench.masking import scale_weights
from fanin_compile.errors import FaninError, OptionError


class MissingPackageError(FaninError, ImportError):
    """A package a benchmark needs is not installed; the message names it."""


@dataclass(frozen=True)
class ModelCase:
    """A model in eval mode and the keyword arguments of one call."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    output: str | None  # the field of the model's output to compare; None: the output is a tensor
    keeps_cache: bool = False  # the next call would read the keys and values of this one

    def tensor(self, output: Any) -> Tensor:
        value = output if self.output is None else getattr(output, self.output)
        assert isinstance(value, Tensor)
        return value

    def result(self, output: Any) -> Tensor | tuple[Tensor, ...]:
        """The tensor to compare, with the cache behind it where it is kept."""
        if not self.keeps_cache:
            return self.tensor(output)
        layers = output.past_key_values.layers
        return (self.tensor(output), *(t for layer in layers for t in (layer.keys, layer.values)))


def compared(result: object) -> Tensor:
    """The tensor to compare in what OneInput returns."""
    tensor = result[0] if isinstance(result, tuple | list) else result
    assert isinstance(tensor, Tensor)
    return tensor


class OneInput(nn.Module):
    """A case as a function of its first input alone, returning the case's result()."""

    def __init__(self, case: ModelCase) -> None:
        super().__init__()
        self.model = case.model
        self._case = case
        self._key, *others = case.inputs
        self._others = {key: case.inputs[key] for key in others}

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._case.result(self.model(**{self._key: x}, **self._others))


Maker = Callable[[Any, bool, int], ModelCase]  # (transformers, small, batch)
MAKERS: dict[str, Maker] = {}


def _maker(name: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        MAKERS[name] = make
        return make

    return register


def make_model(name: str, *, small: bool = False, batch: int = 1, seed: int = 0) -> ModelCase:
    """Build a model by name with random weights, strong enough for every layer to show in the output.

    Raises: OptionError for an unknown name, MissingPackageError without transformers.
    """
    if name not in MAKERS:
        raise OptionError(f"unknown model {name!r}, expected one of {', '.join(sorted(MAKERS))}")
    try:
        import transformers
    except ImportError:
        raise MissingPackageError("whole models come from transformers: pip install transformers") from None
    torch.manual_seed(seed)
    case = MAKERS[name](transformers, small, batch)
    case.model.eval().requires_grad_(False)
    scale_weights(case.model)
    if name == "t5":  # attention in T5 divides by nothing, its queries are that much smaller
        model: Any = case.model
        for path, parameter in model.named_parameters():
            if path.endswith("Attention.q.weight"):
                parameter.div_(model.config.d_kv**0.5)
    return case


@_maker("bert")
def _bert(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = t.BertConfig(**(sizes | {"vocab_size": 99} if small else {}))
    ids = torch.randint(0, config.vocab_size, (batch, 9 if small else 128))
    return ModelCase("bert", t.BertModel(config), {"input_ids": ids}, "last_hidden_state")


@_maker("roberta")
def _roberta(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = t.RobertaConfig(**(sizes | {"vocab_size": 99} if small else {}))
    ids = torch.randint(3, config.vocab_size, (batch, 9 if small else 128))
    return ModelCase("roberta", t.RobertaModel(config), {"input_ids": ids}, "last_hidden_state")


@_maker("distilbert")
def _distilbert(t: Any, small: bool, batch: int) -> ModelCase:
    config = t.DistilBertConfig(
        **({"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "vocab_size": 99} if small else {})
    )
    ids = torch.randint(0, config.vocab_size, (batch, 9 if small else 128))
    return ModelCase("distilbert", t.DistilBertModel(config), {"input_ids": ids}, "last_hidden_state")


def _gpt2_config(t: Any, small: bool) -> Any:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 1}
    return t.GPT2Config(**(sizes if small else {}))


@_maker("gpt2")
def _gpt2(t: Any, small: bool, batch: int) -> ModelCase:
    config = _gpt2_config(t, small)
    ids = torch.randint(0, config.vocab_size, (batch, 9 if small else 128))
    return ModelCase("gpt2", t.GPT2LMHeadModel(config), {"input_ids": ids, "use_cache": False}, "logits")


class OneTokenDecode(nn.Module):
    """GPT-2's step for one new token, the keys and values of the tokens before it being part of the state."""

    def __init__(
        self, model: nn.Module, past: list[tuple[Tensor, Tensor]], cache_class: Any, layer_class: Any
    ) -> None:
        super().__init__()
        self.model = model
        self._past, self._cache_class, self._layer_class = past, cache_class, layer_class

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._past = [(fn(keys), fn(values)) for keys, values in self._past]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, input_ids: Tensor) -> Any:
        cache = self._cache_class()
        for keys, values in self._past:
            layer = self._layer_class()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values  # as the step before left them; an update would copy them
            cache.layers.append(layer)
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)


class StaticDecode(nn.Module):
    """A step for one new token on a cache made for `length` tokens, which it writes in place; always the same step."""

    position: Tensor

    def __init__(
        self,
        model: nn.Module,
        past: list[tuple[Tensor, Tensor]],
        length: int,
        cache_class: Any,
        layer_class: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self._length, self._cache_class, self._layer_class = length, cache_class, layer_class
        self.register_buffer("position", torch.tensor(past[0][0].shape[2]))
        for i, parts in enumerate(past):
            for name, part in zip(("keys", "values"), parts, strict=True):
                b, heads, tokens, size = part.shape
                whole = torch.cat([part, torch.zeros(b, heads, length - tokens, size)], 2)
                self.register_buffer(f"{name}{i}", whole)
        self._layers = len(past)

    def forward(self, input_ids: Tensor) -> Any:
        layers = []
        for i in range(self._layers):
            layer = self._layer_class(max_cache_len=self._length)
            # detached: where gradients are wanted, the buffers themselves take no part in their graph
            layer.keys, layer.values = (
                getattr(self, f"keys{i}").detach(),
                getattr(self, f"values{i}").detach(),
            )
            layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
            layer.cumulative_length, layer.is_initialized = self.position.clone(), True
            layers.append(layer)
        return self.model(
            input_ids=input_ids, past_key_values=self._cache_class(layers=layers), use_cache=True
        )


def _decode(t: Any, small: bool, batch: int, *, head: bool, static: bool = False) -> ModelCase:
    """One token after 7 or 127 others, on a cache that is appended, or a static one made for twice as many."""
    config = _gpt2_config(t, small)
    model = (t.GPT2LMHeadModel if head else t.GPT2Model)(config).eval()
    tokens = 7 if small else 127
    shape = (batch, config.n_head, tokens, config.n_embd // config.n_head)
    past = [(torch.randn(shape), torch.randn(shape)) for _ in range(config.n_layer)]
    ids = torch.randint(0, config.vocab_size, (batch, 1))
    decode: nn.Module
    if static:
        decode = StaticDecode(model, past, 2 * (tokens + 1), t.Cache, t.StaticLayer)
    else:
        decode = OneTokenDecode(model, past, t.DynamicCache, t.DynamicLayer)
    output = "logits" if head else "last_hidden_state"
    return ModelCase("gpt2-decode", decode, {"input_ids": ids}, output, keeps_cache=not static)


@_maker("gpt2-decode")
def _gpt2_decode(t: Any, small: bool, batch: int) -> ModelCase:
    return _decode(t, small, batch, head=True)


@_maker("gpt2-decode-blocks")
def _gpt2_decode_blocks(t: Any, small: bool, batch: int) -> ModelCase:
    """Without the dense 154 MB head, which bounds the whole at one token."""
    return _decode(t, small, batch, head=False)


@_maker("gpt2-static-decode")
def _gpt2_static_decode(t: Any, small: bool, batch: int) -> ModelCase:
    return _decode(t, small, batch, head=True, static=True)


@_maker("gpt2-static-decode-blocks")
def _gpt2_static_decode_blocks(t: Any, small: bool, batch: int) -> ModelCase:
    """Without the dense head, as gpt2-decode-blocks."""
    return _decode(t, small, batch, head=False, static=True)


@_maker("llama")
def _llama(t: Any, small: bool, batch: int) -> ModelCase:
    width = (
        {"hidden_size": 64, "intermediate_size": 160}
        if small
        else {"hidden_size": 1024, "intermediate_size": 2816}
    )
    depth = {"num_hidden_layers": 2 if small else 8, "num_attention_heads": 4 if small else 16}
    config = t.LlamaConfig(
        **width, **depth, num_key_value_heads=2 if small else 8, vocab_size=99 if small else 8000
    )
    ids = torch.randint(3, config.vocab_size, (batch, 9 if small else 128))
    return ModelCase("llama", t.LlamaForCausalLM(config), {"input_ids": ids, "use_cache": False}, "logits")


@_maker("t5")
def _t5(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
    config = t.T5Config(**(sizes if small else {}))
    ids = torch.randint(2, config.vocab_size, (batch, 9 if small else 128))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5], "use_cache": False}
    return ModelCase("t5", t.T5ForConditionalGeneration(config), inputs, "logits")


def _vision(t: Any, kind: str, small: bool, batch: int) -> ModelCase:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    config = getattr(t, f"{kind}Config")(**(sizes | {"image_size": 32, "patch_size": 8} if small else {}))
    model = getattr(t, f"{kind}ForImageClassification")(config)
    pixels = torch.randn(batch, 3, config.image_size, config.image_size)
    return ModelCase(kind.lower(), model, {"pixel_values": pixels}, "logits")


@_maker("vit")
def _vit(t: Any, small: bool, batch: int) -> ModelCase:
    return _vision(t, "ViT", small, batch)


@_maker("deit")
def _deit(t: Any, small: bool, batch: int) -> ModelCase:
    return _vision(t, "DeiT", small, batch)


@_maker("convnext")
def _convnext(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    # fresh layer scales of 1e-6 would leave the identity of every block
    config = t.ConvNextConfig(layer_scale_init_value=1.0, **(sizes if small else {}))
    pixels = torch.randn(batch, 3, *((64, 64) if small else (224, 224)))
    return ModelCase("convnext", t.ConvNextForImageClassification(config), {"pixel_values": pixels}, "logits")


@_maker("resnet50")
def _resnet(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    config = t.ResNetConfig(**(sizes if small else {}))
    pixels = torch.randn(batch, 3, *((64, 64) if small else (224, 224)))
    case = ModelCase("resnet50", t.ResNetForImageClassification(config), {"pixel_values": pixels}, "logits")
    return _with_statistics(case)


@_maker("mobilenet_v2")
def _mobilenet(t: Any, small: bool, batch: int) -> ModelCase:
    config = t.MobileNetV2Config(**({"image_size": 64, "depth_multiplier": 0.5} if small else {}))
    pixels = torch.randn(batch, 3, config.image_size, config.image_size)
    case = ModelCase(
        "mobilenet_v2", t.MobileNetV2ForImageClassification(config), {"pixel_values": pixels}, "logits"
    )
    return _with_statistics(case)


def _with_statistics(case: ModelCase) -> ModelCase:
    """Batch norms as after training: fresh ones are the identity, which folding could get wrong unseen."""
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0.0, 0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return case


@_maker("whisper-encoder")
def _whisper(t: Any, small: bool, batch: int) -> ModelCase:
    sizes = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    sizes |= {
        "decoder_layers": 1,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 128,
        "max_source_positions": 50,
    }
    tokens = {
        "vocab_size": 99,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }
    config = t.WhisperConfig(**(sizes | tokens if small else {}))
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions)
    encoder = t.WhisperModel(config).encoder
    return ModelCase("whisper-encoder", encoder, {"input_features": features}, "last_hidden_state")


@_maker("mlp")
def _mlp(t: Any, small: bool, batch: int) -> ModelCase:
    width = 96 if small else 3072
    layers: dict[str, nn.Module] = {"hidden1": nn.Linear(784, width), "relu1": nn.ReLU()}
    layers |= {"hidden2": nn.Linear(width, width), "relu2": nn.ReLU(), "output": nn.Linear(width, 10)}
    model = nn.Sequential(OrderedDict(layers))
    return ModelCase("mlp", model, {"input": torch.randn(batch, 784)}, None)
