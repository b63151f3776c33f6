"""Configuration of the model; saved as `config.json` beside every checkpoint."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PretrainedConfig

from embervlm.data.tokenizer import FIRST_FORMAT

SQUASH, PAD = "squash", "pad"
STAGE3 = 3
STAGE4 = 4


class EmberVLMConfig(PretrainedConfig):
    """Everything needed to build an `EmberVLM` without its weights."""

    model_type = "embervlm"

    vision: dict[str, Any] = field(default_factory=dict)
    """`{"name_or_path": str | None, "pretrained": bool, "config": {...}}`.

    `config` is a Hugging Face configuration with its `model_type`, used where nothing pretrained is asked for. A
    checkpoint adds `built`, the part's whole configuration, and then needs neither id nor folder."""
    language: dict[str, Any] = field(default_factory=dict)
    """The same for a causal language model."""
    chat_template: bool = True
    """Of a new model: put a question into the chat template of its tokenizer, where that has one."""
    prompt: tuple[str, str] | None = None
    """Text before and behind a question: what the chat template gave when the model was made. None: nothing."""
    text_format: int = FIRST_FORMAT
    """How text becomes ids. 2: a question alone begins with BOS where the tokenizer adds one, and no space is doubled
    where it adds one itself. 1 in files of older models."""
    image_size: int = 72
    """Side of the square picture in pixels."""
    resize: str = SQUASH
    """How a picture becomes square: `squash` scales both sides; `pad` keeps its aspect ratio and fills the rest with
    the mean colour."""
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """What is subtracted from a picture, per channel."""
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """What it is then divided by; both for values in [0, 1]."""
    num_visual_tokens: int | tuple[int, int] | None = None
    """Visual tokens a picture gives: a square number, or `[rows, columns]`. None keeps the encoder's own grid; else it
    is average-pooled."""
    vision_feature_layer: int | None = None
    """Which of the encoder's hidden states the picture's features are, -2 for those before its last layer. None: its
    output."""
    connector: dict[str, Any] = field(default_factory=dict)
    """What leads from visual features to the language model: `{"kind": norm_mlp | mlp | linear | norm_adapter |
    pixel_shuffle}` and the kind's own keys, see `connectors.py`. Without a kind it is `norm_mlp`."""
    projection_hidden_size: int = 256
    """Hidden width of the connector `norm_mlp`."""
    reasoning_width: int = 96
    """Width of the reasoning head's states."""
    reasoning_ffn: int = 192
    """Hidden width of its feed-forward layers."""
    reasoning_layers: int = 2
    """Number of its layers."""
    reasoning_heads: int = 4
    """Attention heads of each."""
    validator_width: int = 64
    """Width of the step validator's states."""
    validator_ffn: int = 128
    """Hidden width of its feed-forward layers."""
    validator_layers: int = 2
    """Number of its layers."""
    validator_heads: int = 4
    """Attention heads of each."""
    surprise_by_magnitude: bool = False
    """The step validator reads the logarithm of its surprises; False in files of older models."""
    candidates: tuple[str, ...] = ()
    """Answers that are scored where the caller names none."""
    longest_chain_steps: int | None = None
    """What the training data needed, from which generation takes its limits: steps of the longest chain with its
    conclusion. None: not known."""
    longest_chain_tokens: int | None = None
    """Tokens of a chain with its answer."""
    longest_answer_tokens: int | None = None
    """Tokens of an answer without a chain."""
    imported_from: str | None = None
    """The family whose checkpoint the parts were taken from. A run that resumes from such a checkpoint takes the
    model's shape from it and needs no preset."""
    stage: int = STAGE4
    """3 for a backbone without reasoning, 4 with the reasoning module."""

    @property
    def padded_size(self) -> int | None:
        """Side in pixels of the square that pictures are padded to; None where they are squashed."""
        return self.image_size if self.resize == PAD else None

    @property
    def fill(self) -> tuple[int, ...] | None:
        """The colour, 0 to 255, that pictures are padded with; None where they are squashed."""
        return tuple(round(255 * min(1.0, max(0.0, v))) for v in self.image_mean) if self.resize == PAD else None
