"""Training with a constant fan-in: SRigL."""

from __future__ import annotations

from fanin_compile.train.srigl import SRigL

__all__ = ["SRigL"]
