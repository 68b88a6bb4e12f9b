"""Graphs in the passes' dialect, and passes run on them one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fanin_compile.export import RESULT, _drop_asserts
from fanin_compile.graph import tensor_meta
from fanin_compile.passes import PIPELINE
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.pipeline import Context, Pass, PassResult, PipelineResult


def graph_of(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """`model` in eval mode as pre-dispatch ATen, its parameters behind get_attr nodes."""
    with torch.no_grad():
        gm = torch.export.export(model.eval(), inputs, strict=False).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    _drop_asserts(gm)
    return gm


def context(gm: fx.GraphModule, **kwargs: object) -> Context:
    """Every layer gains; names are those of the modules."""
    names = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        path, _, name = str(node.target).rpartition(".")
        names[str(node.target)] = path if name == "weight" else str(node.target)
    return Context(**{"gate": lambda layer: None, "names": names} | kwargs)  # type: ignore[arg-type]


def _largest(outputs: object) -> float:
    """Of the finite elements of all tensors, in absolute value; 0 if there is none."""
    tensors = [
        t.detach() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return max((float(t[t.isfinite()].abs().max()) for t in tensors if bool(t.isfinite().any())), default=0.0)


def run(
    gm: fx.GraphModule, *passes: Pass, ctx: Context | None = None, inputs: tuple[Tensor, ...]
) -> PassResult:
    """Find the masked layers, run `passes`, and return the result of the last.

    After each the graph is valid, every value is described, and computes what it did before.
    """
    ctx = ctx or context(gm)
    with torch.no_grad():
        expected = gm(*inputs)
        actual, result = expected, PassResult()
        for run_pass in (find_masked_layers, *passes):
            result = run_pass(gm, ctx)
            gm.graph.eliminate_dead_code()
            gm.graph.lint()
            gm.recompile()
            actual = gm(*inputs)
            # an element that cancels is rounded as those are which it was made of
            atol = max(1e-5, 1e-6 * _largest(expected))
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=atol)
            for node in gm.graph.nodes:
                if node.op == "call_function":
                    assert "val" in node.meta, (
                        f"{run_pass.__name__} left {node} without its value's description"
                    )
        for node, value in zip(_outputs(gm), _leaves(actual), strict=True):
            meta = tensor_meta(node)
            assert meta is not None
            assert tuple(meta.shape) == tuple(value.shape)
    return result


def _outputs(gm: fx.GraphModule) -> list[fx.Node]:
    (output,) = gm.graph.find_nodes(op="output")
    return [node for node in pytree.tree_leaves(output.args) if isinstance(node, fx.Node)]


def _leaves(value: object) -> list[Tensor]:
    return list(pytree.tree_leaves(value))


def narrowed(done: nn.Module | PipelineResult | None) -> dict[str, str]:
    """Layer -> how many of its neurons were kept, of those which lost some; of a condensed model or a compilation."""
    result = done.meta[RESULT] if isinstance(done, fx.GraphModule) else done
    assert isinstance(result, PipelineResult)
    return {r.layer: r.detail for r in result.rewritten if r.became == "narrowed"}


def calls(gm: fx.GraphModule, target: Callable[..., object]) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def position(run_pass: Pass) -> int:
    return PIPELINE.index(run_pass)
