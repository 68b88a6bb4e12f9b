"""Attention over cached, and new, keys and values: schemas, plain-torch reference, fake kernels, autograd.

    attend_cache(query, keys, values, mask?, scale?)
        y = scaled_dot_product_attention(query, keys, values, mask, scale)
    write_attend(query, keys!, values!, new_keys, new_values, position, mask?, scale?)
        keys.index_copy_(2, position, new_keys), values likewise; y = attend_cache(query, keys, values, mask, scale)
    attend_appended(query, past_keys, keys, past_values, values, mask?, scale?)
        y = scaled_dot_product_attention(query, cat([past_keys, keys], -2), cat([past_values, values], -2), mask, scale)
    append_attend(...)
        y, and the two concatenations

It is the step of a decoder with a cache: one query, or a few, reads all that came before it. torch copies the cache to
append a row and then reads the copy; of a cache made for more tokens than there are yet, it reads all. As for the
linear operators (ops.py), the first call on CPU builds and loads the C++ kernel, which takes over the CPU and
AutogradCPU keys; the reference serves everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops import until_native

_ARGUMENTS = (
    "(Tensor query, Tensor past_keys, Tensor keys, Tensor past_values, Tensor values, "
    "Tensor? mask=None, float? scale=None) -> "
)
_CACHE_ARGUMENTS = "(Tensor query, Tensor keys, Tensor values, Tensor? mask=None, float? scale=None) -> "
_WRITE_ARGUMENTS = (
    "(Tensor query, Tensor(a!) keys, Tensor(b!) values, Tensor new_keys, Tensor new_values, Tensor position, "
    "Tensor? mask=None, float? scale=None) -> "
)
Three = tuple[Tensor, Tensor, Tensor]


# ---- the reference ---------------------------------------------------------------------------------------


def reference_attend_cache(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """attend_cache in plain torch, for any dtype and device that torch attends in; differentiable. Args: see there."""
    grouped = bool(query.shape[1] != keys.shape[1])
    y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2).contiguous().transpose(1, 2)


def reference_write_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """write_attend in plain torch, for any dtype and device that torch attends in; differentiable. Args: see there."""
    keys.index_copy_(2, position, new_keys)
    values.index_copy_(2, position, new_values)
    return reference_attend_cache(query, keys, values, mask, scale)


def reference_append_attend(
    query: Tensor,
    past_keys: Tensor,
    keys: Tensor,
    past_values: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Three:
    """append_attend in plain torch, for any dtype and device that torch attends in; differentiable.

    Args: see append_attend.
    """
    all_keys, all_values = torch.cat([past_keys, keys], -2), torch.cat([past_values, values], -2)
    y = reference_attend_cache(query, all_keys, all_values, mask, scale)
    return y, all_keys.contiguous(), all_values.contiguous()


def reference_attend_appended(*args: Any, **kwargs: Any) -> Tensor:
    """attend_appended in plain torch. Args: see there."""
    return reference_append_attend(*args, **kwargs)[0]


# ---- the public entry points -----------------------------------------------------------------------------


def append_attend(
    query: Tensor,
    past_keys: Tensor,
    keys: Tensor,
    past_values: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Three:
    """softmax(scale query K^T + mask) V for K and V the past and the new keys and values, and K and V.

    Args:
        query: [batch, group * heads, queries, dim]; group > 1: heads of the query in turn share those of the keys, as
            with enable_gqa. The kernel is for group * queries <= 64.
        past_keys, keys: [batch, heads, past, dim] and [batch, heads, new, dim], past = 0 included.
        past_values, values: [batch, heads, *, width], together as many as the keys.
        mask: broadcastable to [batch, group * heads, queries, past + new]: bool, False where a key is hidden, or of the
            query's dtype, added to the scores.
        scale: 1 / sqrt(dim) if not given.

    Returns: y [batch, group * heads, queries, width], in memory [batch, queries, group * heads, width]; 0 where a
        query's keys are all hidden. Then K and V, contiguous. fp32 of any strides with the last one 1 is read as it is,
        other strides are copied; other dtypes run by the reference.

    Raises:
        ValueError: shapes that do not fit together. From the reference, torch's RuntimeError.
    """
    three: Three = torch.ops.fanin.append_attend(query, past_keys, keys, past_values, values, mask, scale)
    return three


def attend_appended(
    query: Tensor,
    past_keys: Tensor,
    keys: Tensor,
    past_values: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The first result of append_attend, where nobody wants the others. Args, Raises: see there."""
    y: Tensor = torch.ops.fanin.attend_appended(query, past_keys, keys, past_values, values, mask, scale)
    return y


def attend_cache(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale query K^T + mask) V for few queries and all keys and values of a cache.

    Args:
        query: [batch, group * heads, queries, dim], as in append_attend.
        keys, values: [batch, heads, length, dim] and [batch, heads, length, width].
        mask, scale: as in append_attend. Keys and values which a bool mask hides from all queries of a head may not be
            read, so that a NaN or infinity there goes unseen.

    Returns: y as of append_attend.

    Raises:
        ValueError: shapes that do not fit together. From the reference, torch's RuntimeError.
    """
    y: Tensor = torch.ops.fanin.attend_cache(query, keys, values, mask, scale)
    return y


def write_attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """attend_cache(query, keys, values, mask, scale), after new rows went into the cache, head by head in one pass.

    Args:
        query, mask, scale: as in attend_cache.
        keys, values: likewise; written to. fp32 whose last stride is not 1 is written by the reference.
        new_keys, new_values: [batch, heads, new, dim] and [batch, heads, new, width], no part of the cache.
        position: int64 [new], the rows of the cache that become them; of one named twice, the last counts.

    Returns: y as of append_attend.

    Raises:
        ValueError: shapes that do not fit together. IndexError: a position beyond the cache.
        RuntimeError: a cache with elements that share memory. From the reference, torch's RuntimeError.
    """
    y: Tensor = torch.ops.fanin.write_attend(query, keys, values, new_keys, new_values, position, mask, scale)
    return y


# ---- registration ----------------------------------------------------------------------------------------


def _autograd(name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """For devices without a kernel of ours at their autograd key: the operator, or what torch can derive."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return reference(*args, **kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.fanin, name).default(*args, **kwargs)

    return kernel


def _fake_append_attend(
    query: Tensor,
    past_keys: Tensor,
    keys: Tensor,
    past_values: Tensor,
    values: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Three:
    batch, heads, queries, _ = query.shape
    y = query.new_empty(batch, queries, heads, values.shape[3]).transpose(1, 2)
    all_keys, all_values = (
        new.new_empty(*new.shape[:2], past.shape[2] + new.shape[2], new.shape[3])
        for past, new in ((past_keys, keys), (past_values, values))
    )
    return y, all_keys, all_values


def _fake_attend_appended(*args: Any, **kwargs: Any) -> Tensor:
    return _fake_append_attend(*args, **kwargs)[0]


def _fake_attend_cache(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return _fake_append_attend(query, keys, keys[:, :, :0], values, values[:, :, :0])[0]


def _fake_write_attend(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return _fake_attend_cache(query, keys, values)


_library = torch.library.Library("fanin", "FRAGMENT")
for _name, _signature, _reference, _fake in (
    ("attend_cache", _CACHE_ARGUMENTS + "Tensor", reference_attend_cache, _fake_attend_cache),
    ("write_attend", _WRITE_ARGUMENTS + "Tensor", reference_write_attend, _fake_write_attend),
    ("attend_appended", _ARGUMENTS + "Tensor", reference_attend_appended, _fake_attend_appended),
    ("append_attend", _ARGUMENTS + "(Tensor, Tensor, Tensor)", reference_append_attend, _fake_append_attend),
):
    # Strides are handled inside, so inductor may hand over any.
    _tags = (torch.Tag.flexible_layout, torch.Tag.pt2_compliant_tag)
    _library.define(_name + _signature, tags=_tags)
    # called by the C++ kernels: for what they do not know, and when a gradient is wanted
    _library.define(f"{_name}_reference{_signature}")
    _library.impl(_name, until_native(_name, _reference), "CompositeExplicitAutograd")
    _library.impl(_name, _autograd(_name, _reference), "Autograd")  # any device; C++ takes AutogradCPU
    _library.impl(f"{_name}_reference", _reference, "CompositeImplicitAutograd")
    torch.library.register_fake(f"fanin::{_name}", _fake, lib=_library)
