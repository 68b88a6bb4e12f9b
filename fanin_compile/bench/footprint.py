"""What a door costs besides the time of a call: seconds until the first output, bytes kept from then on."""

from __future__ import annotations

import time

import torch
from torch import Tensor, fx, nn

from fanin_compile.bench.contenders import Contender, condensed, condensed_graph, fanin, inductor
from fanin_compile.condense import condense
from fanin_compile.explain import explain
from fanin_compile.ops import scratch_nbytes
from fanin_compile.timing import threads

# in this order: the doors of torch.compile, then ours alone
FIRST_OUTPUT: dict[str, Contender] = {
    "fanin": fanin,
    "inductor": inductor,
    "condense(model)": condensed,
    "condense(model, example_inputs=...)": condensed_graph,
}


def first_output(model: nn.Module, x: Tensor, *, threads_used: int) -> dict[str, float]:
    """Seconds from the masked dense model to the first output of each way to run it; those that can't are left out.

    Dynamo and inductor start with nothing kept from earlier compilations. What a process does once is not in it: torch
    has been imported, our kernels are built and loaded, and the model has run before.
    """
    seconds = {}
    with threads(threads_used), torch.no_grad():
        model(x)
        for name, contender in FIRST_OUTPUT.items():
            taken = _seconds(contender, model, x)
            if taken is not None:
                seconds[name] = taken
    torch._dynamo.reset()
    return seconds


def _seconds(contender: Contender, model: nn.Module, x: Tensor) -> float | None:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        start = time.perf_counter()
        run = contender(model, x)
        if run is None:
            return None
        run()
        return time.perf_counter() - start


def resident(model: nn.Module, x: Tensor, *, threads_used: int) -> str:
    """What each door keeps in memory: tensors of the condensed models, weights dense and packed under the backend."""
    with threads(threads_used), torch.no_grad():
        swapped, graph = condense(model), condense(model, example_inputs=(x,))
        swapped(x)
        packed = sum(layer.bytes_after for layer in explain(model, x).layers if layer.rewritten)
    dense = state_nbytes(model)
    kept = {"condense(model)": state_nbytes(swapped)}
    if isinstance(graph, fx.GraphModule):
        kept["condense(model, example_inputs=...)"] = state_nbytes(graph)
    kept["torch.compile, the model's own and packed weights"] = dense + packed
    doors = ", ".join(f"{door} {nbytes / 1e6:.1f} ({nbytes / dense:.0%})" for door, nbytes in kept.items())
    scratch = scratch_nbytes() / 1e6
    return f"resident, MB of the dense {dense / 1e6:.1f}: {doors}; scratch of a thread up to {scratch:.2f} MB"


def state_nbytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a state dict; tensors of one storage count once."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())
