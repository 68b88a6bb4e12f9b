"""Saying which layers are meant: by fully qualified name, glob, module type, or predicate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from torch import nn

from fanin_compile.errors import OptionError

Predicate = Callable[[nn.Module, str], bool]
Pattern = str | type[nn.Module] | Predicate
Patterns = Pattern | Iterable[Pattern]


def as_patterns(patterns: Patterns) -> tuple[Pattern, ...]:
    if isinstance(patterns, str) or callable(patterns):  # a type is callable too
        return (patterns,)
    return tuple(patterns)


def matches(pattern: Pattern, module: nn.Module, name: str) -> bool:
    """Whether ``pattern`` means the parameter ``name`` ("fc1.weight") of ``module``: its own name, its
    module's ("fc1"), a glob over either ("blocks.*.mlp.*"), the module's type, or predicate(module, module
    name)."""
    owner = name.rpartition(".")[0]
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern) or fnmatchcase(owner, pattern)
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    return bool(pattern(module, owner))


def refuse_idle(option: str, patterns: tuple[Pattern, ...], used: set[Pattern], known: Iterable[str]) -> None:
    """A name, glob or type that meant nothing is a mistake, and most often a misspelt layer."""
    for pattern in patterns:
        if pattern not in used and (isinstance(pattern, str | type)):
            names = ", ".join(known) or "none"
            raise OptionError(f"{option}: {pattern!r} matches no layer; layers that can be sparse: {names}")
