"""The graph passes, one a file, and the order in which they run.

A pass is `run(gm, ctx) -> PassResult`: it edits the GraphModule it is given without changing what that computes,
reports what it did and why it left the rest, and knows no other pass. See fanin_compile.graph for what they share.
"""

from __future__ import annotations

from fanin_compile.graph import Pass
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fuse_epilogue import fuse_epilogue

PIPELINE: tuple[Pass, ...] = (
    find_masked_layers,  # first: every later pass reads the layers and constants it names
    condense_linear,
    condense_conv,
    fuse_epilogue,  # last: it folds what follows into the nodes which the two before it made
)
