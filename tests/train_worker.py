"""What each of two processes runs under torchrun: python -m torch.distributed.run ... train_worker.py JOB DIR."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fanin_compile.errors import FaninError
from fanin_compile.train import SET, RigL, SparseTraining, SRigL, Static, prune_to_fan_in
from tests.train_support import batch, loss_of, mlp

F64 = torch.float64  # rounding of the sum over ranks cannot change a rank of the scores
STEPS, UPDATE = 12, 3
CUT = 2 * UPDATE - 1  # steps before the kill
WIDTHS = (17, 33, 24, 5)  # that two ranks cannot share evenly


def options(grad_steps: int = 1) -> dict[str, Any]:
    return {
        "total_steps": 40, "delta_t": UPDATE, "sparsity": 0.75, "gamma_sal": 0.9, "grad_steps": grad_steps
    }  # fmt: skip


# What each baseline takes of these.
BASELINES: dict[str, Callable[[nn.Module, torch.optim.Optimizer], SparseTraining]] = {
    "RigL": lambda model, opt: RigL(model, opt, total_steps=40, delta_t=UPDATE, sparsity=0.75),
    "SET": lambda model, opt: SET(model, opt, total_steps=40, delta_t=UPDATE, sparsity=0.75),
    "Static": lambda model, opt: Static(model, opt, sparsity=0.75),
}


def share(x: Tensor) -> Tensor:
    """This rank's part of the joint batch; all of it in a single process."""
    if not dist.is_initialized():
        return x
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}


def refuse_different_masks(sparse: SparseTraining) -> None:
    """Every rank holds rank 0's masks."""
    for layer in sparse.layers:
        mine = layer.mask.to(torch.uint8)
        first = mine.clone()
        dist.broadcast(first, src=0)
        if not torch.equal(mine, first):
            raise AssertionError(f"{layer.name}: the mask of rank {dist.get_rank()} is not rank 0's")


def train(
    run: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparse: SparseTraining,
    *,
    micro: int = 1,
    until: int = STEPS,
    after: Callable[[], None] = lambda: None,
) -> None:
    """From the step that ``sparse`` stands at; gradients of all but the last micro-batch stay on their rank."""
    for step in range(sparse.steps, until):
        optimizer.zero_grad()
        for part, x in enumerate(batch(sparse.model, step, 16).chunk(micro)):
            alone = part < micro - 1 and isinstance(run, DistributedDataParallel)
            with run.no_sync() if alone else contextlib.nullcontext():  # type: ignore[operator]
                (loss_of(run, share(x)) / micro).backward()
        optimizer.step()
        sparse.step()
        if dist.is_initialized():
            refuse_different_masks(sparse)
        after()


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def alone(micro: int = 1, grad_steps: int = 1) -> dict[str, Tensor]:
    """The single process on the joint batch that the others are compared with."""
    model = mlp(*WIDTHS, dtype=F64)
    optimizer = optimizer_for(model)
    train(model, optimizer, SRigL(model, optimizer, **options(grad_steps)), micro=micro)
    return state(model)


def ddp(*, wrap_first: bool, micro: int = 1, grad_steps: int = 1, view: bool = False) -> dict[str, Tensor]:
    model = mlp(*WIDTHS, seed=dist.get_rank() if wrap_first else 0, dtype=F64)
    wrap = functools.partial(DistributedDataParallel, gradient_as_bucket_view=view)
    run = wrap(model) if wrap_first else None  # gives all ranks rank 0's weights
    optimizer = optimizer_for(model)
    sparse = SRigL(run or model, optimizer, **options(grad_steps))
    run = run or wrap(model)
    synchronised = [buffer.dtype for buffer in run.modules_buffers]
    assert torch.bool not in synchronised, "DDP would broadcast the masks in every forward"
    train(run, optimizer, sparse, micro=micro)
    return state(model)


def baseline(name: str) -> dict[str, Tensor]:
    model = mlp(*WIDTHS, dtype=F64)
    run = DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = optimizer_for(model)
    train(run, optimizer, BASELINES[name](model, optimizer))
    return state(model)


def pruned(*, shard: bool = False) -> dict[str, Tensor]:
    """By the gradient of the joint batch, of which each rank has its share."""
    model = sharded_mlp() if shard else mlp(*WIDTHS, dtype=F64)

    def closure() -> None:
        loss_of(model, share(batch(model, 0, 16))).backward()

    prune_to_fan_in(model, 0.75, criterion="gradient", closure=closure)
    return state(model)


def sharded_mlp() -> nn.Module:
    model = mlp(*WIDTHS, dtype=F64)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def sharded(grad_steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer, SRigL]:
    model = sharded_mlp()
    optimizer = optimizer_for(model)
    return model, optimizer, SRigL(model, optimizer, **options(grad_steps))


def fsdp(micro: int = 1) -> dict[str, Tensor]:
    model, optimizer, sparse = sharded()
    train(model, optimizer, sparse, micro=micro)
    return state(model)


def fsdp_cut(directory: Path) -> dict[str, Tensor]:
    """Cut between the two micro-batches of the step that ends in an update."""
    model, optimizer, sparse = sharded()
    train(model, optimizer, sparse, micro=2, until=CUT)
    optimizer.zero_grad()
    first, second = batch(model, CUT, 16).chunk(2)
    (loss_of(model, share(first)) / 2).backward()
    file = directory / f"cut-{dist.get_rank()}.pt"
    torch.save([model.state_dict(), optimizer.state_dict(), sparse.state_dict(grads=True)], file)
    model, optimizer, sparse = sharded()
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    sparse.load_state_dict(saved[2])
    (loss_of(model, share(second)) / 2).backward()
    optimizer.step()
    assert sparse.step(), "the step that ends in an update"
    train(model, optimizer, sparse, micro=2)
    return state(model)


def mixed(directory: Path) -> None:
    """The two ranks load states of other steps, then of other masks; both are told, and nothing is changed."""
    model = mlp(*WIDTHS, dtype=F64)
    states = [
        SRigL(seeded, optimizer_for(seeded), seed=seed, **options()).state_dict()
        for seed in (1, 2)
        for seeded in (mlp(*WIDTHS, dtype=F64),)
    ]
    sparse = SRigL(model, optimizer_for(model), **options())
    rank = dist.get_rank()
    for name, mine in (("steps", states[0] | {"steps": 4 + rank}), ("masks", states[rank])):
        before = state(model)
        try:
            sparse.load_state_dict(mine)
        except FaninError as error:
            (directory / f"mixed-{name}-{rank}.txt").write_text(str(error))
        assert all(torch.equal(value, before[key]) for key, value in state(model).items())
    sparse.load_state_dict(states[0])


def sharded_too_late() -> None:
    """fully_shard after SRigL puts other Parameters in the place of the hooked ones."""
    model = mlp(*WIDTHS, dtype=F64)
    sparse = SRigL(model, optimizer_for(model), **options())
    fully_shard(model)
    with pytest.raises(FaninError, match="start sparse training after fully_shard"):
        sparse.step()


def compare(directory: Path) -> None:
    mixed(directory)
    sharded_too_late()
    jobs: dict[str, Callable[[], dict[str, Tensor]]] = {
        "ddp": lambda: ddp(wrap_first=True),
        "sparse-first": lambda: ddp(wrap_first=False),
        "bucket-view": lambda: ddp(wrap_first=True, micro=2, view=True),
        "no-sync": lambda: ddp(wrap_first=True, micro=2, grad_steps=2),
        "fsdp": fsdp,
        "fsdp-micro": lambda: fsdp(micro=2),
        "fsdp-cut": lambda: fsdp_cut(directory),
        "prune": pruned,
        "prune-fsdp": lambda: pruned(shard=True),
        **{name: functools.partial(baseline, name) for name in BASELINES},
    }
    for name, job in jobs.items():
        result = job()
        if dist.get_rank() == 0:
            torch.save(result, directory / f"{name}.pt")


def killed(directory: Path) -> None:
    """Started twice. The first time, FSDP stops and then rank 1 under DDP is killed, both in the step before an
    update, with a gradient recorded; the second time they go on from their checkpoints."""
    resume(directory, "fsdp", sharded(grad_steps=2), kill=False)
    model = mlp(*WIDTHS, dtype=F64)
    optimizer = optimizer_for(model)
    sparse = SRigL(model, optimizer, **options(grad_steps=2))
    resume(directory, "ddp", (DistributedDataParallel(model), optimizer, sparse), kill=True)


def resume(
    directory: Path, name: str, parts: tuple[nn.Module, torch.optim.Optimizer, SRigL], *, kill: bool
) -> None:
    """Train from this rank's checkpoint, which is written after every step."""
    run, optimizer, sparse = parts
    model = sparse.model
    mine = directory / f"{name}-rank{dist.get_rank()}.pt"
    first_time = not mine.exists()
    if not first_time:
        saved = torch.load(mine, weights_only=True)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        sparse.load_state_dict(saved[2])
        assert sparse.steps == CUT

    def after() -> None:
        torch.save([model.state_dict(), optimizer.state_dict(), sparse.state_dict()], mine)
        dist.barrier()
        if first_time and kill and dist.get_rank() == 1 and sparse.steps == CUT:
            os.kill(os.getpid(), signal.SIGKILL)

    train(run, optimizer, sparse, until=CUT if first_time and not kill else STEPS, after=after)
    result = state(model)
    if dist.get_rank() == 0:
        torch.save(result, directory / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"compare": compare, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
    gc.collect()  # DistributedDataParallel is in cycles: kept to the exit, gloo's threads now and then abort it
    dist.barrier()
    dist.destroy_process_group()
