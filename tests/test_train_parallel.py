"""Two processes under torchrun choose the same masks as one process on the joint batch, and survive a kill."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fanin_compile.train import shards
from tests import train_worker

ROOT = Path(__file__).parents[1]


def torchrun(*args: str) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine; torchrun ends both when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, "-m", "tests.train_worker", *args], cwd=ROOT, capture_output=True, text=True, timeout=180
    )


def succeed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-6000:]


def assert_equal_training(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The masks bit for bit; the weights to the rounding of a sum in another order."""
    assert result.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("_mask"):
            assert torch.equal(result[name], tensor), name
        else:
            torch.testing.assert_close(result[name], tensor, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compare")
    succeed(torchrun("compare", str(directory)))
    return directory


@pytest.mark.parametrize(
    ("job", "micro", "grad_steps"),
    [
        ("ddp", 1, 1),
        ("sparse-first", 1, 1),
        ("bucket-view", 2, 1),
        ("no-sync", 2, 2),
        ("fsdp", 1, 1),
        ("fsdp-micro", 2, 1),
        ("fsdp-cut", 2, 1),
    ],
)
def test_two_ranks_equal_one_process_on_the_joint_batch(
    compared: Path, job: str, micro: int, grad_steps: int
) -> None:
    """That masks are the same on all ranks after every step is checked in the workers."""
    expected = train_worker.alone(micro, grad_steps)
    assert_equal_training(torch.load(compared / f"{job}.pt", weights_only=True), expected)


@pytest.mark.parametrize("name", train_worker.BASELINES)
def test_baselines_on_two_ranks_equal_one_process(compared: Path, name: str) -> None:
    assert_equal_training(torch.load(compared / f"{name}.pt", weights_only=True), train_worker.baseline(name))


@pytest.mark.parametrize("job", ["prune", "prune-fsdp"])
def test_two_ranks_prune_by_the_gradient_of_the_joint_batch(compared: Path, job: str) -> None:
    assert_equal_training(torch.load(compared / f"{job}.pt", weights_only=True), train_worker.pruned())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("steps", r"ranks differ \(0: step 4, masks (\w+), 1: step 5, masks \1\)"),
        ("masks", r"ranks differ \(0: step 0, masks (\w+), 1: step 0, masks (?!\1)\w+\)"),
    ],
)
def test_ranks_that_stand_at_different_places_are_told(compared: Path, what: str, message: str) -> None:
    for rank in (0, 1):
        assert re.search(message, (compared / f"mixed-{what}-{rank}.txt").read_text())


def test_what_ranks_tell_each_other_is_sent_from_the_weights_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL refuses tensors of the CPU."""
    sent: list[str] = []

    def all_gather(found: list[Tensor], mine: Tensor) -> None:
        sent.extend(tensor.device.type for tensor in (*found, mine))
        raise InterruptedError

    monkeypatch.setattr(shards, "_several", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    with pytest.raises(InterruptedError):
        shards.of_all_ranks([1, 2], torch.empty(3, device="meta"))
    assert sent == ["meta"] * 3


def test_a_killed_rank_and_a_resume_lose_nothing(tmp_path: Path) -> None:
    """Stopped while the gradient of the window is recorded; the second start goes on from the checkpoints."""
    assert "SIGKILL" in torchrun("killed", str(tmp_path)).stderr
    succeed(torchrun("killed", str(tmp_path)))
    expected = train_worker.alone(grad_steps=2)
    for layout in ("ddp", "fsdp"):
        assert_equal_training(torch.load(tmp_path / f"{layout}.pt", weights_only=True), expected)
