"""SRigL: dynamic sparse training with a constant fan-in (Lasby et al., ICLR 2024, arXiv 2305.02299)."""

from __future__ import annotations

from typing import Literal, Unpack

from torch import Tensor, nn
from torch.optim import Optimizer

from fanin_compile.errors import OptionError
from fanin_compile.train.dynamic import Block, DynamicTraining
from fanin_compile.train.layers import SparseLayer
from fanin_compile.train.options import UpdateOptions
from fanin_compile.train.plan import choose
from fanin_compile.train.selection import Patterns
from fanin_compile.train.topology import constant_fan_in_update


class SRigL(DynamicTraining):
    """Every neuron of a layer has the same number k of inputs, chosen anew every ``delta_t`` steps.

    >>> s = SRigL(model, optimizer, sparsity=0.9, total_steps=n)  # then, for each batch:
    >>> optimizer.step(); s.step()

    Args:
        ablation: remove neurons with too few salient weights and give their budget to the others.
        gamma_sal: a neuron is ablated when fewer than max(1, gamma_sal * reference) of its weights are
            salient. The paper takes 0.3 for convolutional networks and 0.95 for vision transformers.
        ablation_reference: "sparse", the layer's fan-in before any ablation, or "dense", its dense fan-in.
        ablate_last: allow ablation in the layer registered last, whose neurons are, as a rule, the model's
            outputs. Where they are not, or a model has several heads, name these in ``no_ablation``; the repr
            says which layers are never ablated.
        no_ablation: layers in which no neuron is ever ablated, said as in ``include``.
        **options: DynamicTraining's and SparseTraining's.

    Raises:
        OptionError: an option out of its range, one about ablation with ``ablation=False``, and as SparseTraining.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        ablation: bool = True,
        gamma_sal: float = 0.3,
        ablation_reference: Literal["sparse", "dense"] = "sparse",
        ablate_last: bool = False,
        no_ablation: Patterns = (),
        **options: Unpack[UpdateOptions],
    ) -> None:
        if not 0.0 <= gamma_sal <= 1.0:
            raise OptionError(f"gamma_sal is {gamma_sal}; expected 0 <= gamma_sal <= 1")
        if ablation_reference not in ("sparse", "dense"):
            raise OptionError(f"ablation_reference is {ablation_reference!r}; expected 'sparse' or 'dense'")
        given = {
            "gamma_sal": gamma_sal != 0.3,
            "ablation_reference": ablation_reference != "sparse",
            "ablate_last": ablate_last,
            "no_ablation": bool(no_ablation),
        }
        if not ablation and any(given.values()):
            names = ", ".join(name for name, differs in given.items() if differs)
            raise OptionError(f"ablation is False, with {names}; expected none: they change nothing then")
        self._ablation = ablation
        self._gamma_sal = gamma_sal
        self._reference = ablation_reference
        self._ablate_last = ablate_last
        self._no_ablation = no_ablation
        super().__init__(model, optimizer, **options)

    def _check_layers(self) -> None:
        super()._check_layers()
        spared = choose(list(self.plan.found), "no_ablation", self._no_ablation)
        for layer in self.layers:
            layer.ablate = self._ablation and layer.name not in spared
            if layer.name == self.plan.last:
                layer.ablate &= self._ablate_last
            if layer.has_mask:
                _refuse_unequal(layer)

    def _describe(self, layer: SparseLayer) -> str:
        spared = ", never ablated" if self._ablation and not layer.ablate else ""
        return layer.describe() + spared

    def _next_mask(self, block: Block) -> Tensor:
        n, f = block.mask.shape
        reference = f if self._reference == "dense" else block.budget // n
        return constant_fan_in_update(
            block.weight,
            block.gradient,
            block.mask,
            fraction=block.fraction,
            active_weights=block.budget,
            min_salient=self._gamma_sal * reference if block.layer.ablate else None,
        )


def _refuse_unequal(layer: SparseLayer) -> None:
    """A mask to start from must have a constant fan-in already."""
    for block in layer.rows(layer.mask).chunk(layer.blocks):
        counts = block.sum(dim=1)
        found = counts[counts > 0].unique().tolist()
        if len(found) != 1:
            raise OptionError(
                f"layer {layer.name!r}: its {layer.mask_name} has fan-ins {found[:8]}; expected one for all "
                "neurons (prune_to_fan_in makes such a mask)"
            )
