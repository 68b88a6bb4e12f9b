"""What a walk over modules sees of their attributes: all that the guards saw which it stands for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource, UnspecializedNNModuleSource
from torch._guards import Guard, Source

from fanin_compile.attributes import AttributeGuard, take_over
from fanin_compile.kernels import build
from tests.compile_support import any_type, assert_equals_model, compiled, randn, recorded, sparse_linear

ROOT = LocalSource("self")


# ---- guards made by hand -----------------------------------------------------------------------------------


class Leaf(nn.Module):
    """With attributes of the kinds that guards are on."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.name, self.sizes, self.none = 1.5, "leaf", (2, True), None


class Other(Leaf):
    pass


def _tree() -> nn.Module:
    root = Leaf()
    root.a, root.b = Leaf(), Leaf()
    root.a.c = Leaf()
    root.several = nn.ModuleList([Leaf(), Leaf()])
    return root


def _guards(module: nn.Module, source: Source) -> Iterator[Guard]:
    """Of all kinds that are taken over, on a module and all below it."""
    here = UnspecializedNNModuleSource(source)
    modules = AttrSource(here, "_modules")
    yield here.make_guard(GuardBuilder.TYPE_MATCH)
    yield here.make_guard(functools.partial(GuardBuilder.NOT_PRESENT_IN_GENERIC_DICT, attr="forward"))
    yield modules.make_guard(GuardBuilder.TYPE_MATCH)
    yield modules.make_guard(GuardBuilder.DICT_KEYS_MATCH)
    for name in ("number", "name", "sizes", "none"):
        if name in vars(module):
            yield AttrSource(here, name).make_guard(GuardBuilder.CONSTANT_MATCH)
    for name, child in module._modules.items():
        assert child is not None
        yield from _guards(child, DictGetItemSource(modules, name))


def _taken(module: nn.Module) -> tuple[AttributeGuard, list[Guard]]:
    build.load()
    guards = list(_guards(module, ROOT))
    check, taken = take_over(ROOT, module, guards)
    assert check is not None
    assert taken == set(guards)
    return check, guards


def _holds(guard: Guard, metadata: object, module: nn.Module) -> bool:
    """A guard evaluated by itself."""
    try:
        value = eval(guard.name, {"L": {"self": module}})
    except (AttributeError, KeyError):
        return False
    return _facts(guard, value) == metadata


def _facts(guard: Guard, value: Any) -> object:
    kind = guard.create_fn_name()
    if kind == "NOT_PRESENT_IN_GENERIC_DICT":
        return "forward" in vars(value)
    if kind == "DICT_KEYS_MATCH":
        return list(value)
    return (type(value), value) if kind == "CONSTANT_MATCH" else type(value)


PATHS = ("", "a", "b", "a.c", "several", "several.0")
VALUES = (1.5, 2, 1, True, "leaf", float("1.5"), (2, True), (2, 1), None)


def _drop(module: nn.Module, name: str) -> None:
    if name in vars(module):
        delattr(module, name)


def _swap(module: nn.Module, kind: type[nn.Module]) -> None:
    for name in [name for name in module._modules if name in ("a", "c", "0")]:
        module._modules[name] = kind()


CHANGES: dict[str, Callable[[nn.Module, Any], object]] = {
    "set": lambda m, value: setattr(m, "number", value),
    "set another": lambda m, value: setattr(m, "none", value),
    "delete": lambda m, value: _drop(m, "sizes"),
    "unread": lambda m, value: setattr(m, "nobody_reads_this", value),
    "forward": lambda m, value: vars(m).update(forward=value),
    "no forward": lambda m, value: _drop(m, "forward"),
    "class": lambda m, value: setattr(m, "__class__", Other) if isinstance(m, Leaf) else None,
    "child": lambda m, value: _swap(m, Leaf),
    "child of another class": lambda m, value: _swap(m, Other),
    "one more": lambda m, value: m.add_module("more", Leaf()),
    "one less": lambda m, value: m._modules.pop("more", None),
    "order": lambda m, value: setattr(m, "_modules", dict(reversed(m._modules.items()))),
    "dict": lambda m, value: setattr(m, "_modules", dict(m._modules)),
}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PATHS), st.sampled_from(list(CHANGES)), st.sampled_from(VALUES)), max_size=6
    )
)
def test_the_walk_holds_exactly_while_each_guard_does(changes: list[tuple[str, str, Any]]) -> None:
    module = _tree()
    check, guards = _taken(module)
    found = {guard: _facts(guard, eval(guard.name, {"L": {"self": module}})) for guard in guards}
    for path, change, value in changes:
        try:
            part = module.get_submodule(path)
        except AttributeError:
            continue  # gone with a child
        CHANGES[change](part, value)
        assert check(module) == all(_holds(guard, facts, module) for guard, facts in found.items())


def test_after_a_change_that_is_none_the_native_check_is_enough_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = _tree()
    check, _ = _taken(module)
    any_type(module).a.number = float("1.5")
    any_type(module).b = Leaf()
    assert check(module)
    monkeypatch.setattr(check, "_renew", lambda root: pytest.fail("the table was not made anew"))
    assert check(module)


def test_another_model_of_the_class_is_not_this_one() -> None:
    check, _ = _taken(_tree())
    assert not check(_tree())


def test_a_key_that_cannot_be_compared_is_no_error() -> None:
    class Bad:
        def __hash__(self) -> int:
            return hash("number")

        def __eq__(self, other: object) -> bool:
            raise RuntimeError("not comparable")

    module = _tree()
    check, _ = _taken(module)
    del vars(module)["number"]
    vars(module)[any_type(Bad())] = 1
    assert not check._unchanged(module, *check._where)


def test_what_is_no_plain_look_up_stays_with_dynamo() -> None:
    class Computed(Leaf):
        @property
        def share(self) -> float:
            return 0.5

    class Watching(Leaf):
        def __getattribute__(self, name: str) -> Any:
            return super().__getattribute__(name)

    build.load()
    root = Leaf()
    root.computed, root.watching = Computed(), Watching()
    any_type(root).values, root.tensor = [1, 2], torch.ones(2)
    vars(root.computed)["share"] = 0.25  # behind the property
    modules = AttrSource(ROOT, "_modules")
    sources = {
        "property": AttrSource(DictGetItemSource(modules, "computed"), "share"),
        "class attribute": AttrSource(ROOT, "dump_patches"),
        "__getattribute__": AttrSource(DictGetItemSource(modules, "watching"), "number"),
        "list": AttrSource(ROOT, "values"),
        "tensor": AttrSource(ROOT, "tensor"),
        "another local": AttrSource(LocalSource("x"), "number"),
    }
    guards = {name: source.make_guard(GuardBuilder.CONSTANT_MATCH) for name, source in sources.items()}
    number = AttrSource(ROOT, "number").make_guard(GuardBuilder.CONSTANT_MATCH)
    check, taken = take_over(ROOT, root, [*guards.values(), number])
    assert check is not None
    assert taken == {number}


def test_the_same_object_in_two_places() -> None:
    build.load()
    root = Leaf()
    root.a, root.b, root.c = Leaf(), Leaf(), Leaf()
    shared = object()
    parts = [any_type(root.a), any_type(root.b), any_type(root.c)]
    for part in parts:
        part.config = shared
    modules = AttrSource(ROOT, "_modules")
    first, *others = (AttrSource(DictGetItemSource(modules, name), "config") for name in "abc")
    guards = [
        first.make_guard(functools.partial(GuardBuilder.DUPLICATE_INPUT, source_b=other)) for other in others
    ]
    check, taken = take_over(ROOT, root, guards)
    assert check is not None
    assert taken == set(guards)
    assert check(root)
    parts[1].config = object()
    assert not check(root)
    parts[0].config = parts[2].config = parts[1].config
    assert check(root)


# ---- compiled models ---------------------------------------------------------------------------------------


class Config:
    gain = 1.0


class Step(nn.Module):
    def __init__(self, seed: int, config: Config) -> None:
        super().__init__()
        self.layer = sparse_linear(32, 32, 4, seed=seed)
        self.config, self.scale = config, 1.5

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.layer(x)) * self.scale * self.config.gain


class Minus(Step):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class Net(nn.Module):
    """Whose forward depends on attributes in many ways."""

    gain = 0.5

    def __init__(self) -> None:
        super().__init__()
        config = Config()
        self.steps = nn.ModuleList(Step(seed, config) for seed in range(3))
        self.mode, self.signs, self.offset = "plus", (1, -1), any_type(None)
        self.gain = 2.0

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        if self.training:
            x = x * 0.125
        if self.offset is not None:
            x = x + self.offset
        return (x if self.mode == "plus" else -x) * self.signs[1] * self.gain


def _other_config(net: Net) -> None:
    net.steps[1].config = any_type(Config())
    any_type(net.steps[1].config).gain = 3.0


SEEN: dict[str, Callable[[Net], object]] = {
    "number": lambda net: setattr(net.steps[1], "scale", 0.25),
    "string": lambda net: setattr(net, "mode", "minus"),
    "tuple": lambda net: setattr(net, "signs", (1, 2)),
    "None": lambda net: setattr(net, "offset", 4.0),
    "flag": lambda net: net.train(),
    "class": lambda net: setattr(net.steps[2], "__class__", Minus),
    "forward": lambda net: setattr(net.steps[0], "forward", torch.neg),
    "one less": lambda net: net.steps.pop(1),
    "order": lambda net: setattr(
        net.steps, "_modules", dict(zip("012", reversed(list(net.steps)), strict=True))
    ),
    "the class's": lambda net: delattr(net, "gain"),
    "no longer shared": _other_config,
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("change", SEEN)
def test_a_compiled_model_follows_its_attributes(change: str) -> None:
    net, x = Net().eval(), randn(5, 32)
    with recorded():
        run = compiled(net)
        assert_equals_model(run(x), net, x)
        before = run(x)
        SEEN[change](net)
        after = run(x)
        assert_equals_model(after, net, x)
    assert not torch.allclose(before, after)


UNSEEN: dict[str, Callable[[Net], object]] = {
    "nothing": lambda net: None,
    "equal number": lambda net: setattr(net.steps[1], "scale", float("1.5")),
    "equal tuple": lambda net: setattr(net, "signs", tuple(-s for s in (-1, 1))),
    "nobody reads it": lambda net: setattr(net, "note", "a note"),
    "another dict": lambda net: setattr(net.steps, "_modules", dict(net.steps._modules)),
    "train and back": lambda net: net.train().eval(),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("change", UNSEEN)
def test_what_changes_nothing_compiles_nothing(change: str) -> None:
    net, x = Net().eval(), randn(5, 32)
    with recorded() as compilations:
        run = compiled(net)
        run(x)
        UNSEEN[change](net)
        assert_equals_model(run(x), net, x)
    assert len(compilations) == 1


@pytest.mark.usefixtures("dynamo")
def test_guards_are_taken_over_and_without_the_kernels_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[object] = []
    check = AttributeGuard.__call__

    def noted(self: AttributeGuard, root: object) -> bool:
        checked.append(root)
        return check(self, root)

    monkeypatch.setattr(AttributeGuard, "__call__", noted)
    net, x = Net().eval(), randn(5, 32)
    with recorded():
        run = compiled(net)
        run(x)
        run(x)
    assert len(checked) > 1
    assert all(root is net for root in checked)
    del checked[:]
    torch._dynamo.reset()
    monkeypatch.setattr(build, "python_library", lambda: None)
    with recorded():
        run = compiled(net)
        run(x)
        net.mode = "minus"
        assert_equals_model(run(x), net, x)
    assert not checked
