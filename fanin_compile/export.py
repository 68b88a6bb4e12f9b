"""The graph door of condense(): export a whole model, run every pass on it, return it as a GraphModule.

Where the swap of single layers leaves the model's own code alone, this sees across layers: batch norms are folded,
ablated neurons removed, activations fused. The price is a captured graph: control flow on data cannot be exported.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from fanin_compile.graph import Context, Gate, PipelineResult, run_pipeline
from fanin_compile.mask import masked_weights
from fanin_compile.passes import PIPELINE

# graph_module.meta keys, for reports
RESULT = "fanin_result"  # the PipelineResult
MODEL = "fanin_model"  # the name of the model's class


def export_condensed(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    masks: Mapping[str, Tensor] | None,
    gate: Gate,
    values_dtype: torch.dtype | None,
) -> fx.GraphModule:
    """Capture `model` in eval mode and run the pipeline; sizes of inputs stay free where the model lets them.

    Raises: whatever torch.export raises on a model it cannot capture; RewriteError from a pass.
    """
    with _eval_mode(model), _every_layer_visible():
        dynamic = tuple(pytree.tree_map(_free_sizes, value) for value in example_inputs)
        program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic, strict=False)
        captured = program.module(check_guards=False)
    assert isinstance(captured, fx.GraphModule)
    _drop_asserts(captured)
    names, known = {}, {}
    for path, _, found in masked_weights(model, masks):
        target = f"{path}.{found.name}" if path else found.name
        for attribute in (target, f"{target}_orig", f"{target}_mask"):
            names[attribute] = path if found.name == "weight" else target
        if found.source in ("buffer", "module", "user"):
            known[target] = known[f"{target}_orig"] = found.mask
    ctx = Context(gate, known, names, values_dtype, masks_decide=True)
    with torch.no_grad():
        result = run_pipeline(captured, PIPELINE, ctx)
    # the last copy owns only the tensors it reads
    condensed = fx.GraphModule(result.graph_module, result.graph_module.graph)
    condensed = copy.deepcopy(condensed)  # what is dense still belongs to the model
    condensed.meta[MODEL] = type(model).__name__
    condensed.meta[RESULT] = PipelineResult(condensed, result.results, result.seconds)
    return condensed.eval()


def _free_sizes(value: object) -> dict[int, Any] | None:
    return dict.fromkeys(range(value.ndim), Dim.AUTO) if isinstance(value, Tensor) else None


def _drop_asserts(gm: fx.GraphModule) -> None:
    """Export's metadata checks of parameters: they hold, and would keep dense weights alive."""
    for node in list(
        gm.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default)
    ):
        gm.graph.erase_node(node)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def _every_layer_visible() -> Iterator[None]:
    """Without the fused attention paths, and silent about the weight which pruning hooks set in every forward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The tensor attribute.* assigned during export")
            warnings.filterwarnings("ignore", message="A model attribute .* requires gradient")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
