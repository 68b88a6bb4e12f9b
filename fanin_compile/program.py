"""Programs: operators in the order in which they run, as text that both Python and C++ read.

    ['program', 3, 0];                                                 how many tensors and numbers it is given
    ['fanin::gather_matmul', [3], ['%0', '%1', '%2', None, 64, 'relu', None, None]];
    ['aten::view', [4], ['%3', [8, 64]]];
    ['return', [4]]

A line is a list as Python writes it: an operator with its overload, the registers that its results go to (None: nobody
reads that one; an operator that returns a list fills as many as there are), and all its arguments in the order of the
schema. '%7' is register 7, of which the inputs are the first; '$2' is size 2. All lines stand in one, and no quote or
backslash that generated C++ code would have to escape. kernels/program_bindings.cpp runs the same text.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import FormatError

_END = "; "  # of a line
Argument = Any  # None, bool, int, float, str, Register, Size, or a list of such


@dataclass(frozen=True)
class Register:
    """A tensor of a program."""

    index: int


@dataclass(frozen=True)
class Size:
    """A number that a program is given."""

    index: int


@dataclass(frozen=True)
class Instruction:
    """results: a register for each, None if nobody reads it."""

    op: str
    results: tuple[int | None, ...]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """See above. outputs: the registers which it returns."""

    inputs: int
    sizes: int
    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]

    def to_text(self) -> str:
        """ValueError for an argument that has no text, as representable() says."""
        lines: list[object] = [["program", self.inputs, self.sizes]]
        lines += ([step.op, list(step.results), _encode(step.arguments)] for step in self.instructions)
        lines.append(["return", list(self.outputs)])
        return _END.join(map(repr, lines))

    def __call__(self, inputs: Sequence[Tensor], sizes: Sequence[int | torch.SymInt] = ()) -> list[Tensor]:
        """Run it, operator by operator.

        Raises:
            ValueError: another number of inputs or sizes than it was made for. What the operators raise.
        """
        given = len(inputs), len(sizes)
        if given != (self.inputs, self.sizes):
            raise ValueError(
                f"a program is given {given[0]} tensors and {given[1]} sizes, expected {self.inputs} and {self.sizes}"
            )
        registers: dict[int, Tensor] = dict(enumerate(inputs))

        def value(argument: Argument) -> Any:
            if isinstance(argument, list | tuple):
                return [value(item) for item in argument]
            if isinstance(argument, Register):
                return registers[argument.index]
            return sizes[argument.index] if isinstance(argument, Size) else argument

        for step in self.instructions:
            op = operator_named(step.op)
            arguments = zip(op._schema.arguments, step.arguments, strict=True)
            named = {a.name: value(v) for a, v in arguments if a.kwarg_only}
            found = op(*map(value, step.arguments[: len(step.arguments) - len(named)]), **named)
            results = found if isinstance(found, list | tuple) else [found]
            registers.update((r, t) for r, t in zip(step.results, results, strict=False) if r is not None)
        return [registers[index] for index in self.outputs]


def representable(value: object) -> bool:
    """Whether an argument other than a tensor or a symbolic size can stand in a program's text."""
    if isinstance(value, list | tuple):
        return all(representable(item) for item in value)
    if isinstance(value, str):
        return value.isascii() and value.isprintable() and not set(value) & set("%$\"'\\;")
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int)


def name_of(op: torch._ops.OpOverload) -> str:
    """Of an operator in a program: its schema's name, with the overload if it has one."""
    name = op._schema.name
    return f"{name}.{op._schema.overload_name}" if op._schema.overload_name else name


@functools.cache
def operator_named(name: str) -> torch._ops.OpOverload:
    """FormatError if there is no such operator."""
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    try:
        op = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    except AttributeError as error:
        raise FormatError(f"a program calls {name!r}, expected an operator of torch or of ours") from error
    assert isinstance(op, torch._ops.OpOverload)
    return op


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """The program that to_text() wrote. FormatError if it is none."""
    try:
        (first, inputs, sizes), *lines = (ast.literal_eval(line) for line in text.split(_END))
        last, outputs = lines.pop()
        if (first, last) != ("program", "return"):
            raise ValueError(
                f"its first and last lines are {first!r} and {last!r}, expected 'program' and 'return'"
            )
        steps = tuple(
            Instruction(op, tuple(results), tuple(_decode(argument) for argument in arguments))
            for op, results, arguments in lines
        )
        return Program(inputs, sizes, steps, tuple(outputs))
    except (ValueError, TypeError, IndexError, SyntaxError) as error:
        raise FormatError(f"no program: {error}") from error


def _encode(argument: Argument) -> Any:
    if isinstance(argument, Register):
        return f"%{argument.index}"
    if isinstance(argument, Size):
        return f"${argument.index}"
    if isinstance(argument, list | tuple):
        return [_encode(item) for item in argument]
    if not representable(argument):
        raise ValueError(f"{argument!r} cannot stand in a program")
    return argument


def _decode(value: Any) -> Argument:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, str) and value[:1] in ("%", "$"):
        return (Register if value[0] == "%" else Size)(int(value[1:]))
    return value
