"""SRigL on several processes: DistributedDataParallel, or FSDP2 with --fsdp; stop it at will, it goes on from
its checkpoint.

    torchrun --nproc-per-node=2 examples/train_ddp.py
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from fanin_compile.train import SRigL, TrainingReport
from fanin_compile.train.data import digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--fsdp", action="store_true", help="shard the weights instead of replicating them")
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--batch", type=int, default=64, help="of all processes together")
parser.add_argument("--checkpoint", type=Path, default=Path("checkpoint"), help="a directory")
args = parser.parse_args()


def main() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = digits()
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    run: nn.Module = model
    if args.fsdp:
        for part in (*model, model):
            if isinstance(part, nn.Linear) or part is model:
                fully_shard(part)
    else:
        run = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    sparse = SRigL(run, optimizer, sparsity=0.9, total_steps=args.steps, delta_t=20)

    # This rank's files by step: its shard of the weights, its part of a gradient that is being recorded.
    args.checkpoint.mkdir(exist_ok=True)
    name = f"{'fsdp' if args.fsdp else 'ddp'}-{rank}-of-{ranks}-step"

    def files() -> dict[int, Path]:
        return {int(file.stem.removeprefix(name)): file for file in args.checkpoint.glob(f"{name}*.pt")}

    steps_of_ranks: list[set[int]] = [set()] * ranks
    dist.all_gather_object(steps_of_ranks, set(files()))
    if complete := set.intersection(*steps_of_ranks):  # a rank that was killed may lack the newest
        saved = torch.load(files()[max(complete)], weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        sparse.load_state_dict(saved["sparse"])
        print(f"rank {rank} goes on from step {sparse.steps}")

    report = TrainingReport(sparse)
    for step in range(sparse.steps, args.steps):
        pick = torch.randint(len(data.train_x), (args.batch,), generator=torch.Generator().manual_seed(step))
        mine = pick.chunk(ranks)[rank]  # every rank draws the same joint batch and takes its share
        optimizer.zero_grad()
        F.cross_entropy(run(data.train_x[mine]), data.train_y[mine]).backward()
        optimizer.step()
        sparse.step()
        if (step + 1) % 100 == 0:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "sparse": sparse.state_dict(),
            }
            file = args.checkpoint / f"{name}{step + 1}.pt"
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
            dist.barrier()  # all have this one before any deletes an older one
            for older in set(files().values()) - {file}:
                older.unlink()

    with torch.no_grad():
        accuracy = (run(data.test_x).argmax(1) == data.test_y).float().mean().item()
    report.record(accuracy=accuracy)
    masks = torch.cat([layer.mask.flatten() for layer in sparse.layers]).to(torch.uint8)
    first = masks.clone()
    dist.broadcast(first, src=0)
    print(f"rank {rank}: masks {'equal' if torch.equal(masks, first) else 'DIFFER from'} rank 0's")
    if rank == 0:
        print(report)


dist.init_process_group("gloo")
main()
gc.collect()  # sharded and replicated models sit in cycles: gloo's threads, if kept to the exit, may abort it
dist.destroy_process_group()
