"""Programs: their text and back, run by Python and by C++, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fanin_compile import ops
from fanin_compile.errors import FormatError
from fanin_compile.ops_program import MOST_OUTPUTS, program_op
from fanin_compile.program import (
    Instruction,
    Program,
    Register,
    Size,
    name_of,
    operator_named,
    parse,
    representable,
)

from .compile_support import any_type
from .strategies import seeds

aten = torch.ops.aten
run_program = torch.ops.fanin.run_program.default


@pytest.fixture(scope="module", autouse=True)
def native() -> None:
    assert ops.native_available()


_CONSTANTS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(("none", "gelu_tanh", "a b, [c]", "None", "")),
)
_ARGUMENTS = st.recursive(
    st.one_of(_CONSTANTS, st.builds(Register, st.integers(0, 99)), st.builds(Size, st.integers(0, 9))),
    lambda items: st.lists(items, max_size=3),
    max_leaves=6,
)
_STEPS = st.builds(
    Instruction,
    st.sampled_from(("fanin::gather_matmul", "aten::split.Tensor")),
    st.lists(st.one_of(st.none(), st.integers(0, 99)), max_size=3).map(tuple),
    st.lists(_ARGUMENTS, max_size=5).map(tuple),
)


@given(
    st.builds(
        Program,
        st.integers(0, 9),
        st.integers(0, 9),
        st.lists(_STEPS, max_size=4).map(tuple),
        st.lists(st.integers(0, 99)).map(tuple),
    )
)
def test_text_and_back(program: Program) -> None:
    assert parse(program.to_text()) == program


@pytest.mark.parametrize(
    "value",
    [
        math.inf,
        math.nan,
        torch.float32,
        "%7",
        "$1",
        'a"b',
        "a\\b",
        "a\nb",
        "ä",
        "a'b",
        "a; b",
        [1, torch.strided],
    ],
)
def test_what_cannot_stand_in_a_text_is_known(value: object) -> None:
    assert not representable(value)
    if not isinstance(value, str) or value[0] not in "%$":
        with pytest.raises(ValueError, match="cannot stand in a program"):
            Program(1, 0, (Instruction("aten::neg", (1,), (value,)),), (1,)).to_text()


def test_operators_by_name() -> None:
    for op in (aten.view.default, aten.split.Tensor, torch.ops.fanin.gather_conv.default):
        assert operator_named(name_of(op)) is op
    with pytest.raises(FormatError, match="'aten::no_such_thing', expected an operator"):
        operator_named("aten::no_such_thing")


# ---- running ---------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Of matrices [4, 4] alone: products, sums with factors, clamps, views and pieces, read in any order and often."""
    inputs, count = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    known, steps = list(range(inputs)), []

    def register() -> Register:
        return Register(draw(st.sampled_from(known)))

    for i in range(count):
        new = inputs + 2 * i
        kind = draw(st.sampled_from(("mm", "add", "clamp", "view", "pieces", "turned")))
        results: tuple[int | None, ...] = (new,)
        step: tuple[str, tuple[Any, ...]]
        if kind == "mm":
            step = ("aten::mm", (register(), register()))
        elif kind == "add":
            step = ("aten::add.Tensor", (register(), register(), draw(st.sampled_from((1, -2, 0.5)))))
        elif kind == "clamp":
            step = ("aten::clamp", (register(), draw(st.sampled_from((None, -1, -0.25))), 1))
        elif kind == "view":
            step = ("aten::reshape", (register(), [Size(0), 2 * 2]))
        elif kind == "turned":
            step = ("aten::as_strided", (Register(0), [4, 4], [1, 4], 0))
        else:
            results = draw(st.sampled_from(((new, None), (None, new), (new, new + 1))))
            step = ("aten::split.Tensor", (register(), 2, 0))
        steps.append(Instruction(step[0], results, step[1]))
        if kind == "pieces":  # [2, 4] each: doubled to be like the others
            pieces = [r for r in results if r is not None]
            new = 10_000 + i
            steps.append(Instruction("aten::repeat", (new,), (Register(pieces[-1]), [2, 1])))
        known.append(new)
    outputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=4))
    return Program(inputs, 1, tuple(steps), tuple(outputs))


@settings(deadline=None, max_examples=200)
@given(program=programs(), seed=seeds())
def test_cpp_does_what_python_does(program: Program, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(4, 4, generator=generator) / 4 for _ in range(program.inputs)]
    before = [x.clone() for x in inputs]
    with torch.no_grad():
        for _ in range(2):
            ours = run_program(inputs, [4], program.to_text())
            theirs = program(inputs, [4])
            assert len(ours) == len(theirs)
            for a, b in zip(ours, theirs, strict=True):
                assert (a.shape, a.stride()) == (b.shape, b.stride())
                assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def simple(*steps: Any, inputs: int = 1, outputs: tuple[int, ...] = (1,)) -> str:
    return Program(inputs, 0, tuple(Instruction(*step) for step in steps), outputs).to_text()


def test_what_is_read_for_the_last_time_is_freed() -> None:
    x = torch.randn(1 << 20)
    # of ten results one after the other, at most two are there at a time
    steps = [("aten::neg", (i + 1,), (Register(i),)) for i in range(10)]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        (y,) = run_program([x], [], simple(*steps, outputs=(10,)))
    assert torch.equal(y, x)
    held = most = 0
    for event in any_type(profile).profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 2 * x.nbytes <= most < 3 * x.nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ends early|no program"),
        ("nonsense", "no operator|no number|no program"),
        ("['program', 1, 0]", "no line 'return'|no program"),
        (simple(("aten::neg", (1,), (Register(2),))), "register 2 before it is written"),
        (simple(("aten::neg", (0,), (Register(0),)), outputs=(0,)), "register 0 twice"),
        (simple(("aten::neg", (1, 2), (Register(0),))), "takes 2 results of aten::neg, expected 1"),
        (simple(("aten::neg", (1,), (Register(0), 3))), "calls aten::neg with 2 arguments, expected 1"),
        (
            simple(("aten::no_such_thing", (1,), (Register(0),))),
            "'aten::no_such_thing', expected an operator",
        ),
        (simple(("aten::view", (1,), (Register(0), [Size(0)]))), "size 0 of 0"),
        (simple(("aten::view", (1,), (Register(0), ["none"]))), "holds what is no number"),
        (
            simple(("aten::neg", (2,), (Register(0),)), inputs=2),
            "given 1 tensors and 0 sizes, expected 2 and 0",
        ),
    ],
)
def test_what_is_no_program_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_program([torch.ones(3)], [], text)


def test_python_refuses_it_too() -> None:
    for text in ("", "nonsense", "['program', 1, 0]", "['return', []]", "['program', 1, 0]; ['retrun', []]"):
        with pytest.raises(FormatError, match="no program"):
            parse(text)
    with pytest.raises(ValueError, match="given 2 tensors and 0 sizes, expected 1 and 0"):
        parse(simple(("aten::neg", (1,), (Register(0),))))([torch.ones(1), torch.ones(1)])


# ---- as operators of torch -------------------------------------------------------------------------------

_SUM = ("aten::add.Tensor", (2,), (Register(0), Register(1), 2))
_WRITES = ("aten::add_.Tensor", (None,), (Register(1), Register(0), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    inputs = [torch.randn(3, 4, dtype=dtype) for _ in range(2)]
    for op in (run_program, program_op(1, writes=False)):
        torch.library.opcheck(op, (inputs, [], simple(_SUM, inputs=2, outputs=(2,))))
    for outputs in (1, 3, MOST_OUTPUTS):
        negs = [("aten::neg", (i,), (Register(1),)) for i in range(2, 2 + outputs)]
        text = simple(_WRITES, *negs, inputs=2, outputs=tuple(range(2, 2 + outputs)))
        torch.library.opcheck(program_op(outputs, writes=True), (inputs[:1], inputs[1:], [], text))


def test_a_compiled_graph_writes_to_its_own_inputs_and_copies_none() -> None:
    """Of a large cache that inductor must not clone, however it is given."""
    text = simple(_WRITES, ("aten::sum", (2,), (Register(1), None)), inputs=2, outputs=(2,))

    def step(x: Tensor, cache: Tensor) -> Tensor:
        y: Tensor = program_op(1, writes=True)([2 * x], [cache], [], text)
        return y + 1

    torch._dynamo.reset()
    fast = torch.compile(step, fullgraph=True)
    x, cache = torch.randn(512, 1024), torch.zeros(512, 1024)
    with torch.no_grad():
        fast(x, cache)
        cache.zero_()
        with torch.profiler.profile(profile_memory=True) as profile:
            y = fast(x, cache)
    assert torch.equal(cache, 2 * x)
    torch.testing.assert_close(y, (2 * x).sum() + 1)
    events = any_type(profile).profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert sum(n for n in allocated if n > 0) < 1.5 * x.nbytes  # 2 * x alone
