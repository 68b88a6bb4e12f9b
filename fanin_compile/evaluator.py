"""Real values of the nodes of a graph that compute the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.node import map_arg

from fanin_compile.effects import is_pure, storage_roots, written_args
from fanin_compile.graph import attr_tensor

_READ = "fanin_read"  # of the graph module: what Evaluators read


class Evaluator:
    """Real values of the nodes which compute the same at every call: get_attr, and pure functions of such alone.

    A tensor that any node of the graph writes to is not constant, nor is what depends on it.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._written = storage_roots(*(arg for node in gm.graph.nodes for arg in written_args(node)))
        self._constant: dict[fx.Node, bool] = {}
        self._values: dict[fx.Node, Any] = {}

    def is_constant(self, node: object) -> bool:
        if not isinstance(node, fx.Node):
            return False
        if node not in self._constant:
            self._constant[node] = (node.op == "get_attr" and node not in self._written) or (
                node.op == "call_function"
                and is_pure(node.target)
                and bool(node.all_input_nodes)
                and all(self.is_constant(arg) for arg in node.all_input_nodes)
            )
        return self._constant[node]

    def __call__(self, node: object) -> Tensor | None:
        """The tensor a constant node computes, without grad, autocast and fake mode; None for anything else."""
        if not self.is_constant(node):
            return None
        assert isinstance(node, fx.Node)
        value = self._value(node)
        return value if isinstance(value, Tensor) else None

    def _value(self, node: fx.Node) -> Any:
        if node not in self._values:
            if node.op == "get_attr":
                self._gm.meta.setdefault(_READ, set()).add(str(node.target))
                self._values[node] = attr_tensor(self._gm, str(node.target))
            else:
                args, kwargs = map_arg((node.args, node.kwargs), self._value)
                assert callable(node.target)
                with torch.no_grad(), unset_fake_temporarily(), torch._C._DisableAutocast():
                    self._values[node] = node.target(*args, **kwargs)
        return self._values[node]


def take_read(gm: fx.GraphModule) -> frozenset[str]:
    """The get_attr targets whose values Evaluators of this graph have read until now; they are noted on it no more."""
    return frozenset(gm.meta.pop(_READ, ()))
