"""Training with a constant fan-in: SRigL, what it is compared with, one-shot pruning, and a report."""

from __future__ import annotations

from fanin_compile.train.base import SparseTraining
from fanin_compile.train.baselines import SET, RigL, Static
from fanin_compile.train.prune import prune_to_fan_in
from fanin_compile.train.report import TrainingReport
from fanin_compile.train.srigl import SRigL

__all__ = ["SET", "RigL", "SRigL", "SparseTraining", "Static", "TrainingReport", "prune_to_fan_in"]
