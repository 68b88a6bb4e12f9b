from __future__ import annotations

from typing import Any

import pytest
import torch

from fanin_compile import OptionError
from fanin_compile.options import Options


def test_defaults() -> None:
    assert Options.parse() == Options()
    assert Options.parse({}, "default") == Options(strict=False, cost_gate=True, inductor={})


def test_every_field_is_taken() -> None:
    given: dict[str, Any] = {
        "strict": True,
        "cost_gate": False,
        "values_dtype": torch.float16,
        "verify_contents": True,
        "inductor": {"max_autotune": True, "cpp.threads": 1},
    }
    assert Options.parse(given) == Options(**given)


def test_the_mode_stands_beneath_inductors_options() -> None:
    options = Options.parse({"inductor": {"max_autotune": False}}, "max-autotune")
    assert options.inductor["max_autotune"] is False
    assert options.inductor["coordinate_descent_tuning"] is True
    assert Options.parse(None, "max-autotune").inductor["max_autotune"] is True


@pytest.mark.parametrize(
    ("given", "mode", "message"),
    [
        (
            {"strickt": True},
            None,
            r"unknown option 'strickt' \(did you mean strict\?\), expected one of cost_gate, ",
        ),
        ({"freeze": True}, None, r"unknown option 'freeze', expected one of"),
        ({"strict": 1}, None, r"option strict is 1, expected True or False"),
        ({"cost_gate": "no"}, None, r"option cost_gate is 'no', expected True or False"),
        (
            {"values_dtype": "bf16"},
            None,
            r"option values_dtype is 'bf16', expected None or one of torch.float32",
        ),
        ({"inductor": True}, None, r"option inductor is True, expected a dict of inductor config patches"),
        ({"inductor": {"max_autotun": 1}}, None, r"option inductor names 'max_autotun', which torch 2\."),
        ({}, "fast", r"unknown mode 'fast', expected one of default, .*max-autotune"),
    ],
)
def test_refusals(given: dict[str, Any], mode: str | None, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse(given, mode)
