"""The network: a vision encoder, a projection, a language model, and the reasoning module that Stage 4 adds.

May touch tensors and its own parameters; knows neither text, decoding nor files.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from embervlm.config import BACKBONE, REASONING_PARTS, ConfigError
from embervlm.data.length_groups import LengthGroup
from embervlm.data.samples import Grid
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.model.backbone import LanguageModel, VisionEncoder, with_built_config
from embervlm.model.config import EmberVLMConfig
from embervlm.model.connectors import build_connector
from embervlm.model.grouped import cut_to, in_order
from embervlm.model.inputs import Inputs
from embervlm.model.known import Known
from embervlm.model.own_mistakes import own_mistakes, together
from embervlm.model.reasoning import ReasoningModule, StepValidator


@dataclass
class EmberVLMOutput(ModelOutput):
    """What the losses need; every tensor is None where its inputs were not given.

    Attributes:
        token_logits: `[scored, vocab]` of the scored positions only.
        answer_logits: `[records, candidates]`.
        validator_logits: `[pairs]`.
        grounding_attention: `[grounded, grid.size]`, the reasoning head's attention at the grounded tokens.
        patch_features: `[batch, grid.size, hidden]`, the projected visual tokens that stand for a place.
    """

    token_logits: Tensor | None = None
    answer_logits: Tensor | None = None
    validator_logits: Tensor | None = None
    grounding_attention: Tensor | None = None
    patch_features: Tensor | None = None


class EmberVLMNetwork(PreTrainedModel):
    """The parameters of the model and its forward pass; `EmberVLM` adds what users call."""

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
        features = self.vision_encoder
        self.projection = build_connector(config, features.vision_dim, hidden, features.grid)
        factor = self.projection.factor
        self.grid = Grid(features.grid.rows // factor, features.grid.columns // factor)
        self.reasoning_module = ReasoningModule(config, hidden, self.num_visual_tokens)
        self._tokenizer: ReasoningTokenizer | None = None
        self.frozen: frozenset[str] = frozenset()
        self.adapted: tuple[str, ...] = ()
        """Components whose own weights are frozen because adapters are trained; so are their running statistics."""
        self.confidence_temperature = 1.0
        self.written_scale: tuple[float, float] | None = None
        self.known: Known | None = None

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Every part initialises itself when it is built."""

    # -- parts and their sizes ---------------------------------------------------------------------------------------

    @property
    def num_visual_tokens(self) -> int:
        """What the language model reads of a picture: the rows and columns of `grid`, and what a connector adds."""
        num_behind: int = getattr(self.projection, "num_behind", 0)
        return self.grid.size + num_behind

    @property
    def visual_dtype(self) -> torch.dtype:
        held = itertools.chain(self.projection.parameters(), self.projection.buffers())
        return next(tensor.dtype for tensor in held if tensor.is_floating_point())

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
        tokenizer.check_rows(self.language_model.vocab_size)
        tokenizer.use(self.config.text_format, self.config.prompt)
        self._tokenizer = tokenizer

    def adopt_tokenizer(self, tokenizer: ReasoningTokenizer) -> None:
        """Attach it to a new model, which then puts questions as its chat template does, if it has one."""
        self.config.prompt = tokenizer.chat_prompt() if self.config.chat_template else None
        self.attach_tokenizer(tokenizer)

    def adopt_own_tokenizer(self, tokenizer: ReasoningTokenizer) -> None:
        """Attach a tokenizer that was made for this model alone, which then embeds no more than its tokens."""
        self.language_model.keep_rows(tokenizer.base_vocab_size)
        self.config.language = with_built_config(self.config.language, self.language_model.backbone)
        self.attach_tokenizer(tokenizer)

    @property
    def tokenizer(self) -> ReasoningTokenizer:
        if self._tokenizer is None:
            raise ConfigError("the model has no tokenizer; attach_tokenizer() first")
        return self._tokenizer

    @property
    def base_vocab_size(self) -> int:
        return self.tokenizer.base_vocab_size

    def freeze(self, parts: Iterable[str]) -> None:
        """Run these parts of the backbone in eval mode, so that their buffers do not move either; all of them without
        gradients.

        Which parameters learn is `build_param_groups`' business: a tied output embedding is used past the backbone.
        """
        self.frozen = frozenset(parts)
        self.train(self.training)

    def train(self, mode: bool = True) -> EmberVLMNetwork:
        super().train(mode)
        for name in getattr(self, "frozen", ()):
            getattr(self, name).eval()
        for name in getattr(self, "adapted", ()):
            for module in getattr(self, name).modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the backbone's activations in the backward pass (non-reentrant: frozen layers may stand below)."""
        for part in (self.vision_encoder.backbone, self.language_model.backbone):
            if getattr(part, "supports_gradient_checkpointing", False):
                part.gradient_checkpointing_enable({"use_reentrant": False})

    @contextlib.contextmanager
    def in_eval_mode(self) -> Iterator[None]:
        """Without dropout; the mode is put back."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _backbone_context(self) -> contextlib.AbstractContextManager[Any]:
        return torch.no_grad() if self.frozen.issuperset(BACKBONE) else contextlib.nullcontext()

    # -- pieces of the forward pass ----------------------------------------------------------------------------------

    def see(self, pixel_values: Tensor) -> Tensor:
        """Projected visual tokens `[batch, num_visual_tokens, hidden]` of normalised pictures."""
        with self._backbone_context():
            return self.projection(self.vision_encoder(pixel_values))

    def see_pictures(self, pictures: Tensor) -> Tensor:
        """The same of uint8 pictures `[batch, height, width, 3]` on any device."""
        return self.see(self.normalise(pictures.to(self.device)))

    def normalise(self, pictures: Tensor) -> Tensor:
        """uint8 `[batch, height, width, 3]` -> `[batch, 3, height, width]` in the parameters' dtype."""
        mean = torch.tensor(self.config.image_mean, device=pictures.device)[:, None, None]
        std = torch.tensor(self.config.image_std, device=pictures.device)[:, None, None]
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
        return pixels.to(self.visual_dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings `[..., hidden]`; the tokens of Stage 4 come from the reasoning head."""
        added, own = self._added(input_ids)
        embeds = self.language_model.embed(input_ids.masked_fill(added, 0))
        return torch.where(added[..., None], own.to(embeds.dtype), embeds)

    def _added(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        base = self.base_vocab_size
        added = input_ids >= base
        own = self.reasoning_module.reasoning_head.token_embedding((input_ids - base).clamp_min(0))
        return added, own

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
        base = self.language_model.logits(hidden)[..., : self.base_vocab_size]
        added = hidden @ self.reasoning_module.reasoning_head.token_embedding.weight.T
        return base, self.language_model.scaled(added)

    def candidate_embeddings(self, candidate_ids: Tensor) -> Tensor:
        """Mean token embedding of each candidate, from ids padded with -1: `[..., length] -> [..., hidden]`."""
        real = candidate_ids >= 0
        embeds = self.language_model.embed(candidate_ids.clamp_min(0)).detach() * real[..., None]
        return embeds.sum(-2) / real.sum(-1, keepdim=True).clamp_min(1)

    # -- training ----------------------------------------------------------------------------------------------------

    def forward(self, **inputs: Any) -> EmberVLMOutput:
        """One pass over a micro-batch; `inputs` are the fields of `Inputs`."""
        batch = Inputs(**inputs)
        visual = batch.visual
        if visual is None:
            if batch.pictures is None:
                raise ValueError("give pictures or visual")
            visual = self.see_pictures(batch.pictures)
            if batch.picture_rows is not None:
                visual = visual.index_select(0, batch.picture_rows)
        input_ids = self._sampled_ids(batch, visual)
        hidden, attention = self._states(
            visual,
            batch.image_mask,
            input_ids,
            batch.text_mask,
            batch.groups,
            use_reasoning=batch.use_reasoning,
            want_attention=batch.ground_index is not None,
        )
        flat = hidden.flatten(0, 1)
        out = EmberVLMOutput(patch_features=visual[:, : self.grid.size])
        if batch.score_index is not None:
            out.token_logits = self.token_logits(flat.index_select(0, batch.score_index))
        if batch.answer_index is not None and batch.candidate_ids is not None:
            record = batch.answer_index // input_ids.shape[1]
            out.answer_logits = self.reasoning_module.answer_head(
                flat.index_select(0, batch.answer_index),
                visual.index_select(0, record),
                batch.image_mask.index_select(0, record),
                self.candidate_embeddings(batch.candidate_ids),
            )
        if batch.pair_record is not None:
            out.validator_logits = self._judge_pairs(batch, visual, out.token_logits)
        if batch.ground_index is not None and attention is not None:
            looked = attention.flatten(0, 1).index_select(0, batch.ground_index)
            out.grounding_attention = looked[:, : self.grid.size]
        return out

    def _states(
        self,
        visual: Tensor,
        image_mask: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
        groups: Sequence[LengthGroup] | None = None,
        *,
        use_reasoning: bool = True,
        want_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The text's last states `[batch, length, hidden]`, and the reasoning head's attention where wanted.

        With `groups` each of them is read for itself, and filled up with zeros to the length of all.
        """
        options = {"use_reasoning": use_reasoning, "want_attention": want_attention}
        if groups is None or len(groups) == 1:
            return self._states_of(visual, image_mask, input_ids, text_mask, **options)
        found = []
        for group in groups:
            rows = torch.tensor(group.rows, device=visual.device)
            ids, mask = (values[rows, : group.length] for values in (input_ids, text_mask))
            seen, sees = visual.index_select(0, rows), image_mask.index_select(0, rows)
            found.append(self._states_of(seen, sees, ids, mask, everyone_blind=not group.sees, **options))
        states, attentions = zip(*found)
        return in_order(states, groups), in_order(attentions, groups) if want_attention else None

    def _states_of(
        self,
        visual: Tensor,
        image_mask: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
        *,
        use_reasoning: bool,
        want_attention: bool,
        everyone_blind: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`_states` of one group; `everyone_blind` where no row has a picture, so none has to stand before the text."""
        hidden = self.read(visual[:, :0] if everyone_blind else visual, image_mask, input_ids, text_mask)
        if not use_reasoning:
            return hidden, None
        states, attention = self.refine(hidden, input_ids, visual, image_mask, want_attention=want_attention)
        return states, attention

    def _sampled_ids(self, batch: Inputs, visual: Tensor) -> Tensor:
        """`input_ids` under scheduled sampling."""
        if batch.sampled_index is None:
            return batch.input_ids
        input_ids = self.with_own_predictions(
            visual, batch.image_mask, batch.input_ids, batch.text_mask, batch.sampled_index, batch.groups
        )
        if batch.repeated is not None and len(batch.repeated):
            input_ids = torch.cat([input_ids[: -len(batch.repeated)], input_ids[batch.repeated]])
        return input_ids

    @torch.no_grad()
    def with_own_predictions(
        self,
        visual: Tensor,
        image_mask: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
        sampled_index: Tensor,
        groups: Sequence[LengthGroup] | None = None,
    ) -> Tensor:
        """`input_ids` with the model's own greedy predictions at `sampled_index`."""
        scores = self._scores_of(visual, image_mask, input_ids, text_mask, sampled_index, groups)[1]
        own = scores[:, : self.base_vocab_size].argmax(-1)  # the chain's structure stays gold
        return input_ids.flatten().index_copy(0, sampled_index, own).view_as(input_ids)

    def _scores_of(
        self,
        visual: Tensor,
        image_mask: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
        index: Tensor,
        groups: Sequence[LengthGroup] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States of a text in eval mode, and the scores that led to its tokens at `index`."""
        with self.in_eval_mode():
            hidden, _ = self._states(visual, image_mask, input_ids, text_mask, groups)
        return hidden, self.token_logits(hidden.flatten(0, 1).index_select(0, (index - 1).clamp_min(0)))

    def _judge_pairs(self, batch: Inputs, visual: Tensor, token_logits: Tensor | None) -> Tensor:
        """The step validator's logits of the pairs, and behind them of the model's own mistakes."""
        pairs = {name: getattr(batch, name) for name in ("pair_ids", "pair_segments", "pair_mask", "pair_record")}
        own = None
        if batch.own_record is not None:
            assert token_logits is not None
            own = own_mistakes(self.with_own_predictions, self.base_vocab_size, visual, batch, token_logits)
        if batch.pair_groups is None:
            parts = [pairs if own is None else together(pairs, own)]
        else:
            parts = [cut_to(pairs, group) for group in batch.pair_groups] + ([] if own is None else [own])
        logits = []
        for part in parts:
            of = part.pop("pair_record")
            seen = visual.index_select(0, of)
            logits.append(self.judge_steps(seen, batch.image_mask.index_select(0, of), **part))
        if batch.pair_groups is None:
            return logits[0]
        judged = in_order(logits[: len(batch.pair_groups)], batch.pair_groups)
        return torch.cat([judged, *logits[len(batch.pair_groups) :]])

    def judge_steps(
        self, visual: Tensor, image_mask: Tensor, pair_ids: Tensor, pair_segments: Tensor, pair_mask: Tensor
    ) -> Tensor:
        """The step validator's logits `[pairs]`; for the arguments see `Inputs` and `validator_inputs`.

        No gradient leaves the validator: it learns to judge the model and does not bend it, its vision included.
        """
        step = StepValidator.SEGMENTS.index("step")
        scored = ((pair_segments == step) & pair_mask).flatten().nonzero().squeeze(1)
        with torch.no_grad():
            hidden, logits = self._scores_of(visual, image_mask, pair_ids, pair_mask, scored)
            losses = F.cross_entropy(logits.float(), pair_ids.flatten().index_select(0, scored), reduction="none")
            surprise = losses.new_zeros(pair_ids.numel()).index_copy(0, scored, losses).view(pair_ids.shape)
        return self.reasoning_module.step_validator(
            visual.detach(), image_mask, hidden, surprise, pair_segments, pair_mask
        )
