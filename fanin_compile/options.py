"""The options of the backend, checked by name: torch itself accepts any and drops what a backend does not read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fanin_compile.errors import OptionError

VALUES_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Options:
    """`torch.compile(model, backend="fanin", options={...})`.

    Attributes:
        strict: raise RewriteError where the backend would otherwise leave a graph untouched with a warning.
        cost_gate: condense a layer only if the host's measured costs say that it gains; False: always.
        max_autotune: choose each linear layer's variant, or dense, by measuring it at its batch size, instead of by the
            cost gate's estimate; about 0.3 s for each distinct layer. mode="max-autotune" sets it, too.
        values_dtype: store the condensed values so (float32, bfloat16, float16); None keeps the weight's.
        verify_contents: also compare a hash of every packed weight at each call. Sees writes through `.data` and numpy
            aliases, which no version counter shows, and reads every dense weight once a call.
        inductor: config patches for the rest of the graph, as torch._inductor.config spells them.
    """

    strict: bool = False
    cost_gate: bool = True
    max_autotune: bool = False
    values_dtype: torch.dtype | None = None
    verify_contents: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Options:
        """Check names and values; `mode` is one of inductor's and sets its options beneath `inductor`.

        Raises:
            OptionError: an unknown name, a value of the wrong type, an unknown mode.
        """
        given = dict(options or {})
        known = {f.name for f in dataclasses.fields(cls)}
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" (did you mean {close[0]}?)" if close else ""
                raise OptionError(
                    f"unknown option {name!r}{hint}, expected one of {', '.join(sorted(known))}"
                )
        for name in ("strict", "cost_gate", "max_autotune", "verify_contents"):
            if not isinstance(given.get(name, False), bool):
                raise OptionError(f"option {name} is {given[name]!r}, expected True or False")
        if given.get("values_dtype") not in (None, *VALUES_DTYPES):
            allowed = ", ".join(str(d) for d in VALUES_DTYPES)
            raise OptionError(
                f"option values_dtype is {given['values_dtype']!r}, expected None or one of {allowed}"
            )
        if not isinstance(given.get("inductor", {}), Mapping):
            raise OptionError(
                f"option inductor is {given['inductor']!r}, expected a dict of inductor config patches"
            )
        given.setdefault("max_autotune", str(mode).startswith("max-autotune"))
        given["inductor"] = {**_mode_patches(mode), **given.get("inductor", {})}
        _check_inductor(given["inductor"])
        return cls(**given)

    def finish(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], **patches: object
    ) -> Callable[..., Any]:
        """Hand a graph to inductor with these config patches and the user's on top."""
        from torch._inductor.compile_fx import compile_fx

        compiled = compile_fx(gm, example_inputs, config_patches={**patches, **self.inductor})
        assert callable(compiled)  # the other kinds are what its ahead-of-time modes return
        return compiled


def _mode_patches(mode: str | None) -> dict[str, Any]:
    from torch._inductor import list_mode_options

    if mode in (None, "default"):
        return {}
    modes = list_mode_options()
    if mode not in modes:
        raise OptionError(f"unknown mode {mode!r}, expected one of {', '.join(sorted(modes))}")
    return dict(modes[mode])


def _check_inductor(patches: Mapping[str, Any]) -> None:
    from torch._inductor import config

    for name in patches:
        if name not in config._config:  # type: ignore[attr-defined]  # installed at run time
            raise OptionError(
                f"option inductor names {name!r}, which torch {torch.__version__}'s inductor does not know"
            )
