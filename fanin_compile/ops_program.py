"""The operators that run a program (program.py): several operators as one, without Python between them.

    run_program(inputs, sizes, program)                            -> a list of tensors
    run_program_writing.of<n>(inputs, written!, sizes, program)    -> n tensors; `written` are the last of its inputs

A compiled graph calls each operator from Python, 2 to 6 us of a call; a network has fifty. As for the linear operators
(ops.py), the first call on CPU builds and loads the C++ kernel, which takes over the CPU key; program.py serves
everything else. For inference alone: no gradient comes through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops_attention, ops_chain, ops_conv, ops_depthwise, ops_pool  # noqa: F401  (what programs call)
from .ops import native_available
from .program import parse

MOST_OUTPUTS = (
    8  # of a program that writes: torch wants such an operator to return tensors, and no list of them
)

Sizes = Sequence[int | torch.SymInt]


def reference_run_program(inputs: Sequence[Tensor], sizes: Sizes, program: str) -> list[Tensor]:
    """The outputs of a program, operator by operator. Raises: FormatError, ValueError, what its operators raise."""
    return parse(program)(inputs, sizes)


def reference_run_program_writing(
    inputs: Sequence[Tensor], written: Sequence[Tensor], sizes: Sizes, program: str
) -> tuple[Tensor, ...] | Tensor:
    """The same; the program's last inputs are `written`. Operators which return one tensor return no tuple."""
    outputs = parse(program)([*inputs, *written], sizes)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def writing_overload(outputs: int) -> torch._ops.OpOverload:
    """run_program_writing for that many outputs, 1 to MOST_OUTPUTS."""
    op: torch._ops.OpOverload = getattr(torch.ops.fanin.run_program_writing, f"of{outputs}")
    return op


def _until_native(op: Callable[[], Callable[..., Any]], reference: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(inputs: Sequence[Tensor], *rest: Any) -> Any:
        if inputs and inputs[0].device.type == "cpu" and native_available():
            return op()(inputs, *rest)  # the C++ kernel outranks this one from now on
        return reference(inputs, *rest)

    return kernel


_library = torch.library.Library("fanin", "FRAGMENT")
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)  # a program has strides in it
_library.define("run_program(Tensor[] inputs, SymInt[] sizes, str program) -> Tensor[]", tags=_TAGS)
_library.impl(
    "run_program",
    _until_native(lambda: torch.ops.fanin.run_program.default, reference_run_program),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("fanin::run_program", reference_run_program, lib=_library)
for _n in range(1, MOST_OUTPUTS + 1):
    _name = f"run_program_writing.of{_n}"
    _returns = "Tensor" if _n == 1 else f"({', '.join(['Tensor'] * _n)})"
    _library.define(
        f"{_name}(Tensor[] inputs, Tensor(a!)[] written, SymInt[] sizes, str program) -> {_returns}",
        tags=_TAGS,
    )
    _library.impl(
        _name,
        _until_native(lambda n=_n: writing_overload(n), reference_run_program_writing),  # type: ignore[misc]
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake(f"fanin::{_name}", reference_run_program_writing, lib=_library)
