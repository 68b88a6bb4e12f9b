"""Modules which hold a condensed weight in the place of a dense one: what condense() puts into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile import ops, ops_conv  # noqa: F401  (they define the operators called below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError

_PARTS = ("indices", "row_ptr", "rows")


class CondensedLayer(nn.Module):
    """The state every condensed layer has: `values` and `bias` are parameters (trainable), the structure is buffers.

    Args:
        weight: the condensed weight; its tensors are taken over, not copied.
        bias: [out] or None.
        requires_grad: of `values`.
    """

    values: nn.Parameter
    indices: Tensor
    row_ptr: Tensor | None
    rows: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, weight: CondensedWeight, bias: Tensor | None, *, requires_grad: bool = False) -> None:
        super().__init__()
        self.shape = weight.shape
        self.values = nn.Parameter(weight.values, requires_grad=requires_grad)
        for part in _PARTS:
            self.register_buffer(part, getattr(weight, part))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @property
    def condensed(self) -> CondensedWeight:
        return CondensedWeight(self.values.detach(), self.indices, self.row_ptr, self.rows, self.shape)

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at each access: for code which reads `layer.weight`."""
        return self.condensed.to_dense()

    def _cast(self, x: Tensor) -> Tensor:
        """Under torch.autocast a layer computes in its dtype and returns it, as the dense one does."""
        values = self._parameters["values"]  # neither x nor self.values, for which torch.fx puts proxies
        assert values is not None
        if torch.is_autocast_enabled(values.device.type) and values.dtype != torch.float64:
            return x.to(torch.get_autocast_dtype(values.device.type))
        return x

    def extra_repr(self) -> str:
        return f"{self.condensed}, bias={self.bias is not None}"

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the structure of a checkpoint, too: its fan-in and ablated neurons may differ from this layer's."""
        values, *parts = (state_dict.get(prefix + part) for part in ("values", *_PARTS))
        if values is not None and parts[0] is not None:
            try:
                CondensedWeight(values, parts[0], parts[1], parts[2], self.shape)
            except FormatError as error:
                raise FormatError(f"state_dict entries {prefix}*: {error}") from error
            for name, given in zip(_PARTS, parts, strict=True):
                old = getattr(self, name)
                if given is None:
                    setattr(self, name, None)
                elif old is None or old.shape != given.shape:
                    setattr(self, name, torch.empty_like(given, device=self.values.device))
            if self.values.shape != values.shape:
                empty = self.values.new_empty(values.shape)
                self.values = nn.Parameter(empty, requires_grad=self.values.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._structure_changed()

    def _structure_changed(self) -> None:
        """Called when indices were replaced."""


class CondensedLinear(CondensedLayer):
    """nn.Linear with a condensed weight: [..., in] -> [..., out], every stride, every number of leading dimensions."""

    plan: Tensor | None

    def __init__(self, weight: CondensedWeight, bias: Tensor | None, *, requires_grad: bool = False) -> None:
        super().__init__(weight, bias, requires_grad=requires_grad)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("plan", None, persistent=False)
        self._structure_changed()

    def _structure_changed(self) -> None:
        self.plan = ops.gather_matmul_plan(self.indices, self.row_ptr, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(
            self._cast(x),
            self.values,
            self.indices,
            self.row_ptr,
            self.rows,
            self.bias,
            self.plan,
            self.out_features,
        )
        return y


class CondensedConv(CondensedLayer):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d (groups included) with a condensed weight; zero padding only."""

    def __init__(
        self,
        weight: CondensedWeight,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        requires_grad: bool = False,
    ) -> None:
        super().__init__(weight, bias, requires_grad=requires_grad)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        # models read these of their convolutions, to pad by hand for one
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.kernel_size, self.padding_mode = weight.shape[2:], "zeros"

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_conv(
            self._cast(x),
            *(self.values, self.indices, self.row_ptr, self.rows, self.bias),
            *(self.shape, self.stride, self.padding, self.dilation, self.groups),
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )
