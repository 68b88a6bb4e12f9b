"""Compile constant fan-in sparse PyTorch models to fast CPU kernels, from inside PyTorch.

torch.compile(model, backend="fanin")     masked layers become native gather-matmuls, the rest is inductor's
fanin_compile.condense(model)             a copy holding condensed weights, to save, ship and run anywhere
fanin_compile.explain(model, *inputs)     what was rewritten, why something was not, what it saves
fanin_compile.SRigL(model, optimizer, sparsity=0.9, total_steps=n)     learn such a model
"""

from fanin_compile.backend import fanin
from fanin_compile.condense import condense
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import (
    BuildError,
    FaninError,
    FormatError,
    MaskError,
    OptionError,
    RewriteError,
)
from fanin_compile.explain import explain
from fanin_compile.freshness import refresh
from fanin_compile.report import LayerReport, Report
from fanin_compile.train import SRigL

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "CondensedWeight",
    "FaninError",
    "FormatError",
    "LayerReport",
    "MaskError",
    "OptionError",
    "Report",
    "RewriteError",
    "SRigL",
    "condense",
    "explain",
    "fanin",
    "refresh",
]
