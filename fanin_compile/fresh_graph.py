"""A compiled graph, and what keeps it from serving stale weights."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import config as inductor_config

from fanin_compile import guards
from fanin_compile.capture import Captured, relift
from fanin_compile.errors import RewriteError
from fanin_compile.freshness import Watch
from fanin_compile.options import Options
from fanin_compile.rewriting import rewrite, runnable, warn_once

log = logging.getLogger("fanin_compile")


def freezing(settings: Options) -> bool:
    """Whether inductor bakes the tensors that a graph holds into its code."""
    return bool(settings.inductor.get("freezing", inductor_config.freezing))


class FreshGraph:
    """A compiled graph which packs its weights anew, or steps aside, when they are no longer those it was made for."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        needed: tuple[int, ...],
        original: fx.GraphModule,
        captured: Captured,
        rewritten: fx.GraphModule,
        constants: Mapping[int, Tensor],
        settings: Options,
        packed: tuple[int, ...],
        inputs: tuple[Any, ...],
    ) -> None:
        self._compiled: Callable[..., Any] | None = compiled
        self._captured: Captured | None = captured
        self._rewritten: fx.GraphModule | None = rewritten
        self._needed, self._original, self._held = needed, original, captured.held
        self._packed, self._settings = packed, settings
        self._hand_out(constants)
        self._watch = Watch(
            packed, inputs, witnesses=_witnesses(captured, packed), contents=settings.verify_contents
        )
        self._lock = threading.Lock()
        self._frozen = freezing(settings)
        self._epoch = guards.open_epoch()
        weakref.finalize(self, guards.close_epoch, self._epoch)

    def __call__(self, *args: Any) -> Any:
        compiled, inputs = self._compiled, args + self._held
        if compiled is None:
            return self._original(*args)
        if torch.is_grad_enabled() and any(inputs[i].requires_grad for i in self._packed):
            return self._original(*args)  # unfrozen since: Dynamo does not guard parameters on this
        if not self._fresh(inputs) and not self._repack(inputs):
            return self._original(*args)
        outputs = compiled(*[args[i] for i in self._needed])
        if self._constants:
            outputs = list(outputs)
            for i, tensor, _ in self._constants:
                outputs.insert(i, tensor)
        return outputs

    def _hand_out(self, constants: Mapping[int, Tensor]) -> None:
        self._constants = [(i, constants[i], constants[i]._version) for i in sorted(constants)]

    def _fresh(self, inputs: tuple[Any, ...]) -> bool:
        # a user may have written to what was handed out
        return self._watch.fresh(inputs) and all(t._version == version for _, t, version in self._constants)

    def _repack(self, inputs: tuple[Any, ...]) -> bool:
        """Bring the packed constants up to date; False if their structure changed: the graph is compiled anew."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            captured, current = self._captured, self._rewritten
            if captured is None or current is None:  # another thread was first
                return False
            if self._fresh(inputs):
                return True
            if not self._watch.same_kind(inputs):
                return self._give_up("a weight has another type, dtype, size or stride")
            try:
                relift(captured.graph_module, {i: inputs[i] for i in captured.statics})
                rewritten, constants, _ = runnable(rewrite(captured, self._settings))
            except Exception as error:
                if self._settings.strict:
                    raise RewriteError(f"fanin could not pack changed weights anew: {error}") from error
                warn_once(f"fanin could not pack changed weights anew after {type(error).__name__}: {error}")
                return self._give_up("packing failed")
            new, old = dict(rewritten.named_buffers()), dict(current.named_buffers())
            same = not self._frozen and rewritten.code == current.code
            if not same or any(_layout(new[name]) != _layout(old[name]) for name in old):
                return self._give_up("the structure of its masks changed")
            for name, buffer in old.items():
                if buffer is not new[name]:  # else one that Dynamo's graph holds
                    buffer.copy_(new[name])
            self._hand_out(constants)
            self._watch.renew(self._packed, inputs)
            log.info("graph %d: weights changed, packed anew", self._epoch)
            return True

    def _give_up(self, why: str) -> bool:
        log.info("graph %d: %s, compiling anew", self._epoch, why)
        guards.raise_epoch(self._epoch)
        # Dynamo keeps this object, and calls it no more
        self._compiled = self._captured = self._rewritten = None
        return False


def _witnesses(captured: Captured, packed: Sequence[int]) -> list[Tensor]:
    """The batch counters of norms whose running statistics are packed: updating those does not raise their version."""
    counters: dict[int, Tensor] = {}
    for owner in (captured.owners.get(i) for i in packed):
        if owner is not None and owner.name in ("running_mean", "running_var"):
            counter = getattr(owner.module(), "num_batches_tracked", None)
            if isinstance(counter, Tensor):
                counters[id(counter)] = counter
    return list(counters.values())


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride()
