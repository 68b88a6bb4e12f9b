"""Generate text token by token: a masked GPT-2 on a cache that is made once and written in place.

    pip install transformers
    python examples/decode_static_cache.py

The weights are random and so is the text; sizes, masks and times are those of a GPT-2 small at 90 %.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

import fanin_compile
from fanin_compile.train import prune_to_fan_in

BATCH, PROMPT, TOKENS = 4, 64, 32

torch.set_num_threads(1)
torch.manual_seed(0)
config = transformers.GPT2Config(n_layer=4, vocab_size=5000, bos_token_id=0, eos_token_id=0)
model: Any = transformers.GPT2LMHeadModel(config)
model.eval()
prune_to_fan_in(model.transformer, sparsity=0.9)  # the head stays dense
prompt = torch.randint(0, 5000, (BATCH, PROMPT))


def generate(step: Callable[..., Any]) -> tuple[Tensor, float]:
    """Greedily; `step` is the model, compiled or not. Returns the tokens and the median milliseconds a step."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=1024)
    with torch.no_grad():
        logits = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:]
        tokens, times = [], []
        for _ in range(TOKENS):
            tokens.append(logits.argmax(-1))
            start = time.perf_counter()
            logits = step(tokens[-1], past_key_values=cache, use_cache=True).logits
            times.append(time.perf_counter() - start)
    return torch.cat(tokens, 1), 1e3 * sorted(times)[TOKENS // 2]


expected, eager = generate(model)
dense_tokens, dense = generate(torch.compile(model))  # inductor
torch.compiler.reset()
ours_tokens, ours = generate(torch.compile(model, backend="fanin"))
print(f"a step of {BATCH} tokens: eager {eager:.1f} ms, inductor {dense:.1f} ms, fanin {ours:.1f} ms")
print(f"the same tokens: {torch.equal(expected, dense_tokens)}, {torch.equal(expected, ours_tokens)}")

cache = transformers.StaticCache(config=model.config, max_cache_len=1024)
with torch.no_grad():
    model(prompt, past_key_values=cache, use_cache=True)
    print(fanin_compile.explain(model, expected[:, :1], past_key_values=cache, use_cache=True))
