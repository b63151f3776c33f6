"""One more token through a language model and the reasoning head, without what surrounds the arithmetic.

A small model spends most of a token in Python: masks, positions, calls of modules, norms of five operations. The two
families of our presets have a step of their own; every other backbone is called as it is. A step reads the weights that
stand in the modules when it is made: it lives no longer than one text, between two updates of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from embervlm.model.backbone import LanguageModel
from embervlm.model.int8 import Int8Linear
from embervlm.model.reasoning import Looked, ReasoningHead

Step = Callable[[Tensor, Tensor, "Tensor | None", Tensor, Cache], Tensor]
"""From one token of each row, states `[batch, hidden]`. Its arguments:

- embeddings `[batch, hidden]`;
- mask `[batch, cached + 1]` bool, False at padding;
- the same as what is added to attention scores, `[batch, 1, 1, cached + 1]`; None without padding;
- positions `[batch, 1]`;
- cache.
"""


_OF_GPT2 = ("c_attn", "c_proj", "c_fc")


def language_step(language_model: LanguageModel, room: int) -> Step:
    """The step of a language model in eval mode, for positions below `room`."""
    backbone = language_model.backbone
    config, model = backbone.config, backbone.base_model
    if config._attn_implementation == "sdpa" and not backbone.training and backbone.dtype != torch.float64:
        if config.model_type == "llama" and config.rope_parameters.get("rope_type") == "default":
            linear = [module for name, module in model.layers.named_modules() if name.endswith("_proj")]
            if all(type(module) in (nn.Linear, Int8Linear) for module in linear):  # not one of an adapter, say
                return _llama(model, room)
        if config.model_type == "gpt2" and not config.add_cross_attention:
            linear = [module for name, module in model.h.named_modules() if name.endswith(_OF_GPT2)]
            if all(type(module) in (Conv1D, Int8Linear) for module in linear):
                return _gpt2(model)

    def step(embeds: Tensor, mask: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        states: Tensor = language_model(embeds[:, None], mask.long(), positions, cache)
        return states[:, 0]

    return step


Linear = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""Weight `[in, out]`, a view of the module's own; bias; and `[out]`, what the product is multiplied by (of int8)."""


def _linear(module: Any) -> Linear:
    weight = module.weight if type(module) is Conv1D else module.weight.t()
    return weight, module.bias, module.weight_scale if type(module) is Int8Linear else None


def _project(states: Tensor, linear: Linear) -> Tensor:
    weight, bias, scale = linear
    if scale is None:
        return torch.mm(states, weight) if bias is None else torch.addmm(bias, states, weight)
    out = torch.mm(states, weight.to(states.dtype))
    return out.mul_(scale) if bias is None else torch.addcmul(bias, out, scale)


def _add_projected(residual: Tensor, states: Tensor, linear: Linear) -> None:
    """Add the projected `states` to `residual`, in place."""
    weight, bias, scale = linear
    if scale is None:
        residual.addmm_(states, weight)
    else:
        residual.addcmul_(torch.mm(states, weight.to(states.dtype)), scale)
    if bias is not None:
        residual.add_(bias)


def _rms_norm(weight: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """Root mean square norm over the last dimension (Zhang and Sennrich 2019, equation 4)."""
    if weight.is_cuda:  # one kernel there; a dozen operations on a processor
        return lambda hidden: F.rms_norm(hidden, weight.shape, weight, eps)
    least = torch.tensor(eps)

    def norm(hidden: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(least, length, length, value=1 / len(weight)).rsqrt_()
        return (hidden * scale).to(hidden.dtype).mul_(weight)

    return norm


def _llama(model: Any, room: int) -> Step:
    """The step of a Llama model."""
    layers = []
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        linear = (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        layers.append(
            (
                [_rms_norm(norm.weight, norm.variance_epsilon) for norm in norms],
                [_linear(each) for each in linear],
                attention.scaling,
                mlp.act_fn,
            )
        )
    last = _rms_norm(model.norm.weight, model.norm.variance_epsilon)
    grouped = model.config.num_key_value_heads != model.config.num_attention_heads
    places = torch.arange(room, device=model.norm.weight.device)[None]
    cosines, sines = (table[0].unflatten(-1, (2, -1)) for table in model.rotary_emb(model.norm.weight, places))
    half = cosines.shape[-1]
    sines[:, 0].neg_()

    def step(hidden: Tensor, mask: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        batch = hidden.shape[0]
        cos, sin = cosines[positions], sines[positions]  # each [batch, 1, 2, half a head's width]

        def turned(states: Tensor) -> Tensor:
            """Rotary positions: (a, b) -> (a cos - b sin, b cos + a sin), for the halves a and b of each head."""
            halves = states.view(batch, -1, 2, half)
            return (halves * cos).addcmul_(halves.flip(2), sin).view(batch, -1, 1, 2 * half)

        hidden = hidden.clone()
        for index, ((before, between), (q, k, v, o, gate, up, down), scaling, act) in enumerate(layers):
            normed = before(hidden)
            value = _project(normed, v).view(batch, -1, 1, 2 * half)
            keys, values = cache.update(turned(_project(normed, k)), value, index)
            mixed = F.scaled_dot_product_attention(
                turned(_project(normed, q)), keys, values, attn_mask=unseen, scale=scaling, enable_gqa=grouped
            )
            _add_projected(hidden, mixed.reshape(batch, -1), o)
            normed = between(hidden)
            _add_projected(hidden, act(_project(normed, gate)).mul_(_project(normed, up)), down)
        return last(hidden)

    return step


def _gpt2(model: Any) -> Step:
    """The step of a GPT-2 model."""
    layers = []
    for block in model.h:
        linear = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        norms = [(norm.weight.shape, norm.weight, norm.bias, norm.eps) for norm in (block.ln_1, block.ln_2)]
        # its own tanh form of GELU is eight operations
        act = partial(F.gelu, approximate="tanh") if type(block.mlp.act) is NewGELUActivation else block.mlp.act
        layers.append((norms, [_linear(each) for each in linear], block.attn, act))

    def step(embeds: Tensor, mask: Tensor, unseen: Tensor | None, positions: Tensor, cache: Cache) -> Tensor:
        hidden = embeds + model.wpe(positions[:, 0])
        batch = len(hidden)
        for index, ((before, between), (qkv, out, widen, narrow), attention, act) in enumerate(layers):
            states = _project(F.layer_norm(hidden, *before), qkv)
            query, key, value = states.view(batch, 3, attention.num_heads, 1, attention.head_dim).unbind(1)
            keys, values = cache.update(key, value, index)
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=unseen, scale=attention.scaling)
            _add_projected(hidden, mixed.reshape(batch, -1), out)
            _add_projected(hidden, act(_project(F.layer_norm(hidden, *between), widen)), narrow)
        return model.ln_f(hidden)

    return step


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
        layers.append(([(n.weight, n.bias, n.eps) for n in norms], [_linear(each) for each in linear]))
    first, last, norm = _linear(head.input), _linear(head.output), head.norm
    width = norm.weight.shape

    def attend(normed: Tensor, query: Linear, mask: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        split = _project(normed, query).view(len(normed), num_heads, 1, -1)
        return F.scaled_dot_product_attention(split, key, value, attn_mask=mask).reshape(len(normed), -1)

    def step(hidden: Tensor, unseen: Tensor | None, cache: Cache, looked: Looked) -> Tensor:
        states = _project(hidden, first)
        for index, (norms, (key_value, own_query, own_out, query, out, widen, narrow)) in enumerate(layers):
            own, cross, before_ffn = norms
            normed = F.layer_norm(states, width, *own)
            key, value = _project(normed, key_value).view(len(states), 2, num_heads, 1, -1).unbind(1)
            keys, values = cache.update(key, value, index)
            _add_projected(states, attend(normed, own_query, unseen, keys, values), own_out)
            normed = F.layer_norm(states, width, *cross)
            _add_projected(states, attend(normed, query, looked.visible, *looked.keys_values[index]), out)
            wide = _project(F.layer_norm(states, width, *before_ffn), widen)
            _add_projected(states, F.gelu(wide), narrow)
        return hidden + _project(F.layer_norm(states, width, norm.weight, norm.bias, norm.eps), last)

    return step
