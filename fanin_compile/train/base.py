"""What every sparse training method shares: masks, masked gradients and optimizer state, checkpoints, the end.

Methods that move connections are in dynamic.py; the methods themselves in srigl.py and baselines.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn, SupportsIndex, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fanin_compile.errors import FaninError, OptionError
from fanin_compile.train.allocation import fan_in
from fanin_compile.train.checkpoint import restore, save
from fanin_compile.train.initialise import InitScheme, check_scheme, initial_weight
from fanin_compile.train.layers import MhaBlocks, SparseLayer, unwrap
from fanin_compile.train.optimizer_state import clear_inactive_state, group_of, is_elementwise
from fanin_compile.train.plan import LayerOptions, make_plan
from fanin_compile.train.shards import from_first_rank, keep_from_ddp, local
from fanin_compile.train.topology import random_fan_in


class SparseTraining:
    """Trains ``model`` sparse from its first step on; call ``step()`` after each ``optimizer.step()``.

    The constructor gives each chosen weight a bool buffer ``<weight>_mask``, sets the weight to 0 off it, and
    hooks its gradient: it is masked after each backward, so that clipping, gradient scalers and the optimizer
    see gradients of active weights only. A weight that has a mask already (from ``prune_to_fan_in``, or an
    earlier sparse training) starts from it and keeps its values, whatever ``allocation`` and ``sparsity`` say;
    a warning tells when its masks are of another sparsity, and leaving such a weight out is refused.

    Whatever replaces Parameters comes before: ``fully_shard``, then the optimizer, then this; DistributedDataParallel
    before or after. A replaced Parameter is noticed by ``step()``. Copies of ``self`` are refused.

    Args:
        model: any module; DistributedDataParallel and torch.compile wrappers are looked through.
        optimizer: any torch optimizer that holds the weights; its per-element state is kept clear off the mask. After
            each step of one that torch does not ship, weights and state are masked anew. On a CPU take ``fused=True``
            where there is one (Adam, AdamW, SGD, Adagrad): Adam's other forms take square roots of the zeros in the
            state, at which MKL is ten times slower than at other numbers.
        sparsity: share of zeros over all sparse layers together, 0 <= s < 1. Decimals are exact: 0.9 is 9/10.
        allocation: "erk" (the larger a layer the sparser) or "uniform".
        erk_power: the ERK power scale exponent.
        dense_first: leave the first layer dense; by default, as is the custom, under "uniform" only.
        include: which layers to make sparse, by default all that can be: names ("fc1"), globs
            ("blocks.*.mlp.*"), module types, predicates (module, name) -> bool, or several of these.
        exclude: which layers to leave dense; wins over ``include``.
        overrides: name or glob -> a sparsity of its own, the first match counting; the others share
            ``sparsity``.
        init: "scale" multiplies the weights as they are by sqrt(dense fan-in / fan-in), "he" and "xavier"
            draw new ones for the sparse fan-in, "keep" only masks.
        seed: of every random choice; nothing depends on the global generators or on the rank.

    Raises:
        OptionError: an option out of its range, a pattern that matches no layer, a layer left without inputs,
            a weight that the optimizer does not hold.
    """

    _mha_blocks: MhaBlocks = "matrix"  # blocks matter to methods that rank weights

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        sparsity: float = 0.9,
        init: InitScheme = "scale",
        seed: int = 0,
        **layer_options: Unpack[LayerOptions],
    ) -> None:
        check_scheme(init)
        self.model = unwrap(model)
        self.optimizer = optimizer
        self.seed = seed
        self.steps = 0
        self.finalized = False
        self._masks_weights = not is_elementwise(optimizer)
        self.plan = make_plan(
            self.model, sparsity=sparsity, blocks=self._mha_blocks, keep_masks=True, **layer_options
        )
        self.layers = self.plan.sparse
        for layer in self.layers:
            group_of(optimizer, layer)  # raises for a weight that the optimizer does not hold
        self._check_layers()
        for index, layer in enumerate(self.layers):
            self._start(layer, index, init)
        keep_from_ddp(self.model, [f"{name}_mask" for layer in self.layers for name in layer.tied_names])
        self._handles = [
            layer.param.register_post_accumulate_grad_hook(partial(self._on_gradient, layer))
            for layer in self.layers
        ]

    # What a method chooses.

    def _check_layers(self) -> None:
        """Refuse, and mark, planned layers before any of them is changed."""
        for layer in self.layers:
            fan_in(layer.name, min(layer.budgets), 1 if layer.has_mask else layer.block_neurons)

    def _first_mask(self, layer: SparseLayer, budget: int, generator: torch.Generator) -> Tensor:
        """Bool [layer.block_neurons, dense fan-in] on the CPU, with ``budget`` active weights or a bit less."""
        k = fan_in(layer.name, budget, layer.block_neurons)
        return random_fan_in(layer.block_neurons, layer.dense_fan_in, k, generator)

    def _after_step(self) -> bool:
        """What else a step does, now that it is counted; returns whether the topology changed."""
        return False

    @property
    def dense_gradient_share(self) -> float:
        """Share of optimizer steps, at this stage of the training, whose weight gradient has to be dense."""
        return 0.0

    # The start.

    @torch.no_grad()
    def _start(self, layer: SparseLayer, index: int, init: InitScheme) -> None:
        generator = self._generator(index)
        if layer.has_mask:
            init = "keep"
            mask = from_first_rank(layer.rows(layer.mask))
            layer.budgets = layer.counts(mask)
        else:
            blocks = [self._first_mask(layer, budget, generator) for budget in layer.budgets]
            mask = from_first_rank(torch.cat(blocks).to(layer.param.device))
        layer.set_mask(mask)
        layer.explored = layer.mask.clone()
        weight = initial_weight(layer.weight_rows(), mask, init, generator)
        layer.set_weight(weight)
        self._apply_mask(layer)  # to gradients and state of an earlier, dense training too

    def _generator(self, index: int) -> torch.Generator:
        """Fresh for each step and layer, so that a resumed run needs no generator state."""
        seed = ((self.seed * 1_000_003 + self.steps) * 1_000_003 + index) % 2**63
        return torch.Generator().manual_seed(seed)

    # Every step.

    @torch.no_grad()
    def _on_gradient(self, layer: SparseLayer, param: Tensor) -> None:
        if param.grad is None:
            return
        grad, multiplier = local(param.grad), layer.multiplier()  # named first: Dynamo breaks its graph else
        grad.mul_(multiplier)

    @torch.no_grad()
    def step(self) -> bool:
        """Count one optimizer step and, when it is time, update the topology. Returns whether it changed it.

        An update whose gradient is not finite (a step that a GradScaler skipped) waits for the next step. Raises
        FaninError when the model holds another Parameter than the one that is trained.
        """
        if self.finalized:
            raise FaninError("step() after finalize(): the hooks that masked gradients are gone")
        for layer in self.layers:
            layer.check_in_place()
        self.steps += 1
        if self._masks_weights:
            for layer in self.layers:
                layer.zero_inactive(layer.param)
                clear_inactive_state(self.optimizer, layer)
        return self._after_step()

    def _apply_mask(self, layer: SparseLayer) -> None:
        layer.zero_inactive(layer.param)
        if layer.param.grad is not None:
            layer.zero_inactive(layer.param.grad)
        clear_inactive_state(self.optimizer, layer)
        if layer.explored is not None:
            layer.explored |= layer.mask

    # Checkpoints and the end.

    def state_dict(self, *, grads: bool = False) -> dict[str, Any]:
        """Everything a resumed run needs besides the state of the model and of the optimizer.

        Under several processes each rank saves its own, for a recorded gradient is the rank's. With ``grads``
        it also holds every ``.grad`` of the model: a run cut between micro-batches then goes on bit for bit.
        """
        state = {"method": type(self).__name__, "steps": self.steps, "seed": self.seed}
        return state | save(self.layers, self.model if grads else None)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; load the state of model and optimizer too, in any order.

        With several processes every rank calls it, with its own state. Raises, before anything is changed, OptionError
        for the state of another method or of other layers, FaninError where ranks stand at other steps or masks.
        """
        if state["method"] != type(self).__name__:
            raise OptionError(f"the state is of {state['method']}; expected {type(self).__name__}")
        restore(self.layers, self.model, state)
        self.steps, self.seed = state["steps"], state["seed"]
        for layer in self.layers:
            self._apply_mask(layer)

    def finalize(self, *, keep_masks: bool = True) -> nn.Module:
        """Remove every hook and record; what is left is a plain module whose weights are 0 off their masks.

        ``keep_masks`` leaves the ``<weight>_mask`` buffers, by which the compiler knows an active weight that
        happens to be exactly 0. Returns the model.

        Raises, before anything is removed, MaskError where something wrote a weight off its mask, and FaninError
        where a Parameter was replaced.
        """
        if not self.finalized:
            for layer in self.layers:
                layer.check_in_place()
                layer.check_zeros()
            for handle in self._handles:
                handle.remove()
            for layer in self.layers:
                layer.release()
                if not keep_masks:
                    layer.remove_mask()
        self.finalized = True
        return self.model

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """A copy would be hooked to the weights of the original."""
        raise FaninError(
            f"{type(self).__name__} cannot be copied or pickled; expected a new one, made with the copies of model and "
            "optimizer, and load_state_dict(state_dict()) on it"
        )

    def __repr__(self) -> str:
        stage = ", finalized" if self.finalized else self._more()
        lines = [f"{type(self).__name__} at step {self.steps}{stage}"]
        lines += [f"  {layer.name}: {self._describe(layer)}" for layer in self.layers]
        lines += [f"  {name}: dense ({reason})" for name, reason in self.plan.dense.items()]
        return "\n".join(lines)

    def _describe(self, layer: SparseLayer) -> str:
        return layer.describe()

    def _more(self) -> str:
        """What the first line of the repr says besides the step."""
        return ""
