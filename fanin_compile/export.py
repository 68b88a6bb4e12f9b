"""The graph door of condense(): export a whole model, run every pass on it, return it as a GraphModule.

Where the swap of single layers leaves the model's own code alone, this sees across layers: batch norms are folded,
ablated neurons removed, activations fused. The price is a captured graph: control flow on data cannot be exported.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from fanin_compile.mask import MaskedWeight, masked_weights
from fanin_compile.masking import imposed
from fanin_compile.passes import PIPELINE
from fanin_compile.pipeline import Context, Gate, PipelineResult, run_pipeline

# graph_module.meta keys, for reports
RESULT = "fanin_result"  # the PipelineResult
MODEL = "fanin_model"  # the name of the model's class
UNSUPPORTED = "fanin_unsupported"  # the Skips of its sparse weights that have no condensed form


def export_condensed(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    masks: Mapping[str, Tensor] | None,
    gate: Gate,
    values_dtype: torch.dtype | None,
    progress: bool = False,
) -> fx.GraphModule:
    """Capture `model` in eval mode and run the pipeline; sizes of inputs stay free where the model lets them.

    Raises: whatever torch.export raises on a model it cannot capture; RewriteError from a pass.
    """
    found = list(masked_weights(model, masks))
    given = [(module, weight) for _, module, weight in found if weight.source == "user"]
    # in the weights themselves, so that what no pass takes has the caller's mask as well
    with imposed(given), _eval_mode(model), _every_layer_visible():
        dynamic = tuple(pytree.tree_map(_free_sizes, value) for value in example_inputs)
        program = torch.export.export(model, example_inputs, dynamic_shapes=dynamic, strict=False)
        captured = program.module(check_guards=False)
        names, known = _names_and_masks(model, found)
    assert isinstance(captured, fx.GraphModule)
    _drop_asserts(captured)
    ctx = Context(gate, known, names, values_dtype, masks_decide=True)
    with torch.no_grad():
        passes = track(PIPELINE, "condensing") if progress else PIPELINE
        result = run_pipeline(captured, passes, ctx)
    # the last copy owns only the tensors it reads
    condensed = fx.GraphModule(result.graph_module, result.graph_module.graph)
    condensed = copy.deepcopy(condensed)  # what is dense still belongs to the model
    condensed.meta[MODEL] = type(model).__name__
    condensed.meta[RESULT] = PipelineResult(condensed, result.results, result.seconds)
    return condensed.eval()


def _names_and_masks(
    model: nn.Module, found: Sequence[tuple[str, nn.Module, MaskedWeight]]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The layer of every tensor a weight is made of, and the masks beyond the graph, by get_attr target."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)  # export takes the last name of a shared module
    names: dict[str, str] = {}
    known: dict[str, Tensor] = {}
    for first, module, weight in found:
        name = weight.name
        layer = first if name == "weight" else f"{first}.{name}".removeprefix(".")
        parts = [name, f"{name}_orig", f"{name}_mask"]
        if parametrize.is_parametrized(module, name):
            chain: Any = module.parametrizations[name]  # type: ignore[index]
            keys = [key for key, _ in (*chain.named_parameters(), *chain.named_buffers())]
            parts += [f"parametrizations.{name}.{key}" for key in keys]
        for path in paths[module]:
            at = f"{path}." if path else ""
            names |= {f"{at}{part}": layer for part in parts}
            if weight.source in ("buffer", "module", "user"):
                known[f"{at}{name}"] = known[f"{at}{name}_orig"] = weight.mask
    tied: dict[int, list[str]] = {}
    for target, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(target)
    for targets in tied.values():  # export takes the last name of a tied weight, maybe that of an embedding
        layer_name = next((names[target] for target in targets if target in names), None)
        if layer_name is not None:
            names |= {target: layer_name for target in targets if target not in names}
    return names, known


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
