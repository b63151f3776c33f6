"""The model: a vision encoder, a projection, a language model, and the reasoning module that Stage 4 adds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from embervlm import run_dir
from embervlm.config import BACKBONE, COMPONENTS, REASONING_PARTS, ConfigError
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.errors import UNREADABLE
from embervlm.model.backbone import LanguageModel, Projection, VisionEncoder, with_built_config
from embervlm.model.config import STAGE3, STAGE4, EmberVLMConfig
from embervlm.model.own_mistakes import own_mistakes, together
from embervlm.model.reasoning import ReasoningModule, StepValidator
from embervlm.model.storage import CheckpointError, load_checkpoint_into, resolve_folder, save_weights

if TYPE_CHECKING:
    from embervlm.model.generation import Decoding
    from embervlm.model.interactive import Reasoning


@dataclass
class EmberVLMOutput(ModelOutput):
    """What the losses need; every tensor is None where its inputs were not given.

    Attributes:
        token_logits: `[scored, vocab]` of the scored positions only.
        answer_logits: `[records, candidates]`.
        validator_logits: `[pairs]`.
        grounding_attention: `[grounded, num_visual_tokens]`, the reasoning head's attention at the grounded tokens.
        patch_features: `[batch, num_visual_tokens, hidden]`.
    """

    token_logits: Tensor | None = None
    answer_logits: Tensor | None = None
    validator_logits: Tensor | None = None
    grounding_attention: Tensor | None = None
    patch_features: Tensor | None = None


class EmberVLM(PreTrainedModel):
    """Small vision-language model that reasons in steps before it answers."""

    config_class = EmberVLMConfig
    base_model_prefix = "embervlm"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True

    def __init__(self, config: EmberVLMConfig, *, load_pretrained: bool = False) -> None:
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config, load_pretrained)
        self.language_model = LanguageModel(config, load_pretrained)
        config.vision = with_built_config(config.vision, self.vision_encoder.backbone)
        config.language = with_built_config(config.language, self.language_model.backbone)
        hidden = self.language_model.hidden_size
        self.projection = Projection(self.vision_encoder.vision_dim, config.projection_hidden_size, hidden)
        self.reasoning_module = ReasoningModule(config, hidden, self.vision_encoder.num_visual_tokens)
        self.tokenizer: ReasoningTokenizer | None = None
        self.backbone_frozen = False
        self.confidence_temperature = 1.0

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Every part initialises itself when it is built."""

    # -- parts and their sizes ---------------------------------------------------------------------------------------

    @property
    def num_visual_tokens(self) -> int:
        return self.vision_encoder.num_visual_tokens

    @property
    def text_room(self) -> int | None:
        """Tokens of text that the language model reads behind a picture; None for any number."""
        positions = self.language_model.max_positions
        return None if positions is None else positions - self.num_visual_tokens

    @property
    def max_pair_tokens(self) -> int:
        """The most that the step validator reads at once: question, steps before and step."""
        return min(StepValidator.MAX_LENGTH, self.text_room or StepValidator.MAX_LENGTH)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per component; tied weights count once."""
        parts = {
            **{name: getattr(self, name) for name in BACKBONE},
            **{name: getattr(self.reasoning_module, name) for name in REASONING_PARTS},
        }
        return {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}

    def attach_tokenizer(self, tokenizer: ReasoningTokenizer) -> None:
        if tokenizer.base_vocab_size > self.language_model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.base_vocab_size} tokens, the language model embeds only "
                f"{self.language_model.vocab_size}; use the tokenizer that belongs to this language model"
            )
        self.tokenizer = tokenizer

    def freeze_backbone(self, frozen: bool) -> None:
        """Run the backbone without gradients and in eval mode, so that its buffers do not move either.

        Which parameters learn is `build_param_groups`' business: a tied output embedding is used past the backbone.
        """
        self.backbone_frozen = frozen
        self.train(self.training)

    def train(self, mode: bool = True) -> EmberVLM:
        super().train(mode)
        if getattr(self, "backbone_frozen", False):
            for name in BACKBONE:
                getattr(self, name).eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the backbone's activations in the backward pass (non-reentrant: frozen layers may stand below)."""
        for part in (self.vision_encoder.backbone, self.language_model.backbone):
            if getattr(part, "supports_gradient_checkpointing", False):
                part.gradient_checkpointing_enable({"use_reentrant": False})

    def _backbone_context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.no_grad() if self.backbone_frozen else contextlib.nullcontext()

    # -- pieces of the forward pass ----------------------------------------------------------------------------------

    def see(self, pixel_values: Tensor) -> Tensor:
        """Projected visual tokens `[batch, num_visual_tokens, hidden]` of normalised pictures."""
        with self._backbone_context():
            return self.projection(self.vision_encoder(pixel_values))

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 `[batch, height, width, 3]` -> `[batch, 3, height, width]` in the parameters' dtype."""
        mean = torch.tensor(self.config.image_mean, device=pictures.device)[:, None, None]
        std = torch.tensor(self.config.image_std, device=pictures.device)[:, None, None]
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return pixels.to(self.projection.norm.weight.dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings `[..., hidden]`; the tokens of Stage 4 come from the reasoning head."""
        added, own = self._added(input_ids)
        embeds = self.language_model.embed(input_ids.masked_fill(added, 0))
        return torch.where(added[..., None], own.to(embeds.dtype), embeds)

    def _added(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        base = self._base_vocab_size
        added = input_ids >= base
        own = self.reasoning_module.reasoning_head.token_embedding((input_ids - base).clamp_min(0))
        return added, own

    @property
    def _base_vocab_size(self) -> int:
        if self.tokenizer is None:
            raise ConfigError("the model has no tokenizer; attach_tokenizer() first")
        return self.tokenizer.base_vocab_size

    def read(
        self, visual: Tensor, image_mask: Tensor, input_ids: Tensor, text_mask: Tensor, cache: Any = None
    ) -> Tensor:
        """The language model's hidden states at the text positions, `[batch, length, hidden]`.

        Args:
            visual: `[batch, num_visual_tokens, hidden]`; stands before the text.
            image_mask: `[batch]` bool; where False the picture is not looked at.
            input_ids: `[batch, length]` int64.
            text_mask: `[batch, length]` bool, False at padding, on either side.
            cache: An empty key-value cache to fill, or None.
        """
        num_visual = visual.shape[1]
        mask = torch.cat([image_mask[:, None].expand(-1, num_visual), text_mask], dim=1)
        position_ids = (mask.long().cumsum(1) - 1).clamp_min(0)
        with self._backbone_context():
            embeds = torch.cat([visual, self.embed(input_ids).to(visual.dtype)], dim=1)
            hidden = self.language_model(embeds, mask.long(), position_ids, cache)[:, num_visual:]
        return hidden

    def refine(self, hidden: Tensor, input_ids: Tensor, visual: Tensor, image_mask: Tensor, **kwargs: Any) -> Any:
        """The reasoning head over `hidden`; tokens of Stage 4 enter here too, past the language model."""
        return self.reasoning_module.reasoning_head(self.enter(hidden, input_ids), visual, image_mask, **kwargs)

    def enter(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The language model's states, and with them the tokens of Stage 4 among `input_ids`."""
        added, own = self._added(input_ids)
        return hidden + torch.where(added[..., None], own.to(hidden.dtype), hidden.new_zeros(()))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Scores `[..., base vocabulary + Stage 4 tokens]`."""
        return torch.cat(self.token_scores(hidden), dim=-1)

    def token_scores(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the base vocabulary and those of Stage 4's tokens, apart."""
        base = self.language_model.logits(hidden)[..., : self._base_vocab_size]
        added = hidden @ self.reasoning_module.reasoning_head.token_embedding.weight.T
        return base, self.language_model.scaled(added)

    def candidate_embeddings(self, candidate_ids: Tensor) -> Tensor:
        """Mean token embedding of each candidate, from ids padded with -1: `[..., length] -> [..., hidden]`."""
        real = candidate_ids >= 0
        embeds = self.language_model.embed(candidate_ids.clamp_min(0)).detach() * real[..., None]
        return embeds.sum(-2) / real.sum(-1, keepdim=True).clamp_min(1)

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        text_mask: Tensor,
        image_mask: Tensor,
        pictures: Tensor | None = None,
        visual: Tensor | None = None,
        score_index: Tensor | None = None,
        answer_index: Tensor | None = None,
        candidate_ids: Tensor | None = None,
        pair_ids: Tensor | None = None,
        pair_segments: Tensor | None = None,
        pair_mask: Tensor | None = None,
        pair_record: Tensor | None = None,
        own_record: Tensor | None = None,
        own_prompt: Tensor | None = None,
        own_places: Tensor | None = None,
        ground_index: Tensor | None = None,
        sampled_index: Tensor | None = None,
        repeated: Tensor | None = None,
        use_reasoning: bool = True,
    ) -> EmberVLMOutput:
        """One pass over a batch of whole sequences. `*_index` count over the flattened `[batch * length]` positions.

        Args:
            input_ids, text_mask: `[batch, length]`, padded to the right.
            image_mask: `[batch]` bool, False for a record without a picture.
            pictures: `[batch, image_size, image_size, 3]` uint8; or give `visual`, computed before.
            score_index: `[scored]`, positions whose next token is scored.
            answer_index: `[records]`, where the answer head reads; `candidate_ids`: `[(records,) candidates, length]`.
            pair_ids, pair_segments, pair_mask: `[pairs, length]`, what the validator reads; `pair_record` `[pairs]`.
            own_record, own_prompt, own_places: chains of which the validator also reads the model's own mistakes,
                behind the pairs; see `own_mistakes`.
            ground_index: `[grounded]`, tokens whose attention is supervised.
            sampled_index: `[sampled]`, inputs that are replaced by the model's own predictions (scheduled sampling;
                Bengio et al. 2015, in two parallel passes after Mihaylova and Martins 2019).
            repeated: `[repeated]`, rows whose text the last rows repeat behind other pictures.
            use_reasoning: False leaves the reasoning head out (Stage 3 and the no-reasoning baseline).
        """
        if visual is None:
            if pictures is None:
                raise ValueError("give pictures or visual")
            visual = self.see(self.normalise(pictures))
        gold_ids = input_ids
        if sampled_index is not None:
            input_ids = self._sample_inputs(visual, image_mask, input_ids, text_mask, sampled_index)
            if repeated is not None and len(repeated):
                input_ids = torch.cat([input_ids[: -len(repeated)], input_ids[repeated]])
        hidden = self.read(visual, image_mask, input_ids, text_mask)
        attention = None
        if use_reasoning:
            hidden, attention = self.refine(
                hidden, input_ids, visual, image_mask, want_attention=ground_index is not None
            )
        flat = hidden.flatten(0, 1)
        out = EmberVLMOutput(patch_features=visual)
        if score_index is not None:
            out.token_logits = self.token_logits(flat.index_select(0, score_index))
        if answer_index is not None and candidate_ids is not None:
            record = answer_index // input_ids.shape[1]
            out.answer_logits = self.reasoning_module.answer_head(
                flat.index_select(0, answer_index), visual.index_select(0, record),
                image_mask.index_select(0, record), self.candidate_embeddings(candidate_ids),
            )  # fmt: skip
        if pair_ids is not None and pair_record is not None and pair_segments is not None and pair_mask is not None:
            pairs = {
                "pair_ids": pair_ids, "pair_segments": pair_segments, "pair_mask": pair_mask,
                "pair_record": pair_record,
            }  # fmt: skip
            if own_record is not None and own_prompt is not None and own_places is not None:
                assert out.token_logits is not None
                pairs = together(pairs, own_mistakes(
                    self, visual, image_mask, gold_ids, out.token_logits, own_record, own_prompt, own_places
                ))  # fmt: skip
            of = pairs.pop("pair_record")
            out.validator_logits = self.judge_steps(visual.index_select(0, of), image_mask.index_select(0, of), **pairs)
        if ground_index is not None and attention is not None:
            out.grounding_attention = attention.flatten(0, 1).index_select(0, ground_index)
        return out

    def judge_steps(
        self, visual: Tensor, image_mask: Tensor, pair_ids: Tensor, pair_segments: Tensor, pair_mask: Tensor
    ) -> Tensor:
        """The step validator's logits `[pairs]`; for the arguments see `forward` and `validator_inputs`.

        No gradient leaves the validator: it learns to judge the model and does not bend it, its vision included.
        """
        step = StepValidator.SEGMENTS.index("step")
        scored = ((pair_segments == step) & pair_mask).flatten().nonzero().squeeze(1)
        was_training = self.training
        self.eval()
        with torch.no_grad():
            hidden = self.read(visual, image_mask, pair_ids, pair_mask)
            hidden, _ = self.refine(hidden, pair_ids, visual, image_mask)
            logits = self.token_logits(hidden.flatten(0, 1).index_select(0, (scored - 1).clamp_min(0)))
            losses = F.cross_entropy(logits.float(), pair_ids.flatten().index_select(0, scored), reduction="none")
            surprise = losses.new_zeros(pair_ids.numel()).index_copy(0, scored, losses).view(pair_ids.shape)
        self.train(was_training)
        return self.reasoning_module.step_validator(
            visual.detach(), image_mask, hidden, surprise, pair_segments, pair_mask
        )  # fmt: skip

    @torch.no_grad()
    def _sample_inputs(
        self, visual: Tensor, image_mask: Tensor, input_ids: Tensor, text_mask: Tensor, sampled_index: Tensor
    ) -> Tensor:
        was_training = self.training
        self.eval()
        hidden = self.read(visual, image_mask, input_ids, text_mask)
        hidden, _ = self.refine(hidden, input_ids, visual, image_mask)
        self.train(was_training)
        scores = self.token_logits(hidden.flatten(0, 1).index_select(0, (sampled_index - 1).clamp_min(0)))
        own = scores[:, : self._base_vocab_size].argmax(-1)  # the chain's structure stays gold
        return input_ids.flatten().index_copy(0, sampled_index, own).view_as(input_ids)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate_with_reasoning(
        self, image: Any = None, instruction: Any = "", max_reasoning_steps: int | None = None,
        return_reasoning: bool = True, **decoding: Any,
    ) -> Any:  # fmt: skip
        """The answer with its reasons; for lists of pictures and instructions a list, computed as one batch.

        Args:
            image: Path, PIL image, array, encoded bytes, or None for a question without a picture.
            instruction: The question.
            max_reasoning_steps: Most steps of the chain, its conclusion included; None is what the training data
                needed, with a margin.
            return_reasoning: False leaves `reasoning_steps` out of the result.
            decoding: See `embervlm.model.generation.Decoding`.

        Returns:
            `{"reasoning_steps": [...], "answer": "Drone, Humanoid", "confidence": 0.93, ...}`; `cut_off` is "steps" or
            "tokens" where that limit cut the text off, else None.
        """
        from embervlm.model.generation import Decoding, generate_answers

        single = isinstance(instruction, str)
        images, instructions = ([image], [instruction]) if single else (image, instruction)
        if images is None:
            images = [None] * len(instructions)
        settings = Decoding(max_reasoning_steps=max_reasoning_steps, **decoding)
        results = generate_answers(self, images, instructions, settings)
        if not return_reasoning:
            for result in results:
                del result["reasoning_steps"]
        return results[0] if single else results

    def generate_reasoning(
        self, image: Any, question: str, constraint: str | None = None, **decoding: Any
    ) -> Reasoning:  # fmt: skip
        """A chain with its answer, as an object that `verify_reasoning` and `reason` take.

        Args:
            constraint: `"ensure_logical_consistency"` draws more chains where `verify_reasoning` finds fault with the
                likeliest one, and gives the one with the fewest faults.
            decoding: See `embervlm.model.generation.Decoding`.
        """
        from embervlm.model import interactive

        return interactive.reason(self, image, question, None, constraint, _decoding(decoding))

    def verify_reasoning(self, reasoning: Any, image: Any = None, question: str | None = None) -> bool:
        """Whether nothing speaks against a chain: not cut off, at least two steps, none twice, a conclusion that
        names the answer and no other candidate, and every step more likely to follow than not by the model's own step
        validator.

        It is the model's opinion of its own chain, and no metric.

        Args:
            reasoning: Of `generate_reasoning`; or steps or their text, with `image` and `question`.
        """
        return not self.reasoning_faults(reasoning, image, question)

    def reasoning_faults(self, reasoning: Any, image: Any = None, question: str | None = None) -> list[str]:
        """Why `verify_reasoning` says no, a sentence each."""
        from embervlm.model import interactive

        return interactive.verify(self, reasoning, image, question)

    def reason(self, image: Any, question: str, previous_reasoning: Any = None, **decoding: Any) -> dict[str, Any]:
        """`{"reasoning", "reasoning_steps", "answer", "answer_set", "confidence"}` of a question or a follow-up.

        A follow-up is asked behind the question before. Of the reasoning before, the first steps that still hold by
        the step validator begin the new chain; the model goes on from there.
        """
        from embervlm.model import interactive

        found = interactive.reason(self, image, question, previous_reasoning, None, _decoding(decoding))
        return {
            "reasoning": found, "reasoning_steps": found.steps, "answer": found.answer,
            "answer_set": found.answer_set, "confidence": found.confidence,
        }  # fmt: skip

    def generate_with_template(
        self, image: Any, instruction: str, template: str | Sequence[str] = "analysis",
        templates: Mapping[str, Sequence[str]] | None = None, **decoding: Any,
    ) -> Reasoning:  # fmt: skip
        """A chain under the headings of a template, in `sections` and as text.

        The chain is the model's own: headings that it was not trained on would lead it astray, so they are put in
        afterwards. A model that was trained on chains with these headings writes them itself, and they are kept.

        Args:
            template: `analysis`, `step_by_step`, `comparative`, a name in `templates`, or a list of headings.
        """
        from embervlm.model import interactive

        headings = interactive.template_headings(template, {**interactive.TEMPLATES, **(templates or {})})
        found = interactive.reason(self, image, instruction, None, None, _decoding(decoding))
        return replace(found, sections=interactive.lay_out(found.steps, headings))

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *, config: EmberVLMConfig | None = None, dtype: Any = None,
        device_map: Any = None, revision: str | None = None, **others: Any,
    ) -> EmberVLM:  # fmt: skip
        """The model in a checkpoint folder (or of a hub id), ready to answer.

        Where the checkpoint has been evaluated, its `confidence` is calibrated with what was fitted then.

        Args:
            config: In place of the checkpoint's own.
            dtype: Of the weights: a torch type or its name; None and `auto` leave them as they are, float32.
            device_map: The one device that the model goes to; `auto` is the GPU where there is one.
            revision: Branch, tag or commit of a hub id.
            others: Options of the download; anything else that asks for something is an error.

        Raises:
            CheckpointError: names the file that is missing, damaged, or of another model size.
            ConfigError: names an option that is not known.
        """
        dtype, device = _dtype_of(others.pop("torch_dtype", None) if dtype is None else dtype), _device_of(device_map)
        hub = {name: others.pop(name) for name in _HUB_OPTIONS if name in others}
        others.pop("trust_remote_code", None)  # nothing here runs any; AutoModel always passes it
        if wrong := sorted(name for name, value in others.items() if value not in (None, False, {})):
            known = ", ".join(("config", "dtype", "device_map", "revision", *_HUB_OPTIONS))
            raise ConfigError(f"from_pretrained: {', '.join(wrong)}: not known; there are {known}")
        folder = resolve_folder(pretrained_model_name_or_path, revision, **hub)
        try:
            config = config or EmberVLMConfig.from_pretrained(str(folder))
            model = cls(config)
        except UNREADABLE as error:
            raise CheckpointError(f"{folder / 'config.json'}: not a readable configuration ({error})") from error
        load_checkpoint_into(model, folder, COMPONENTS if config.stage == STAGE4 else BACKBONE)
        model.attach_tokenizer(ReasoningTokenizer.from_folder(folder))
        model.confidence_temperature = run_dir.read_temperature(folder)
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, save_directory: Any, state_dict: Mapping[str, Tensor] | None = None, **_: Any) -> None:  # type: ignore[override]
        """Write config, weights and tokenizer under the guide's file names. Not atomic; see `run_dir`."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_weights(state_dict if state_dict is not None else self.state_dict(), folder, self.config.stage != STAGE3)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)


_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")


def _dtype_of(given: Any) -> torch.dtype:
    found = {None: torch.float32, "auto": torch.float32}.get(given, given)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"from_pretrained: dtype {given!r} is no type of weights; name one such as bfloat16")
    return found


def _device_of(given: Any) -> torch.device:
    if isinstance(given, Mapping) and set(given) == {""}:
        given = given[""]
    if given == "auto":
        given = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device("cpu" if given is None else given)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"from_pretrained: device_map {given!r} is not one device; name one such as cuda:0, or auto"
        ) from error


def _decoding(settings: Mapping[str, Any]) -> Decoding:
    from embervlm.model.generation import Decoding

    return Decoding(**settings)


def build_model(settings: Mapping[str, Any], *, load_pretrained: bool = True) -> EmberVLM:
    """A new model from the settings of a preset; pretrained parts are loaded where they say so."""
    known = set(EmberVLMConfig.__init__.__code__.co_varnames)
    if wrong := sorted(set(settings) - known):
        raise ConfigError(f"model: unknown keys {wrong}")
    return EmberVLM(EmberVLMConfig(**{"surprise_by_magnitude": True, **settings}), load_pretrained=load_pretrained)


AutoConfig.register("embervlm", EmberVLMConfig)
AutoModel.register(EmberVLMConfig, EmberVLM)
