"""Small models and the one assertion of sparse training that states its whole claim."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fanin_compile.train import SRigL
from fanin_compile.train.base import SparseTraining
from fanin_compile.train.layers import SparseLayer


def mlp(*widths: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Linear layers of these widths with a ReLU between them."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for before, after in pairwise(widths):
        parts += [nn.Linear(before, after, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class ConvNet(nn.Module):
    """Every kind of convolution, groups included, on inputs [B, 4, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.conv1 = nn.Conv1d(12, 6, 5, padding=2)
        self.conv3 = nn.Conv3d(1, 4, (2, 3, 3))
        self.head = nn.Linear(4 * 5 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.conv2(x).relu()).relu()
        x = self.conv1(x.flatten(2)).relu().unflatten(2, (6, 6))
        y: Tensor = self.head(self.conv3(x[:, None]).relu().flatten(1))
        return y


def batch(model: nn.Module, step: int, size: int = 8) -> Tensor:
    """Inputs of step ``step`` for a model that starts with a Linear."""
    first = next(p for p in model.parameters() if p.dim() == 2)
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, first.shape[1], generator=generator, dtype=torch.float64).to(first.dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return (y - x.sum(dim=-1, keepdim=True).sin()).square().mean()


def train(model: nn.Module, optimizer: Optimizer, sparse: SparseTraining, steps: int) -> None:
    """``steps`` optimizer steps, each on its own batch, from the step that ``sparse`` stands at."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(model, sparse.steps)).backward()
        optimizer.step()
        sparse.step()


def srigl(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any) -> SRigL:
    """SRigL with an update every other step, so that short trainings have many."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return SRigL(model, optimizer, **({"total_steps": 40, "delta_t": 2, "sparsity": 0.75} | options))


def weight_and_mask(module: nn.Module, name: str = "weight") -> tuple[Tensor, Tensor]:
    """A Parameter and the buffer that is its mask."""
    return module.get_parameter(name), module.get_buffer(f"{name}_mask")


def fan_ins(layer: SparseLayer) -> list[int]:
    """Active inputs of each neuron."""
    counts: list[int] = layer.rows(layer.mask).sum(dim=1).tolist()
    return counts


def assert_agreement(sparse: SparseTraining) -> None:
    """Weight, gradient and optimizer state are as at the start off every mask, which is 0 but for Rprop's step
    sizes and the eps that Adamax puts under its maximum; no block is over its budget."""
    defaults = sparse.optimizer.defaults
    highest = {"step_size": defaults["lr"], "exp_inf": defaults.get("eps", 0.0)}
    lowest = {"step_size": defaults["lr"]}
    for layer in sparse.layers:
        off = ~layer.mask
        assert not layer.param[off].any(), f"{layer.name}: weight off the mask"
        if layer.param.grad is not None:
            assert not layer.param.grad[off].any(), f"{layer.name}: gradient off the mask"
        for key, value in sparse.optimizer.state.get(layer.param, {}).items():
            if isinstance(value, Tensor) and value.shape == layer.param.shape:
                low, high = lowest.get(key, 0.0), highest.get(key, 0.0)
                clean = (value[off] >= low) & (value[off] <= high)
                assert clean.all(), f"{layer.name}: optimizer state {key} off the mask"
        for block, budget in zip(layer.rows(layer.mask).chunk(layer.blocks), layer.budgets, strict=True):
            assert int(block.sum()) <= budget, f"{layer.name}: over its budget"


def assert_constant_fan_in(sparse: SparseTraining) -> None:
    """Every living neuron of a block has exactly floor(budget / living neurons) inputs."""
    for layer in sparse.layers:
        for block, budget in zip(layer.rows(layer.mask).chunk(layer.blocks), layer.budgets, strict=True):
            counts = block.sum(dim=1)
            alive = counts[counts > 0]
            assert alive.eq(budget // len(alive)).all(), f"{layer.name}: fan-ins {counts.tolist()}"


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything in the model's state, to compare bit for bit."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"differ: {different}"
