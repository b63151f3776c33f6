"""The processor of an exported folder: what `pipeline("image-text-to-text")` of transformers needs around the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from embervlm.config import ConfigError
from embervlm.data.images import load_image
from embervlm.data.tokenizer import DIRECT_PROMPT, ReasoningTokenizer
from embervlm.model.config import STAGE3, EmberVLMConfig
from embervlm.model.storage import HUB_OPTIONS, resolve_folder
from embervlm.words.chain_text import format_reasoning


class EmberVLMProcessor(ProcessorMixin):  # type: ignore[misc]
    """Questions and pictures as the tensors that `EmberVLM.generate` takes, and what it gives as text.

    Attributes:
        tokenizer: The Hugging Face tokenizer.
    """

    chat_template = None

    def __init__(self, reasoning_tokenizer: ReasoningTokenizer, config: EmberVLMConfig) -> None:
        self._reasoning_tokenizer, self._config = reasoning_tokenizer, config
        reasoning_tokenizer.use(config.text_format, config.prompt)
        self.tokenizer = reasoning_tokenizer.hugging_face

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, revision: str | None = None, **others: Any
    ) -> EmberVLMProcessor:
        """The processor of a checkpoint folder or hub id; `others` as in `EmberVLM.from_pretrained`."""
        hub = {name: others[name] for name in HUB_OPTIONS if name in others}
        folder = resolve_folder(pretrained_model_name_or_path, revision, **hub)
        return cls(ReasoningTokenizer.from_folder(folder), EmberVLMConfig.from_pretrained(str(folder)))

    def save_pretrained(self, save_directory: Any, **others: Any) -> list[str]:
        """Write the tokenizer and the model's configuration."""
        self._config.save_pretrained(str(save_directory))
        self._reasoning_tokenizer.save(save_directory)
        return []

    def __call__(self, images: Any = None, text: Any = None, **others: Any) -> BatchFeature:
        """Tensors of one question or a list, each with the picture of the same place, or none at all with one.

        Returns:
            `input_ids` and `attention_mask`, `[batch, length]`, padded on the left; with pictures also `pixel_values`,
            `[batch, size, size, 3]` uint8.

        Raises:
            ConfigError: pictures and questions do not go together, or `others` ask for something else.
        """
        _refuse(others, {"padding": True, "return_tensors": "pt"})
        questions = [text] if isinstance(text, str) else list(text or ())
        pictures = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
        pictures = [one for given in pictures for one in (given if isinstance(given, (list, tuple)) else [given])]
        if not questions or len(pictures) not in (0, len(questions)):
            raise ConfigError(f"{len(pictures)} pictures for {len(questions)} questions; give one for each, or none")
        tokenizer, stage3 = self._reasoning_tokenizer, self._config.stage == STAGE3
        prompts = tokenizer.prompts([question + DIRECT_PROMPT if stage3 else question for question in questions])
        longest = max(map(len, prompts))
        pad = tokenizer.end_of_text
        values: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts]),
            "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
        }
        if pictures:
            size, fill = self._config.image_size, self._config.fill
            read = [torch.from_numpy(load_image(one, size=size, fill=fill).copy()) for one in pictures]
            values["pixel_values"] = torch.stack(read)
        return BatchFeature(values)

    def apply_chat_template(self, conversation: Any, **others: Any) -> BatchFeature:
        """Tensors of a conversation in the form of transformers: one message of the user, a question with at most one
        picture, under `image`, `url` or `path`. For follow-ups there is `EmberVLM.reason`.

        Raises:
            ConfigError: it is another one, or `others` ask for something else.
        """
        given = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
        _refuse(others, given)
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        asked = [_asked(messages) for messages in ([conversation] if single else conversation)]
        pictures = [picture for _, picture in asked if picture is not None]
        return self([*pictures] or None, [question for question, _ in asked])

    def post_process_image_text_to_text(self, generated: Any, **others: Any) -> list[str]:
        """The question of each row of ids, and behind it what the model wrote: steps, conclusion and answer."""
        return [self._text_of(row.tolist() if isinstance(row, torch.Tensor) else list(row)) for row in generated]

    def _text_of(self, ids: Sequence[int]) -> str:
        tokenizer = self._reasoning_tokenizer
        start = tokenizer.ids["<|reasoning_start|>"]
        place = ids.index(start) if start in ids else len(ids)
        pad = tokenizer.end_of_text
        first = next((i for i, token in enumerate(ids) if token != pad), len(ids))
        question = self.tokenizer.decode(ids[first:place], skip_special_tokens=True)
        if place == len(ids):
            return str(question)
        steps, answer = tokenizer.parse_generated(ids[place:])
        return "\n".join(filter(None, [f"{question}{format_reasoning(steps)}", answer and f"Answer: {answer}"]))


def _refuse(others: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """ConfigError that names those of `others` that ask for something which is not `given` anyway."""
    if wrong := [name for name, value in others.items() if value and given.get(name) != value]:
        known = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ConfigError(f"processor: {', '.join(wrong)}: cannot be followed; it always does {known}")


def _asked(messages: Sequence[Mapping[str, Any]]) -> tuple[str, Any]:
    """Question and picture (or None) of a conversation."""
    if [message.get("role") for message in messages] != ["user"]:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise ConfigError(f"chat: the messages are of {roles or 'nobody'}; give one of the user, the question")
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
    texts = [str(part["text"]) for part in parts if part.get("type") == "text"]
    pictures = [part for part in parts if part.get("type") == "image"]
    if len(texts) != 1 or len(pictures) > 1 or len(texts) + len(pictures) != len(parts):
        kinds = ", ".join(str(part.get("type")) for part in parts)
        raise ConfigError(f"chat: the message has {kinds or 'nothing'}; give one text and at most one image")
    found = [part[key] for part in pictures for key in ("image", "url", "path") if part.get(key) is not None]
    if pictures and not found:
        raise ConfigError("chat: the image has none of image, url and path")
    return texts[0], found[0] if found else None
