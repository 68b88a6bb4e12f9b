"""What Dynamo guards of modules - their classes, numbers, names - checked in one walk over what is guarded.

A network of 160 modules has 1500 such guards, each an object of its own somewhere in memory. Right after another call
they take 40 us; once the network's weights have passed through the caches, 250 to 500, a tenth of a small model.
Here they become a table of addresses, compared in order by one native call (kernels/attributes_bindings.cpp): as long
as every object is the very one that was found, all that was true of it is. Where one is not, the guards are checked as
Dynamo does, by type and equality, and the table is made anew if they hold.

Only constants are taken over: numbers, strings, None and tuples of these. What else is guarded stays with Dynamo, and
so do all guards where the kernels are missing.
"""

from __future__ import annotations

import array
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource, NNModuleSource
from torch._guards import Guard, Source

from fanin_compile.kernels import build

log = logging.getLogger("fanin_compile")

_SCALARS = (int, float, bool, str, type(None))
_CONSTANT_GUARDS = ("CONSTANT_MATCH", "EQUALS_MATCH")
_IMPLIED_BY_CONSTANT = ("TYPE_MATCH", "SEQUENCE_LENGTH")
_OTHER_GUARDS = ("NOT_PRESENT_IN_GENERIC_DICT", "DICT_KEYS_MATCH", "DUPLICATE_INPUT")
_ANSWERED = (*_CONSTANT_GUARDS, *_IMPLIED_BY_CONSTANT, *_OTHER_GUARDS)
_ANY = 0  # an address: whatever is there
_UNKNOWN = object()

Step = tuple[str, str]  # "attribute" of a module or "item" of a dict, and its name


@dataclass
class _Node:
    """A module, a dict of one or a constant on the way from the root, and what must be true of it."""

    kind: type  # exact
    below: dict[str, _Node] = field(default_factory=dict)  # by attribute of a module, by item of a dict
    constant: Any = _UNKNOWN
    absent: set[str] = field(default_factory=set)  # names that are not in a module's __dict__
    keys: list[str] | None = None  # all there are, in order
    alias: object = None  # the same for all places that must have the very same object

    def is_container(self) -> bool:
        return issubclass(self.kind, nn.Module) or self.kind is dict


class AttributeGuard:
    """Whether a module is as it was when a graph was compiled for it, as far as the guards say that it took over."""

    def __init__(self, root: nn.Module, tree: _Node, unchanged: Callable[[object, int, int], int]) -> None:
        self._root, self._tree, self._unchanged = weakref.ref(root), tree, unchanged
        self._found = _Writer()
        self._where = self._found.table.buffer_info()

    def __call__(self, root: object) -> bool:
        return bool(self._unchanged(root, *self._where)) or self._renew(root)

    def works(self, root: nn.Module) -> bool:
        """Whether all holds now, and the native check sees it: no module keeps its attributes in another way."""
        return self._renew(root) and bool(self._unchanged(root, *self._where))

    def _renew(self, root: object) -> bool:
        """Check each guard by itself, and make the table anew if all of them hold."""
        if root is not self._root():  # models of a class share their code: this one has a guard of its own
            return False
        found = _Writer()
        if changed := found.write(self._tree, root, "self"):
            log.info("%s changed: the graph compiled for it does not fit", changed)
            return False
        self._found = found
        self._where = found.table.buffer_info()
        return True


def take_over(
    root: LocalSource, module: nn.Module, guards: Iterable[Guard]
) -> tuple[AttributeGuard | None, set[Guard]]:
    """A check that stands for the second result, those of Dynamo's guards that it can answer for.

    Args:
        root: where the frame has `module`, itself guarded to be the same.
    """
    library = build.python_library()
    if library is None:
        return None, set()
    tree = _Tree(root, module)
    places = [place for guard in guards if (place := tree.place_of(guard)) is not None]
    for place in places:
        if place.name in _CONSTANT_GUARDS and _is_constant(place.value):
            place.node.constant = place.value
    taken = {place.guard for place in places if place.answered() or place.aliased(tree)}
    _prune(tree.top)
    check = AttributeGuard(module, tree.top, library.fanin_attributes)
    return (check, taken) if taken and check.works(module) else (None, set())


class _Tree:
    """A module, found at `root`, and nodes for what guards look at in it."""

    def __init__(self, root: LocalSource, module: nn.Module) -> None:
        self.top = _Node(type(module))
        self._root, self._module = root, module

    def place_of(self, guard: Guard) -> _Place | None:
        found = self.node_at(guard.originating_source) if guard.create_fn_name() in _ANSWERED else None
        return None if found is None else _Place(guard, *found)

    def node_at(self, source: Source) -> tuple[_Node, Any] | None:
        """The node for a source and its value; None if it is elsewhere, or behind more than look-ups."""
        path, node, value = _path(source, self._root), self.top, self._module
        if path is None:
            return None
        for step in path:
            value = _look_up(value, step)
            if value is _UNKNOWN:
                return None
            node = node.below.setdefault(step[1], _Node(type(value)))
        return node, value


@dataclass
class _Place:
    """Where a guard looks."""

    guard: Guard
    node: _Node
    value: Any

    @property
    def name(self) -> str:
        return self.guard.create_fn_name()

    def answered(self) -> bool:
        """Whether the guard is among what its node checks, which is told to where it was not yet."""
        node, value, module = self.node, self.value, isinstance(self.value, nn.Module)
        if node.constant is not _UNKNOWN:
            return self.name in (*_CONSTANT_GUARDS, *_IMPLIED_BY_CONSTANT)
        if self.name == "NOT_PRESENT_IN_GENERIC_DICT" and module:
            node.absent.add(self._argument("attr"))
            return True
        if self.name == "DICT_KEYS_MATCH" and type(value) is dict and all(type(key) is str for key in value):
            node.keys = list(value)
            return True
        return self.name == "TYPE_MATCH" and (module or type(value) is dict)

    def aliased(self, tree: _Tree) -> bool:
        """Whether it asks that the same object be in another place too, which both nodes are told."""
        found = tree.node_at(self._argument("source_b")) if self.name == "DUPLICATE_INPUT" else None
        if found is None:
            return False
        other, _ = found
        self.node.alias = self.node.alias or other.alias or object()
        if other.alias not in (None, self.node.alias):
            return False
        other.alias = self.node.alias
        return True

    def _argument(self, name: str) -> Any:
        return self.guard.create_fn.keywords[name]  # type: ignore[attr-defined]  # a functools.partial


def _path(source: Source, root: LocalSource) -> list[Step] | None:
    """The steps from `root`; None if there are others."""
    steps: list[Step] = []
    while source != root:
        if isinstance(source, AttrSource):
            steps.append(("attribute", source.member))
        elif isinstance(source, DictGetItemSource) and isinstance(source.index, str):
            steps.append(("item", source.index))
        elif not isinstance(source, NNModuleSource):
            return None
        source = source.base
    return steps[::-1]


def _look_up(value: Any, step: Step) -> Any:
    """One step on, if nothing but the look-up in a dict is behind it; else _UNKNOWN."""
    how, name = step
    if how == "item":
        return value.get(name, _UNKNOWN) if type(value) is dict else _UNKNOWN
    if not isinstance(value, nn.Module) or type(value).__getattribute__ is not object.__getattribute__:
        return _UNKNOWN
    if inspect.isdatadescriptor(inspect.getattr_static(type(value), name, None)):
        return _UNKNOWN  # as a parametrized weight, a property of the class
    return _entries(value).get(name, _UNKNOWN)


def _entries(value: Any) -> dict[str, Any]:
    """What a module or a dict holds by name."""
    entries: dict[str, Any] = vars(value) if isinstance(value, nn.Module) else value
    return entries


def _is_constant(value: object) -> bool:
    """Whether it cannot change, and equality says all of it."""
    return type(value) in _SCALARS or (type(value) is tuple and all(map(_is_constant, value)))


def _prune(node: _Node) -> None:
    """Drop the leaves that nothing is known of: their guards stayed with Dynamo."""
    for name, below in list(node.below.items()):
        _prune(below)
        if not below.is_container() and below.constant is _UNKNOWN and below.alias is None:
            del node.below[name]


class _Writer:
    """Checks a tree of nodes against a module as it is, and writes the native check's table of it.

    Attributes:
        table: see kernels/attributes_bindings.cpp.
        held: what must not be freed, so that no other object gets its address. Modules and their dicts are not among
            them: the check reaches each through its parent, which holds it.
    """

    def __init__(self) -> None:
        self.table, self.held = array.array("q"), list[object]()
        self._aliases: dict[object, object] = {}

    def write(self, node: _Node, value: Any, name: str) -> str:
        """Append `value`, a module or dict, and all below it; the place where it is not what it must be, or ""."""
        if type(value) is not node.kind:
            return name
        module = isinstance(value, nn.Module)
        entries = _entries(value)
        if node.absent & entries.keys() or not node.below.keys() <= entries.keys():
            return name
        if node.keys is not None and node.keys != list(entries):
            return name
        own = (id(value), id(type(value))) if module else (0, 0)
        ordered = -1 if node.keys is None else len(node.keys)
        listed = list(node.below if node.keys is None else entries)
        self.table.extend((*own, id(entries), _ANY, ordered, len(listed), len(node.absent)))
        for key in listed:
            self.table.extend((id(key), id(entries[key]) if key in node.below else _ANY))
        self.table.extend(id(key) for key in node.absent)
        self.held += [*listed, *node.absent]
        for key, child in node.below.items():
            if changed := self._write_entry(child, entries[key], f"{name}.{key}"):
                return changed
        return ""

    def _write_entry(self, node: _Node, value: Any, name: str) -> str:
        if node.alias is not None and self._aliases.setdefault(node.alias, value) is not value:
            return name
        if node.is_container():
            return self.write(node, value, name)
        if node.constant is not _UNKNOWN:
            if type(value) is not node.kind or not (value is node.constant or value == node.constant):
                return name
            self.held.append(value)
        return ""
