"""One more token through a language model and the reasoning head, without what surrounds the arithmetic.

A small model spends most of a token in Python: masks, positions, calls of modules, norms of five operations. The two
families of our presets have a step of their own; every other backbone is called as it is. A step reads the weights that
stand in the modules when it is made: it lives no longer than one text, between two updates of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from embervlm.model.backbone import LanguageModel
from embervlm.model.reasoning import Looked, ReasoningHead

Step = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Cache], Tensor]
"""From one token of each row, states `[batch, hidden]`. Its arguments:

- embeddings `[batch, hidden]`;
- mask `[batch, cached + 1]` bool, False at padding;
- the same as what is added to attention scores, `[batch, 1, 1, cached + 1]`; None without padding;
- positions `[batch, 1]`;
- cache.
"""


def language_step(language_model: LanguageModel, room: int) -> Step:
    """The step of a language model in eval mode, for positions below `room`."""
    backbone = language_model.backbone
    config, model = backbone.config, backbone.base_model
    if config._attn_implementation == "sdpa" and not backbone.training:
        if config.model_type == "llama" and config.rope_parameters.get("rope_type") == "default":
            linear = [module for name, module in model.layers.named_modules() if name.endswith("_proj")]
            if all(type(module) is nn.Linear for module in linear):  # not one of an adapter, say
                return _llama(model, room)
        if config.model_type == "gpt2" and not config.add_cross_attention:
            return lambda embeds, mask, unseen, positions, cache: _gpt2(model, embeds, unseen, positions, cache)

    def step(embeds: Tensor, mask: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        states: Tensor = language_model(embeds[:, None], mask.long(), positions, cache)
        return states[:, 0]

    return step


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019, equation 4)."""
    if hidden.is_cuda:  # one kernel there; a dozen operations on a processor
        return F.rms_norm(hidden, weight.shape, weight, eps)
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(weight.shape[0]).add_(eps).rsqrt_()
    return (hidden * scale).to(hidden.dtype).mul_(weight)


Linear = tuple[Tensor, "Tensor | None"]
"""Weight and bias."""


def _parameters(linear: Any) -> Linear:
    return linear.weight, linear.bias


def _llama(model: Any, room: int) -> Step:
    """The step of a Llama model."""
    layers = []
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linear = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        layers.append(
            ([norm.weight for norm in norms], [_parameters(each) for each in linear], attention.scaling, mlp.act_fn)
        )
    last, eps = model.norm.weight, model.norm.variance_epsilon
    grouped = model.config.num_key_value_heads != model.config.num_attention_heads
    cosines, sines = (table[0] for table in model.rotary_emb(last, torch.arange(room, device=last.device)[None]))
    half = cosines.shape[-1] // 2
    sines = torch.cat([-sines[:, :half], sines[:, half:]], dim=-1)

    def step(hidden: Tensor, mask: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        batch = hidden.shape[0]
        cos, sin = cosines[positions], sines[positions]  # each [batch, 1, head width]

        def turned(states: Tensor) -> Tensor:
            """Rotary positions: (a, b) -> (a cos - b sin, b cos + a sin), for the halves a and b of each head."""
            states = states.view(batch, -1, 2 * half)
            return (states * cos).addcmul_(states.roll(half, -1), sin).unsqueeze(2)

        for index, ((before, between), (q, k, v, o, gate, up, down), scaling, act) in enumerate(layers):
            normed = _rms_norm(hidden, before, eps)
            value = F.linear(normed, *v).view(batch, -1, 1, 2 * half)
            keys, values = cache.update(turned(F.linear(normed, *k)), value, index)
            mixed = F.scaled_dot_product_attention(
                turned(F.linear(normed, *q)), keys, values, attn_mask=unseen, scale=scaling, enable_gqa=grouped
            )
            hidden = hidden + F.linear(mixed.reshape(batch, -1), *o)
            normed = _rms_norm(hidden, between, eps)
            hidden = hidden + F.linear(act(F.linear(normed, *gate)).mul_(F.linear(normed, *up)), *down)
        return _rms_norm(hidden, last, eps)

    return step


def _gpt2(model: Any, hidden: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
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


HeadStep = Callable[[Tensor, "Tensor | None", Cache, Looked], Tensor]
"""(states `[batch, hidden]`, what is added to attention scores, cache, the pictures) -> refined states."""


def head_step(head: ReasoningHead) -> HeadStep:
    """What `head` does to one more token; the same as its `forward`."""
    num_heads = head.layers[0].self_attention.num_heads
    layers = []
    for layer in head.layers:
        own, cross, ffn = layer.self_attention, layer.cross_attention, layer.ffn
        linear = (own.key_value, own.query, own.out, cross.query, cross.out, ffn[0], ffn[2])
        norms = (layer.self_norm, layer.cross_norm, layer.ffn_norm)
        layers.append(([(n.weight, n.bias, n.eps) for n in norms], [_parameters(each) for each in linear]))
    first, last, norm = _parameters(head.input), _parameters(head.output), head.norm
    width = norm.weight.shape

    def attend(normed: Tensor, query: Linear, out: Linear, mask: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        split = F.linear(normed, *query).view(len(normed), num_heads, 1, -1)
        mixed = F.scaled_dot_product_attention(split, key, value, attn_mask=mask)
        return F.linear(mixed.reshape(len(normed), -1), *out)

    def step(hidden: Tensor, unseen: Tensor | None, cache: Cache, looked: Looked) -> Tensor:
        states = F.linear(hidden, *first)
        for index, (norms, (key_value, own_query, own_out, query, out, widen, narrow)) in enumerate(layers):
            own, cross, before_ffn = norms
            normed = F.layer_norm(states, width, *own)
            key, value = F.linear(normed, *key_value).view(len(states), 2, num_heads, 1, -1).unbind(1)
            states = states + attend(normed, own_query, own_out, unseen, *cache.update(key, value, index))
            normed = F.layer_norm(states, width, *cross)
            states = states + attend(normed, query, out, looked.visible, *looked.keys_values[index])
            wide = F.gelu(F.linear(F.layer_norm(states, width, *before_ffn), *widen))
            states = states + F.linear(wide, *narrow)
        return hidden + F.linear(F.layer_norm(states, width, norm.weight, norm.bias, norm.eps), *last)

    return step
