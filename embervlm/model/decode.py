"""One more token through a language model, without what its general forward pass does around the arithmetic.

A small model spends most of a token in Python: masks, positions, norms of five operations. The two families of our
presets have a step of their own; every other backbone is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

Step = Callable[[Tensor, Tensor, "Tensor | None", Cache], Tensor]
"""(embeddings `[batch, hidden]`, positions `[batch, 1]`, what is added to attention scores, cache) -> states."""


def decoding_step(backbone: Any) -> Step | None:
    """The step of `backbone`, a Hugging Face causal language model in eval mode; None where it has none here."""
    config, model = backbone.config, backbone.base_model
    if config._attn_implementation != "sdpa":
        return None
    if config.model_type == "llama" and config.rope_parameters.get("rope_type") == "default":
        return lambda *inputs: _llama(model, *inputs)
    if config.model_type == "gpt2" and not config.add_cross_attention:
        return lambda *inputs: _gpt2(model, *inputs)
    return None


def _llama(model: Any, hidden: Tensor, positions: Tensor, unseen: Tensor | None, cache: Cache) -> Tensor:
    batch, width = hidden.shape
    cos, sin = model.rotary_emb(hidden, positions)  # each [batch, 1, head width]
    half = cos.shape[-1] // 2
    sin = sin.clone()
    sin[..., :half] *= -1

    def turned(states: Tensor) -> Tensor:
        """Rotary positions: (a, b) -> (a cos - b sin, b cos + a sin), for the halves a and b of each head."""
        swapped = states.view(batch, -1, 2, half).flip(2).view_as(states)
        return (states * cos).addcmul_(swapped, sin).unsqueeze(2)

    for index, layer in enumerate(model.layers):
        attention, norm = layer.self_attn, layer.input_layernorm
        normed = F.rms_norm(hidden, (width,), norm.weight, norm.variance_epsilon)
        query = attention.q_proj(normed).view(batch, -1, 2 * half)
        key = attention.k_proj(normed).view(batch, -1, 2 * half)
        value = attention.v_proj(normed).view(batch, -1, 1, 2 * half)
        keys, values = cache.update(turned(key), value, index)
        mixed = F.scaled_dot_product_attention(
            turned(query), keys, values, attn_mask=unseen, scale=attention.scaling,
            enable_gqa=attention.num_key_value_groups > 1,
        )  # fmt: skip
        hidden = hidden + attention.o_proj(mixed.reshape(batch, -1))
        norm = layer.post_attention_layernorm
        hidden = hidden + layer.mlp(F.rms_norm(hidden, (width,), norm.weight, norm.variance_epsilon))
    return F.rms_norm(hidden, (width,), model.norm.weight, model.norm.variance_epsilon)


def _gpt2(model: Any, hidden: Tensor, positions: Tensor, unseen: Tensor | None, cache: Cache) -> Tensor:
    batch = hidden.shape[0]
    hidden = hidden + model.wpe(positions[:, 0])
    for index, block in enumerate(model.h):
        attention = block.attn
        states = attention.c_attn(block.ln_1(hidden)).view(batch, 3, attention.num_heads, 1, attention.head_dim)
        query, key, value = states.unbind(1)
        keys, values = cache.update(key, value, index)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=unseen, scale=attention.scaling)
        hidden = hidden + attention.c_proj(mixed.reshape(batch, -1))
        hidden = hidden + block.mlp(block.ln_2(hidden))
    return model.ln_f(hidden)
