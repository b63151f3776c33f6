"""The transformer block that the reasoning head and the step validator are built of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embervlm.config import ConfigError


class Attention(nn.Module):
    """Multi-head attention of `query` over `source`, both `[batch, length, width]`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"width {width} is not a multiple of the {num_heads} heads")
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def keys_values(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `source`, each `[batch, heads, length, width / heads]`; can be kept in a cache."""
        key, value = self.key_value(source).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False
    ) -> Tensor:
        """`mask`: bool, True where a query may look, or what is added to the scores; broadcastable to
        `[batch, heads, queries, keys]`."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)), key, value, attn_mask=mask, is_causal=is_causal and mask is None
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Attention weights averaged over heads, `[batch, queries, keys]`, in float32."""
        scores = self._split(self.query(query)).float() @ key.float().transpose(-1, -2)
        scores = scores / (key.shape[-1] ** 0.5)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1).mean(1)

    def _split(self, states: Tensor) -> Tensor:
        return states.view(*states.shape[:-1], self.num_heads, -1).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer layer: self-attention, optionally cross-attention, feed-forward."""

    def __init__(self, width: int, ffn: int, num_heads: int, *, cross: bool) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, num_heads)
        self.cross_norm = nn.LayerNorm(width) if cross else None
        self.cross_attention = Attention(width, num_heads) if cross else None
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width))
