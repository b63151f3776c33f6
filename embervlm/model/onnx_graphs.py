"""The model as graphs for onnxruntime: a picture once, then the prompt and each token with a key/value cache.

One question at a time, so nothing is padded. The names of the cache are those that other exporters use:
`past_key_values.0.key` goes in, `present.0.key` comes out; the reasoning head has a cache of its own, `past_head.*`.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from embervlm.config import ConfigError
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.reasoning import Looked

OPSET = 18
"""What torch's exporter writes without converting it; every onnxruntime since 1.14 (2023) reads it, those of boards
too."""
PICTURE, TEXT, ANSWER = "picture.onnx", "text.onnx", "answer.onnx"
MOST_OFF = 1e-3
"""How far scores may be from the model's own, beside the largest of them."""
Pairs = list[Tensor]
"""Key and value of each layer, one after another."""


class PictureGraph(nn.Module):
    """uint8 `[1, size, size, 3]` -> visual tokens `[1, tokens, hidden]`, and what the reasoning head looks at."""

    def __init__(self, model: EmberVLMNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        visual = self.model.see(self.model.normalise(pixels))
        head = self.model.reasoning_module.reasoning_head
        looked = head.look(visual, torch.ones(1, dtype=torch.bool), everyone_sees=True)
        return visual, *(part for pair in looked.keys_values for part in pair)


class TextGraph(nn.Module):
    """What comes behind a prompt, or behind one more token: scores `[1, tokens]`, the last token's state `[1, hidden]`,
    and both caches with what was read."""

    def __init__(self, model: EmberVLMNetwork) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, visual: Tensor, look: Pairs, past: Pairs, past_head: Pairs) -> Any:
        """`visual`: `[1, 0, hidden]` where the picture has been read already, or there is none."""
        model, cache, head_cache = self.model, _cache_of(past), _cache_of(past_head)
        num_visual, num_past = visual.shape[1], past[0].shape[2]
        embeds = torch.cat([visual, model.embed(input_ids)], dim=1)
        states = model.language_model.backbone.base_model(
            inputs_embeds=embeds,
            attention_mask=_unseen(embeds.shape[1], num_past),
            position_ids=torch.arange(num_past, num_past + embeds.shape[1])[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, num_visual:]
        refined, _ = model.reasoning_module.reasoning_head(
            model.enter(states, input_ids),
            visual,
            torch.ones(1, dtype=torch.bool),
            text_mask=_unseen(input_ids.shape[1], past_head[0].shape[2]),
            cache=head_cache,
            looked=Looked(list(zip(look[::2], look[1::2])), None),
        )
        last = refined[:, -1]
        return model.token_logits(last), last, *_pairs_of(cache), *_pairs_of(head_cache)


class AnswerGraph(nn.Module):
    """The answer head's logits `[1, candidates]`, from the state before the conclusion and the visual tokens, which are
    zeros where there is no picture."""

    candidates: Tensor

    def __init__(self, model: EmberVLMNetwork) -> None:
        super().__init__()
        self.head = model.reasoning_module.answer_head
        encoded = model.tokenizer.encode_many(list(model.config.candidates))
        found = [model.candidate_embeddings(torch.tensor([ids])) for ids in encoded]
        self.register_buffer("candidates", torch.cat(found))

    def forward(self, state: Tensor, visual: Tensor) -> Tensor:
        logits: Tensor = self.head(state, visual, torch.ones(1, dtype=torch.bool), self.candidates)
        return logits


@torch.no_grad()
def export_graphs(model: EmberVLMNetwork, folder: Path) -> dict[str, list[int]]:
    """Write the graphs into `folder`; gives the name and shape of each empty cache.

    Raises:
        ConfigError: a package is not installed, or names the family of a backbone that cannot be exported.
    """
    _refuse_missing()
    vision, language = model.vision_encoder.backbone, model.language_model.backbone
    with _told("language", language), _written_out(vision, language):
        _refuse_windows(language)
        with _told("vision", vision):
            pixels = torch.randint(0, 256, (1, *[model.config.image_size] * 2, 3), dtype=torch.uint8)
            visual, *look = PictureGraph(model)(pixels)
            looks = _names("look", look)
            _write(PictureGraph(model), {"pixels": pixels}, ["visual", *looks], folder / PICTURE)
        ids = torch.arange(8)[None]
        past, past_head = _read(model, visual, ids[:, :3])[1:]
        caches = dict(zip(_names("past_key_values", past), past)), dict(zip(_names("past_head", past_head), past_head))
        given = {"input_ids": ids[:, :5], "visual": visual, "look": look, "past": past, "past_head": past_head}
        names = ["input_ids", "visual", *looks, *caches[0], *caches[1]]
        outputs = ["logits", "state", *_names("present", past), *_names("present_head", past_head)]
        _write(TextGraph(model), given, outputs, folder / TEXT, names)
        if model.config.candidates:
            state = torch.zeros(1, model.language_model.hidden_size)
            _write(AnswerGraph(model), {"state": state, "visual": visual}, ["logits"], folder / ANSWER)
        empty = {name: part[:, :, :0] for name, part in (caches[0] | caches[1]).items()}
        _check(model, folder / TEXT, visual, dict(zip(looks, look)), empty, ids)
    return {name: list(part.shape) for name, part in empty.items()}


def round_graphs(folder: Path) -> None:
    """Round the weights of the graphs in `folder` to 8 bits, each output channel with a scale and a zero of its own.

    Unsigned: processors without VNNI add products of signed ones up in 16 bits, which can overflow.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = logging.getLogger()
    level = whole.level
    whole.setLevel(logging.ERROR)  # it warns of what it advises for graphs of other exporters
    try:
        for path in (folder / PICTURE, folder / TEXT, folder / ANSWER):
            if path.exists():
                rounded = path.with_suffix(".int8")
                quantize_dynamic(
                    path,
                    rounded,
                    op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                    per_channel=True,
                    weight_type=QuantType.QUInt8,
                    extra_options={"MatMulConstBOnly": True},
                )
                rounded.replace(path)
    finally:
        whole.setLevel(level)


class _Given(DynamicLayer):  # type: ignore[misc]
    """A cache layer that begins with what it is given."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True


def _cache_of(pairs: Pairs) -> Cache:
    return Cache(layers=[_Given(key, value) for key, value in zip(pairs[::2], pairs[1::2])])


def _pairs_of(cache: Cache) -> Pairs:
    return [part for layer in cache.layers for part in (layer.keys, layer.values)]


def _unseen(num_new: Any, num_past: Any) -> Tensor:
    """What is added to attention scores, `[1, 1, new, past + new]`: the lowest number for what comes later."""
    places = torch.arange(num_past + num_new)
    later = places[None, :] > places[num_past:, None]
    return torch.zeros(later.shape).masked_fill(later, torch.finfo(torch.float32).min)[None, None]


def _read(model: EmberVLMNetwork, visual: Tensor, ids: Tensor) -> tuple[Tensor, Pairs, Pairs]:
    """The model's own scores behind a picture and a text, and what its caches then hold."""
    cache, head_cache, seen = DynamicCache(), DynamicCache(), torch.ones(1, dtype=torch.bool)
    hidden = model.read(visual, seen, ids, torch.ones_like(ids, dtype=torch.bool), cache)
    refined, _ = model.refine(hidden, ids, visual, seen, cache=head_cache)
    return model.token_logits(refined[:, -1]), _pairs_of(cache), _pairs_of(head_cache)


def _names(kind: str, parts: Sequence[Any]) -> list[str]:
    return [f"{kind}.{place // 2}.{('key', 'value')[place % 2]}" for place in range(len(parts))]


def _write(
    graph: nn.Module, given: Mapping[str, Any], outputs: Sequence[str], path: Path, names: Sequence[str] = ()
) -> None:
    """Export `graph`, with any length of texts, of what is seen and of caches where there are such."""
    lengths = {"input_ids": {1: "tokens"}, "visual": {1: "visual_tokens"}}
    many = {name: [{2: f"{name}_length"}] * len(part) for name, part in given.items() if isinstance(part, list)}
    shapes = {name: many.get(name, lengths.get(name)) for name in given} if many else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log = logging.getLogger("torch.onnx")
        level = log.level
        log.setLevel(logging.ERROR)  # it tells of torchvision, which is not needed
        try:
            torch.onnx.export(
                graph.eval(),
                kwargs=dict(given),
                f=path,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=shapes,
                input_names=list(names or given),
                output_names=list(outputs),
                external_data=False,
                verbose=False,
            )
        finally:
            log.setLevel(level)


def _check(
    model: EmberVLMNetwork, path: Path, visual: Tensor, look: Mapping[str, Tensor], past: Any, ids: Tensor
) -> None:
    """ConfigError where the graph's scores, prompt and token after token, are not the model's own."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name.replace("present_head", "past_head") for output in session.get_outputs()]
    names = [name.replace("present.", "past_key_values.") for name in names]
    given, shown = {name: part.numpy() for name, part in {**look, **past}.items()}, visual.numpy()
    for begin, end in ((0, 6), (6, 7), (7, 8)):
        found = session.run(None, {"input_ids": ids[:, begin:end].numpy(), "visual": shown, **given})
        given |= dict(zip(names[2:], found[2:]))
        shown = shown[:, :0]
    wanted = _read(model, visual, ids)[0]
    if (off := float((torch.from_numpy(found[0]) - wanted).abs().max() / wanted.abs().max())) > MOST_OFF:
        kind = model.language_model.backbone.config.model_type
        raise ConfigError(
            f"language: the graph of a {kind} computes something else than the model (off by {off:.1%}), so it was not "
            "written; use --format hf or int8"
        )


@contextlib.contextmanager
def _written_out(*backbones: Any) -> Iterator[None]:
    """Attention as its single operations, which every opset has."""
    before = [backbone.config._attn_implementation for backbone in backbones]
    for backbone in backbones:
        backbone.set_attn_implementation("eager")
    try:
        yield
    finally:
        for backbone, name in zip(backbones, before):
            backbone.set_attn_implementation(name)


@contextlib.contextmanager
def _told(part: str, backbone: Any) -> Iterator[None]:
    """Turns whatever an export raises into a ConfigError that names the family."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # exporter and models raise what they like
        lines = (str(error).strip() or type(error).__name__).splitlines()
        raise ConfigError(
            f"{part}: a {backbone.config.model_type} cannot be exported to ONNX ({lines[0][:200]}); use --format hf or "
            "int8"
        ) from error


def _refuse_windows(language: Any) -> None:
    """ConfigError of attention that sees a part of the text: one mask for all layers would compute something else."""
    config = language.config.get_text_config()
    whole = "full_attention"
    windows = "sliding_attention" if getattr(config, "sliding_window", None) else whole
    if others := {*(getattr(config, "layer_types", None) or [windows])} - {whole}:
        raise ConfigError(
            f"language: a {config.model_type} with layers of {', '.join(sorted(others))} cannot be exported to ONNX; "
            "use --format hf or int8"
        )


def _refuse_missing() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: pip install 'embervlm[onnx]'")
