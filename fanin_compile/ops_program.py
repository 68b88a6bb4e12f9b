"""The operators that run a program (program.py): several operators as one, without Python between them.

    run_program(inputs, sizes, program)                            -> a list of tensors
    run_program.of1(inputs, sizes, program)                        -> one tensor
    run_program_writing.of<n>(inputs, written!, sizes, program)    -> n tensors; `written` are the last of its inputs

torch wants an operator that writes to return tensors and no list of them, and inductor's C++ wrapper crashes on a list
of one.

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
from .program import operator_named, parse

MOST_OUTPUTS = 8  # of a program that writes

Sizes = Sequence[int | torch.SymInt]


def program_op(outputs: int, *, writes: bool) -> torch._ops.OpOverload:
    """The operator for programs with so many outputs: at least 1, and at most MOST_OUTPUTS if they write."""
    packet = torch.ops.fanin.run_program_writing if writes else torch.ops.fanin.run_program
    op: torch._ops.OpOverload = getattr(packet, f"of{outputs}" if writes or outputs == 1 else "default")
    return op


def reference_run_program(inputs: Sequence[Tensor], sizes: Sizes, program: str) -> list[Tensor]:
    """The outputs of a program, operator by operator. Raises: FormatError, ValueError, what its operators raise."""
    return parse(program)(inputs, sizes)


def reference_run_program_of1(inputs: Sequence[Tensor], sizes: Sizes, program: str) -> Tensor:
    """The same for one output."""
    (output,) = parse(program)(inputs, sizes)
    return output


def reference_run_program_writing(
    inputs: Sequence[Tensor], written: Sequence[Tensor], sizes: Sizes, program: str
) -> tuple[Tensor, ...] | Tensor:
    """The same; the program's last inputs are `written`. Operators which return one tensor return no tuple."""
    outputs = parse(program)([*inputs, *written], sizes)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


_library = torch.library.Library("fanin", "FRAGMENT")


def _define(name: str, written: str, returns: str, reference: Callable[..., Any]) -> None:
    _library.define(
        f"{name}(Tensor[] inputs, {written}SymInt[] sizes, str program) -> {returns}",
        tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),  # a program has strides in it
    )

    def kernel(inputs: Sequence[Tensor], *rest: Any) -> Any:
        if inputs and inputs[0].device.type == "cpu" and native_available():
            # the C++ kernel outranks this one from now on
            return operator_named(f"fanin::{name}")(inputs, *rest)
        return reference(inputs, *rest)

    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fanin::{name}", reference, lib=_library)


_define("run_program", "", "Tensor[]", reference_run_program)
_define("run_program.of1", "", "Tensor", reference_run_program_of1)
for _n in range(1, MOST_OUTPUTS + 1):
    _returns = "Tensor" if _n == 1 else f"({', '.join(['Tensor'] * _n)})"
    _define(f"run_program_writing.of{_n}", "Tensor(a!)[] written, ", _returns, reference_run_program_writing)
