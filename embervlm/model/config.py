"""Configuration of the model; saved as `config.json` beside every checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

STAGE3 = 3
STAGE4 = 4


class EmberVLMConfig(PretrainedConfig):
    """Everything needed to build an `EmberVLM` without its weights.

    Args:
        vision: `{"name_or_path": str | None, "pretrained": bool, "config": {...}}`; `config` is a Hugging Face
            configuration with its `model_type`, used where nothing pretrained is asked for. A checkpoint adds `built`,
            the part's whole configuration, and then needs neither id nor folder.
        language: Likewise, for a causal language model.
        image_size: Side of the square picture in pixels.
        image_mean, image_std: Per channel, of values in [0, 1].
        num_visual_tokens: Visual tokens a picture gives; a square number. None keeps the encoder's own grid,
            otherwise the grid is average-pooled to it.
        projection_hidden_size: Hidden width of the two-layer projection.
        reasoning_width, reasoning_ffn, reasoning_layers, reasoning_heads: Shape of the reasoning head.
        validator_width, validator_ffn, validator_layers, validator_heads: Shape of the step validator.
        surprise_by_magnitude: The step validator reads the logarithm of its surprises; False in files of older models.
        candidates: Answers that are scored where the caller names none.
        longest_chain_steps, longest_chain_tokens, longest_answer_tokens: What the training data needed: steps of the
            longest chain with its conclusion, tokens of a chain with its answer, tokens of an answer without a chain.
            Generation takes its limits from them. None: not known.
        stage: 3 for a backbone without reasoning, 4 with the reasoning module.
    """

    model_type = "embervlm"

    def __init__(
        self,
        vision: dict[str, Any] | None = None,
        language: dict[str, Any] | None = None,
        image_size: int = 72,
        image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
        num_visual_tokens: int | None = None,
        projection_hidden_size: int = 256,
        reasoning_width: int = 96,
        reasoning_ffn: int = 192,
        reasoning_layers: int = 2,
        reasoning_heads: int = 4,
        validator_width: int = 64,
        validator_ffn: int = 128,
        validator_layers: int = 2,
        validator_heads: int = 4,
        surprise_by_magnitude: bool = False,
        candidates: tuple[str, ...] = (),
        longest_chain_steps: int | None = None,
        longest_chain_tokens: int | None = None,
        longest_answer_tokens: int | None = None,
        stage: int = STAGE4,
        **kwargs: Any,
    ) -> None:
        self.vision = dict(vision or {})
        self.language = dict(language or {})
        self.image_size = image_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.num_visual_tokens = num_visual_tokens
        self.projection_hidden_size = projection_hidden_size
        self.reasoning_width = reasoning_width
        self.reasoning_ffn = reasoning_ffn
        self.reasoning_layers = reasoning_layers
        self.reasoning_heads = reasoning_heads
        self.validator_width = validator_width
        self.validator_ffn = validator_ffn
        self.validator_layers = validator_layers
        self.validator_heads = validator_heads
        self.surprise_by_magnitude = surprise_by_magnitude
        self.candidates = list(candidates)
        self.longest_chain_steps = longest_chain_steps
        self.longest_chain_tokens = longest_chain_tokens
        self.longest_answer_tokens = longest_answer_tokens
        self.stage = stage
        super().__init__(**kwargs)
