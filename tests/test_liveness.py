"""Who is read for whom, on graphs a reader can check by eye."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from fanin_compile.evaluator import Evaluator
from fanin_compile.liveness import Neurons, live_neurons
from fanin_compile.passes.find_masked_layers import find_masked_layers
from tests.passes.support import calls, context, graph_of

aten = torch.ops.aten


def _reading(rows: list[list[int]], inputs: int) -> nn.Linear:
    """A masked layer whose neuron i reads the inputs rows[i]."""
    layer = nn.Linear(inputs, len(rows))
    with torch.no_grad():
        layer.weight.zero_()
        for i, columns in enumerate(rows):
            layer.weight[i, columns] = 1.0
    return layer


def _neurons(model: nn.Module, *inputs: Tensor) -> tuple[fx.GraphModule, Neurons]:
    gm = graph_of(model, *inputs)
    find_masked_layers(gm, context(gm))
    return gm, live_neurons(gm.graph, Evaluator(gm))


def _live(gm: fx.GraphModule, neurons: Neurons) -> list[list[int]]:
    """Of each linear, in order, the neurons that are kept."""
    layers = [neurons.labels.layers[node] for node in calls(gm, aten.linear.default)]
    return [neurons.live[layer.rows].nonzero().flatten().tolist() for layer in layers]


def test_what_only_the_dead_read_is_dead() -> None:
    model = nn.Sequential(
        _reading([[0], [1], [2], [3]], 4),
        nn.ReLU(),
        _reading([[0, 1], [1], [3]], 4),  # 2 is read by nobody, 3 by a neuron nobody reads
        nn.ReLU(),
        _reading([[0], [0, 1]], 3),
    )
    assert _live(*_neurons(model, torch.ones(2, 4))) == [[0, 1], [0, 1], [0, 1]]


class _Tied(nn.Module):
    """c(a + b), and d(b) beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _reading([[0], [1], [2]], 3), _reading([[2], [1], [0]], 3)
        self.c, self.d = _reading([[0]], 3), _reading([[1], []], 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b = self.b(x)
        return self.c(self.a(x) + b), self.d(b)


def test_a_sum_keeps_both_sides_of_what_anyone_reads() -> None:
    gm, neurons = _neurons(_Tied(), torch.ones(2, 3))
    b, a, *_ = _live(gm, neurons)
    assert (a, b) == ([0, 1], [0, 1])  # 0 for c; 1 of b for d, and of a with it


def test_what_is_seen_whole_says_by_whom() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = _reading([[0], []], 2), _reading([[0]], 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.a(x)
            return self.b(h), h.cumsum(-1)

    gm, neurons = _neurons(Model(), torch.ones(2, 2))
    first, second = calls(gm, aten.linear.default)
    assert _live(gm, neurons) == [[0, 1], [0]]
    labels = neurons.labels.layers[first].rows.tolist()
    assert {neurons.why[label] for label in labels} == {
        "linear is read whole by cumsum (aten.cumsum.default)"
    }
    assert not neurons.narrows(first)
    output = neurons.labels.layers[second].rows.tolist()
    assert [neurons.why[label] for label in output] == ["linear_1 is read whole by output (graph output)"]


def test_rows_of_heads_keep_as_many() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = _reading([[i] for i in range(6)], 6)
            self.b = _reading([[0, 1, 2, 4]], 6)  # all of the first head, one of the second

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(torch.unflatten(self.a(x), -1, (2, 3)).tanh().flatten(1))
            return y

    gm, neurons = _neurons(Model(), torch.ones(2, 6))
    assert _live(gm, neurons)[0] == [0, 1, 2, 3, 4, 5]
    (unflatten,) = calls(gm, aten.unflatten.int)
    kept = neurons.kept(unflatten)
    assert kept is not None
    assert bool(kept.data.all())
    assert set(neurons.why.values()) >= {"its tensors must stay rectangular"}
