"""Modules which hold a condensed weight in the place of a dense one: what condense() puts into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fanin_compile import ops, ops_conv  # noqa: F401  (they define the operators called below)
from fanin_compile.condensed import CondensedWeight
from fanin_compile.errors import FormatError
from fanin_compile.packed import Packed, unpack
from fanin_compile.packed_conv import unpack_conv
from fanin_compile.packing import pack
from fanin_compile.packing_conv import pack_conv


class CondensedLayer(nn.Module):
    """The state every condensed layer has: `values` and `bias` are parameters (trainable), the structure is buffers.

    Args:
        shape: of the dense weight.
        values: taken over, not copied.
        structure: the buffers by name; None for a part this weight does not need.
        bias: [out] or None.
        requires_grad: of `values`.
    """

    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        shape: tuple[int, ...],
        values: Tensor,
        structure: Mapping[str, Tensor | None],
        bias: Tensor | None,
        *,
        requires_grad: bool,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.values = nn.Parameter(values, requires_grad=requires_grad)
        self._parts = tuple(structure)
        for name, part in structure.items():
            self.register_buffer(name, part)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)

    @property
    def condensed(self) -> CondensedWeight:
        """The condensed weight, row by row."""
        return self._condensed(self.values.detach(), {part: getattr(self, part) for part in self._parts})

    def _condensed(self, values: Tensor, structure: Mapping[str, Tensor | None]) -> CondensedWeight:
        """What these parts say. FormatError if they do not fit together."""
        raise NotImplementedError

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
        values = state_dict.get(prefix + "values")
        parts = {name: state_dict.get(prefix + name) for name in self._parts}
        if values is not None and parts[self._parts[0]] is not None:
            try:
                shape = self._condensed(values, parts).shape
                if shape != self.shape:
                    raise FormatError(f"a weight of shape {shape}, expected {self.shape}")
            except FormatError as error:
                raise FormatError(f"state_dict entries {prefix}*: {error}") from error
            for name, given in parts.items():
                old = getattr(self, name)
                if given is None:
                    setattr(self, name, None)
                elif old is None or old.shape != given.shape:
                    setattr(self, name, torch.empty_like(given, device=self.values.device))
            if self.values.shape != values.shape:
                empty = self.values.new_empty(values.shape)
                self.values = nn.Parameter(empty, requires_grad=self.values.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CondensedLinear(CondensedLayer):
    """nn.Linear with a condensed weight: [..., in] -> [..., out], every stride, every number of leading dimensions.

    It holds the weight packed (fanin_compile.packing): `values` in the order of the kernels, `structure` as bytes.
    """

    structure: Tensor

    def __init__(self, weight: CondensedWeight, bias: Tensor | None, *, requires_grad: bool = False) -> None:
        packed = pack(weight)
        super().__init__(
            weight.shape, packed.values, {"structure": packed.structure}, bias, requires_grad=requires_grad
        )
        self.out_features, self.in_features = weight.shape

    def _condensed(self, values: Tensor, structure: Mapping[str, Tensor | None]) -> CondensedWeight:
        bytes_ = structure["structure"]
        assert bytes_ is not None
        return unpack(Packed(values, bytes_))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_matmul(
            self._cast(x), self.values, self.structure, self.bias, self.out_features
        )
        return y


class CondensedConv(CondensedLayer):
    """nn.Conv1d, nn.Conv2d or nn.Conv3d (groups included) with a condensed weight; zero padding only.

    It holds the weight packed (fanin_compile.packing_conv): `values` in the order of the kernel, `structure` as bytes.

    Args:
        memory_format: of the dense weight. As torch's, outputs are channels_last where it or x is.
    """

    structure: Tensor
    memory_format: torch.memory_format = torch.contiguous_format

    def __init__(
        self,
        weight: CondensedWeight,
        bias: Tensor | None,
        *,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
        memory_format: torch.memory_format = torch.contiguous_format,
        requires_grad: bool = False,
    ) -> None:
        packed = pack_conv(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
        super().__init__(
            weight.shape, packed.values, {"structure": packed.structure}, bias, requires_grad=requires_grad
        )
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.memory_format = memory_format
        # models read these of their convolutions, to pad by hand for one
        self.out_channels, self.in_channels = weight.shape[0], weight.shape[1] * groups
        self.kernel_size, self.padding_mode = weight.shape[2:], "zeros"

    def _condensed(self, values: Tensor, structure: Mapping[str, Tensor | None]) -> CondensedWeight:
        bytes_ = structure["structure"]
        assert bytes_ is not None
        return unpack_conv(Packed(values, bytes_), self.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.fanin.gather_conv(
            *(self._cast(x), self.values, self.structure, self.bias),
            *(self.shape, self.stride, self.padding, self.dilation, self.groups),
        )
        if self.memory_format != torch.contiguous_format and not self._ignores_format(x):
            # later views rely on it; with dimensions moved, as x may have no batch and may be a proxy of torch.fx
            channel = 1 - len(self.shape)
            y = y.movedim(channel, -1).contiguous().movedim(-1, channel)
        return y

    def _ignores_format(self, x: Tensor) -> bool:
        """Where torch's convolution is contiguous, whatever the format of its weight."""
        if len(self.shape) < 5:
            return False
        unbatched = isinstance(x, Tensor) and x.ndim < len(self.shape)
        return unbatched or self.values.dtype == torch.float64

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )
