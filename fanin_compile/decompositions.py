"""Fused ops of torch that hide linear layers, taken apart while a graph is captured."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten


def transformer_encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The one op nn.TransformerEncoderLayer becomes in eval mode without grad; src is [batch, length, embed_dim].

    As in the fused op, a mask of any dtype counts as bool with True = left out: [length, length] (mask_type 0),
    [batch, length] (1) or [batch, heads, length, length] (2).
    """

    def norm_1(h: Tensor) -> Tensor:
        return F.layer_norm(h, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(h: Tensor) -> Tensor:
        return F.layer_norm(h, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attention(h: Tensor) -> Tensor:
        batch, length, _ = h.shape
        qkv = F.linear(h, qkv_weight, qkv_bias).view(batch, length, 3, num_heads, embed_dim // num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, length, head]
        scores = (q / math.sqrt(embed_dim // num_heads)) @ k.transpose(-2, -1)
        if mask is not None:
            left_out = mask.to(torch.bool)
            left_out = left_out[:, None, None, :] if mask_type == 1 else left_out
            scores = scores.masked_fill(left_out, -math.inf)
        mixed = scores.softmax(-1) @ v
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, embed_dim), proj_weight, proj_bias)

    def feed_forward(h: Tensor) -> Tensor:
        hidden = F.linear(h, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src = src + attention(norm_1(src))
        return src + feed_forward(norm_2(src))
    src = norm_1(src + attention(src))
    return norm_2(src + feed_forward(src))


TABLE = {aten._transformer_encoder_layer_fwd.default: transformer_encoder_layer}
