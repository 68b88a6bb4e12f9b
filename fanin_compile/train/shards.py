"""Several processes: local parts of sharded tensors, and masks that are the same on every rank.

Two layouts are met. Under DistributedDataParallel every rank holds the whole weight and its own gradient, so
the dense gradient is averaged here. Under FSDP2 (fully_shard) the Parameter is a DTensor, its gradient
arrives averaged and sharded, and is gathered. Without torch.distributed every function here returns what it
was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # read by DistributedDataParallel's constructor


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of ``full`` (the same on every rank) that this rank holds of ``like``. No communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def gather(part: Tensor, like: Tensor) -> Tensor:
    """The whole tensor of which each rank holds ``part``, laid out as ``like`` is."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_gradient(part: Tensor, like: Tensor) -> Tensor:
    """The gradient of the joint batch, whole, on every rank; the mean of the gradients, not of their sizes,
    so that several ranks choose as one process with all of their data would."""
    if isinstance(like, DTensor):
        return gather(part, like)
    if _several():
        part = part.contiguous()
        dist.all_reduce(part)
        part /= dist.get_world_size()
    return part


def from_first_rank(mask: Tensor) -> Tensor:
    """Rank 0's bool mask on every rank: rounding of one rank can never split the masks."""
    if not _several():
        return mask
    as_bytes = mask.to(torch.uint8).contiguous()
    dist.broadcast(as_bytes, src=0)
    return as_bytes.bool()


def keep_from_ddp(model: nn.Module, buffers: list[str]) -> None:
    """Tell a DistributedDataParallel that will wrap ``model`` to leave these buffers alone.

    It would broadcast every buffer in every forward, and masks are the same on all ranks already.
    """
    ignored = getattr(model, _IGNORED, [])
    setattr(model, _IGNORED, [*ignored, *buffers])


def of_all_ranks(values: Sequence[int], like: Tensor) -> list[list[int]]:
    """``values``, as many on every rank, of each rank; sent from where ``like`` is: NCCL takes no CPU tensors."""
    mine = torch.tensor(values, device=like.device)
    if not _several():
        return [mine.tolist()]
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [part.tolist() for part in found]
