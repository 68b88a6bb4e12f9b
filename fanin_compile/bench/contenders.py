"""Who runs in a benchmark: ours through all doors, dense torch in its best forms, sparse peers where installed.

A contender makes a callable of (model, input) or returns None where it cannot take part. All hold the same weights.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from fanin_compile import mask
from fanin_compile.bench.onemkl import onemkl
from fanin_compile.condense import condense

Run = Callable[[], object]
Contender = Callable[[nn.Module, Tensor], Run | None]

DENSE = ("eager", "inductor", "inductor max-autotune, frozen")


def fanin(model: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(model, backend="fanin", dynamic=False, options={"strict": True})
    return lambda: compiled(x)


def fanin_frozen(model: nn.Module, x: Tensor) -> Run:
    """Ours with what the best dense has for the rest: layers that stay dense packed by freezing and tuned."""
    options: dict[str, Any] = {"strict": True, "inductor": {"max_autotune": True}}
    return _compiled_frozen(torch.compile(model, backend="fanin", dynamic=False, options=options), x)


def condensed(model: nn.Module, x: Tensor) -> Run:
    swapped = condense(model)
    return lambda: swapped(x)


def condensed_graph(model: nn.Module, x: Tensor) -> Run | None:
    """The whole model condensed by way of torch.export, run eagerly: no Dynamo around a call, no inductor in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own copying of a graph
        swapped = condense(model, example_inputs=(x,))
    return (lambda: swapped(x)) if isinstance(swapped, fx.GraphModule) else None


def eager(model: nn.Module, x: Tensor) -> Run:
    return lambda: model(x)


def inductor(model: nn.Module, x: Tensor) -> Run:
    compiled = torch.compile(model, dynamic=False)
    return lambda: compiled(x)


def inductor_frozen(model: nn.Module, x: Tensor) -> Run:
    """Inductor's best on constant weights: packed by freezing, tuned by max-autotune."""
    return _compiled_frozen(torch.compile(model, dynamic=False, mode="max-autotune-no-cudagraphs"), x)


def frozen(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Compiled with its weights packed by freezing, for the memory format of x: oneDNN's convolutions at their best."""
    return _compiled_frozen(torch.compile(model, dynamic=False), x, layout_optimization=not x.is_contiguous())


def _compiled_frozen(compiled: Callable[[Tensor], Any], x: Tensor, **patches: Any) -> Callable[[], Any]:
    from torch._inductor import config

    with config.patch(freezing=True, **patches), torch.no_grad():  # read when the first call compiles
        compiled(x)
    return lambda: compiled(x)


def csr(model: nn.Module, x: Tensor) -> Run | None:
    """torch.sparse CSR through F.linear, layer by layer."""
    if not isinstance(model, nn.Linear):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR support is announced as beta at every first use
        weight = model.weight.detach().to_sparse_csr()
    bias = model.bias
    return lambda: nn.functional.linear(x, weight, bias)


def gather_tensor_ops(model: nn.Module, x: Tensor) -> Run | None:
    """The condensed form in plain tensor operations, as the paper's CPU code has it, compiled by inductor."""
    if not isinstance(model, nn.Linear):
        return None
    active = mask.find_masked_weight(model)
    assert active is not None
    k = int(active.mask[0].sum())
    columns = active.mask.nonzero()[:, 1].view(-1, k)
    values, bias = active.weight.gather(1, columns), model.bias

    def run(x: Tensor) -> Tensor:
        return (x[:, columns] * values).sum(-1) + bias

    if x.shape[0] * columns.numel() > 1 << 27:
        return None  # [batch, out, k] would take more than half a GiB
    compiled = torch.compile(run, dynamic=False)
    return lambda: compiled(x)


def onnxruntime(model: nn.Module, x: Tensor) -> Run | None:
    """Dense through ONNX Runtime, if it and the exporter's onnx are installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnx", "onnxscript")):
        return None
    import onnxruntime as ort

    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        program.save(f"{folder}/model.onnx")
        session = ort.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor) -> Run | None:
    """Dense through OpenVINO, if it is installed."""
    if importlib.util.find_spec("openvino") is None:
        return None
    import openvino as ov

    core = ov.Core()
    core.set_property(
        "CPU", {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    )
    compiled = core.compile_model(ov.convert_model(model, example_input=x), "CPU")
    request, array = compiled.create_infer_request(), x.numpy()
    return lambda: torch.from_numpy(request.infer(array)[0])


CONTENDERS: dict[str, Contender] = {
    "fanin": fanin,
    "fanin max-autotune, frozen": fanin_frozen,
    "condensed module": condensed,
    "condensed graph": condensed_graph,
    "eager": eager,
    "inductor": inductor,
    "inductor max-autotune, frozen": inductor_frozen,
    "csr": csr,
    "gather by tensor ops": gather_tensor_ops,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "oneMKL sparse": onemkl,
}
QUICK = ("fanin", "condensed module", "eager")
