"""What sparse training costs: a topology update of ViT-B/16's layers, and a step beside dense training's.

python examples/train_overhead.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fanin_compile.train import SRigL

DELTA_T = 100


def vit_layers(blocks: int = 12, d: int = 768) -> nn.ModuleList:
    """The four linear layers of each block: 85 million weights, all of ViT-B/16 that is made sparse."""
    shapes = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    return nn.ModuleList(nn.Linear(a, b, bias=False) for _ in range(blocks) for a, b in shapes)


def update_seconds(layers: nn.ModuleList, repeats: int) -> list[float]:
    """Seconds of step() when it updates every layer, gradient recorded, optimizer state and masks included."""
    optimizer = torch.optim.SGD(layers.parameters(), 1e-3, momentum=0.9)  # grown weights leave 0
    sparse = SRigL(layers, optimizer, total_steps=10**6, delta_t=1, allocation="uniform", gamma_sal=0.95)
    seconds = []
    for _ in range(repeats + 1):
        for layer in layers:
            layer(torch.randn(4, layer.get_parameter("weight").shape[1])).square().sum().backward()
        optimizer.step()
        start = time.perf_counter()
        sparse.step()
        seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()
    return seconds[1:]


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)), torch.randn(64, 768)


def encoder() -> tuple[nn.Module, Tensor]:
    """A block of ViT-B/16 on one image of 197 tokens."""
    return nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True), torch.randn(1, 197, 768)


def trainer(build: Callable[[], tuple[nn.Module, Tensor]], sparse: bool) -> Callable[[], bool]:
    """A function that takes one training step and says whether it changed the topology."""
    torch.manual_seed(0)
    model, x = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)  # the fastest on a CPU, for both
    training = SRigL(model, optimizer, total_steps=10**5, delta_t=DELTA_T) if sparse else None

    def step() -> bool:
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
        return training is not None and training.step()

    return step


def interleaved(steps: Sequence[Callable[[], bool]], rounds: int) -> list[tuple[float, float]]:
    """Median seconds of each, of steps without and with an update (0 if there was none), round about, so that whatever
    else the machine does meets all of them alike."""
    seconds: list[tuple[list[float], list[float]]] = [([], []) for _ in steps]
    for _ in range(rounds):
        for step, found in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            updated = step()
            found[updated].append(time.perf_counter() - start)
    return [(statistics.median(plain), statistics.median(update or [0.0])) for plain, update in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3 * DELTA_T, help=f"at least {DELTA_T}, for an update")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = update_seconds(vit_layers(), repeats=5)
    print(f"update of ViT-B/16's 48 layers: {min(found):.2f} s, median {statistics.median(found):.2f} s")
    for name, build in (("MLP 768-3072-768, batch 64", mlp), ("ViT-B/16 block, 197 tokens", encoder)):
        (dense, _), (sparse, update) = interleaved([trainer(build, False), trainer(build, True)], args.rounds)
        spread = sparse + (update - sparse) / DELTA_T
        print(
            f"{name}, a step: dense {dense * 1e3:.1f} ms, SRigL {sparse * 1e3:.1f}: {sparse / dense - 1:+.1%}"
        )
        print(
            f"  with an update {update * 1e3:.1f} ms; spread over {DELTA_T} steps: {spread / dense - 1:+.1%}"
        )


if __name__ == "__main__":
    main()
