"""Decoding token by token through the backend: caches that grow, equal to the dense model in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from fanin_compile.backend import Compilation, record
from fanin_compile.bench.masking import mask_constant_fan_in
from fanin_compile.options import Options
from tests.compile_support import any_type, compiled
from tests.helpers import assert_close_at_scale

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("dynamo")

TOKENS = 5  # decoded one by one after a prompt


def _model(name: str) -> nn.Module:
    """Small, masked, with one head of keys for two of queries in Llama."""
    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=99, **sizes))
    else:
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes, **heads))
    mask_constant_fan_in(model, 0.9)
    model.eval().requires_grad_(False)
    return any_type(model)  # type: ignore[no-any-return]


def _decode(model: nn.Module, step: Any, *, padded: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The logits of tokens decoded by `step` after a prompt that `model` reads, and the cache at the end."""
    ids = torch.randint(2, 99, (2, 6 + TOKENS), generator=torch.Generator().manual_seed(1))
    seen = torch.ones_like(ids)
    seen[1, :3] = 0
    cache, logits = transformers.DynamicCache(), []

    def call(module: Any, first: int, last: int) -> Tensor:
        mask = {"attention_mask": seen[:, :last]} if padded else {}
        output = module(input_ids=ids[:, first:last], past_key_values=cache, use_cache=True, **mask)
        return output.logits  # type: ignore[no-any-return]

    with torch.no_grad():
        call(model, 0, 6)
        logits = [call(step, i, i + 1) for i in range(6, 6 + TOKENS)]
    return logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_made_for_all_tokens_is_written_in_place(name: str) -> None:
    """transformers' StaticCache, prompt and steps both compiled, the prompt of the second image padded."""
    model = _model(name)
    ids = torch.randint(2, 99, (2, 9 + TOKENS), generator=torch.Generator().manual_seed(1))

    def decode(step: Any, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        seen = torch.ones(2, 40, dtype=torch.long)
        seen[1, :3] = 0
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        heads = getattr(model.config, "num_key_value_heads", 4)
        cache.early_initialization(2, heads, 16, dtype, torch.device("cpu"))
        with torch.no_grad():
            logits = [
                step(input_ids=part, past_key_values=cache, use_cache=True, attention_mask=seen).logits
                for part in ids.split([9, *(1 for _ in range(TOKENS))], 1)
            ]
        return logits, [t for layer in cache.layers for t in (layer.keys, layer.values)]

    with record() as compilations:
        found = decode(compiled(model), torch.float32)
    assert_close_at_scale(found, decode(copy.deepcopy(model).double(), torch.float64))
    details = [_lowered(c, "cache-attention") for c in compilations]
    assert details == [
        [],
        2 * ["keys of a cache where they are, hidden ones unread"],
    ]  # the prompt's, the steps'


def _lowered(compilation: Compilation, became: str = "append-attention") -> list[str]:
    assert compilation.result is not None, compilation.untouched
    return [r.detail for r in compilation.result.rewritten if r.became == became]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoding_loop(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if (name, padded) != ("gpt2", False):  # inductor's part is the same for all
        monkeypatch.setattr(Options, "finish", lambda self, gm, inputs, **patches: gm.forward)
    model = _model(name)
    with record() as compilations:
        found = _decode(model, compiled(model), padded=padded)
    assert_close_at_scale(found, _decode(exact := copy.deepcopy(model).double(), exact, padded=padded))
    details = {"past and new keys where they are, appended in passing"}
    assert [set(_lowered(c)) for c in compilations] == [details] * len(compilations)
    assert [len(_lowered(c)) for c in compilations] == [2] * len(compilations)
    # of a fixed length and of any, twice with a mask: as often as torch compiles by itself
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    _decode(model, torch.compile(model, backend=counter), padded=padded)
    assert len(compilations) == counter.frame_count <= 2 + padded
