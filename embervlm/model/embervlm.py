"""`EmberVLM`, what users call: the network with generation, verification and files."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.initialization import no_init_weights

from embervlm.config import BACKBONE, COMPONENTS, ConfigError
from embervlm.data.tokenizer import TEXT_FORMAT, ReasoningTokenizer
from embervlm.errors import UNREADABLE
from embervlm.model import interactive
from embervlm.model.confidence import read_calibration
from embervlm.model.config import PAD, SQUASH, STAGE3, STAGE4, EmberVLMConfig
from embervlm.model.decoding import Decoding
from embervlm.model.generation import continue_ids, generate_answers, look
from embervlm.model.int8 import holds_int8, room_for_int8
from embervlm.model.interactive import Reasoning
from embervlm.model.known import read_known
from embervlm.model.lora import merged, save_adapters
from embervlm.model.network import EmberVLMNetwork
from embervlm.model.preprocessor import with_preprocessor
from embervlm.model.processor import EmberVLMProcessor
from embervlm.model.storage import HUB_OPTIONS, CheckpointError, load_state, read_weights, resolve_folder, save_weights
from embervlm.model.streaming import ANSWER, OnText, Pieces


class EmberVLM(EmberVLMNetwork):
    """Small vision-language model that reasons in steps before it answers."""

    input_modalities = ("image", "text")
    output_modalities = ("text",)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate_with_reasoning(
        self,
        image: Any = None,
        instruction: Any = "",
        max_reasoning_steps: int | None = None,
        return_reasoning: bool = True,
        on_text: OnText | None = None,
        **decoding: Any,
    ) -> Any:
        """The answer with its reasons; for lists of pictures and instructions a list, computed as one batch.

        Args:
            image: Path, PIL image, array, encoded bytes, or None for a question without a picture.
            instruction: The question.
            max_reasoning_steps: Most steps of the chain, its conclusion included; None is what the training data
                needed, with a margin.
            return_reasoning: False leaves `reasoning_steps` out of the result.
            on_text: Called with every `Piece` of text as it is written (`embervlm.model.streaming`).
            decoding: See `embervlm.model.decoding.Decoding`.

        Returns:
            `{"reasoning_steps": [...], "answer": "Drone, Humanoid", "confidence": 0.93, ...}`; `cut_off` is "steps" or
            "tokens" where that limit cut the text off, else None. With `num_chains` above 1 also `votes`,
            answer -> votes; see `embervlm.model.voting.elected`.

            `answer` is None, and `why` a sentence, where the model wrote none or the question is unlike those of
            training: where `known`, in [0, 1], is below `min_known`. `confidence` is the answer head's probability
            (of an answer in free words `written_probability`, scaled) times `known`; `answer_set` and `text` are what
            the model wrote all the same. `known` is None, and no question is refused, before the checkpoint has been
            evaluated.
        """
        single = isinstance(instruction, str)
        images, instructions = ([image], [instruction]) if single else (image, instruction)
        if images is None:
            images = [None] * len(instructions)
        settings = Decoding(max_reasoning_steps=max_reasoning_steps, **decoding)
        pieces = None if on_text is None else Pieces(self.tokenizer, on_text, None if settings.reasoning else ANSWER)
        results = generate_answers(self, images, instructions, settings, pieces)
        if not return_reasoning:
            for result in results:
                del result["reasoning_steps"]
        return results[0] if single else results

    def generate_reasoning(
        self, image: Any, question: str, constraint: str | None = None, on_text: OnText | None = None, **decoding: Any
    ) -> Reasoning:
        """A chain with its answer, as an object that `verify_reasoning` and `reason` take.

        Args:
            constraint: `"ensure_logical_consistency"` draws more chains where `verify_reasoning` finds fault with the
                likeliest one, and gives the one with the fewest faults.
            on_text: As in `generate_with_reasoning`; it hears the likeliest chain.
            decoding: See `embervlm.model.decoding.Decoding`.
        """
        return interactive.reason(self, image, question, None, constraint, Decoding(**decoding), on_text)

    def verify_reasoning(self, reasoning: Any, image: Any = None, question: str | None = None) -> bool:
        """Whether a chain passes all checks: not cut off, at least two steps, none twice, none that denies another, no
        sum that does not come out, a conclusion that names the answer and no other candidate, and every step more
        likely to follow than not by the model's own step validator.

        It is the model's opinion of its own chain, and no metric.

        Args:
            reasoning: Of `generate_reasoning`; or steps or their text, with `image` and `question`.
        """
        return not self.reasoning_faults(reasoning, image, question)

    def reasoning_faults(self, reasoning: Any, image: Any = None, question: str | None = None) -> list[str]:
        """The reasons why `verify_reasoning` rejects a chain, a sentence each."""
        return interactive.verify(self, reasoning, image, question)

    def reason(
        self, image: Any, question: str, previous_reasoning: Any = None, on_text: OnText | None = None, **decoding: Any
    ) -> dict[str, Any]:
        """`{"reasoning", "reasoning_steps", "answer", "answer_set", "confidence", "known", "why"}` of a question or a
        follow-up; see `generate_with_reasoning` for an answer that is None.

        A follow-up is asked behind the question before. Of the reasoning before, the first steps that still hold by
        the step validator begin the new chain, and the model continues it.
        """
        found = interactive.reason(self, image, question, previous_reasoning, None, Decoding(**decoding), on_text)
        return {
            "reasoning": found,
            "reasoning_steps": found.steps,
            "answer": found.answer,
            "answer_set": found.answer_set,
            "confidence": found.confidence,
            "known": found.known,
            "why": found.why,
        }

    def generate_with_template(
        self,
        image: Any,
        instruction: str,
        template: str | Sequence[str] = "analysis",
        templates: Mapping[str, Sequence[str]] | None = None,
        **decoding: Any,
    ) -> Reasoning:
        """A chain under the headings of a template, in `sections` and as text.

        Each heading is put at the start of a step, and the model writes what stands under it. Where that leads it
        astray (headings that it was not trained on do, and `reasoning_faults` then finds something), and for blocks
        with `{i}`, it writes a chain of its own, and the headings are laid over its steps.

        Args:
            template: `analysis`, `step_by_step`, `comparative`, a name in `templates`, or a list of headings.
        """
        headings = interactive.template_headings(template, {**interactive.TEMPLATES, **(templates or {})})
        return interactive.under_headings(self, image, instruction, headings, Decoding(**decoding))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        num_return_sequences: int | None = None,
        pad_token_id: int | None = None,
        **others: Any,
    ) -> Tensor:
        """What `pipeline("image-text-to-text")` calls: the ids of chains and answers, each behind its prompt.

        It refuses no question and gives no confidence; `generate_with_reasoning` does.

        Args:
            input_ids: `[batch, length]`, padded on the left, as `AutoProcessor` makes them.
            attention_mask: `[batch, length]`, 0 where it is padded; None where nothing is.
            pixel_values: `[batch, size, size, 3]` uint8; None without pictures.
            max_new_tokens: Of each text; None is what the training data needed, with a margin.
            do_sample: Whether tokens are drawn, with torch's random numbers, at `temperature` and `top_p`.
            num_return_sequences: Texts of each prompt, one behind the other.
            pad_token_id: What shorter texts are filled with, on the right; None is the end of text.

        Returns:
            `[batch * num_return_sequences, longest]` int64.

        Raises:
            ConfigError: names what is not known of transformers' own settings.
        """
        _refuse_options("generate", others, _GENERATE_OPTIONS)
        hot = 1.0 if temperature is None else temperature
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            form="direct" if self.config.stage == STAGE3 else "reasoning",
            num_chains=num_return_sequences or 1,
            seed=int(torch.randint(2**31, ())) if do_sample else 0,
            temperature=hot if do_sample else 0.0,
            top_p=top_p if do_sample and top_p is not None else 1.0,
        )
        if decoding.num_chains > 1 and not do_sample:
            raise ConfigError("generate: num_return_sequences above 1 needs do_sample, or all would be the same")
        prompts = input_ids.tolist()
        if attention_mask is not None:
            prompts = [row[len(row) - kept :] for row, kept in zip(prompts, attention_mask.sum(1).tolist())]
        with self.in_eval_mode():
            if pixel_values is None:
                visual, seen = look(self, [None] * len(prompts))
            else:
                visual, seen = self.see_pictures(pixel_values), torch.ones(len(prompts), dtype=torch.bool)
            texts = continue_ids(self, visual, seen.to(self.device), prompts, decoding)
        pad = self.tokenizer.end_of_text if pad_token_id is None else pad_token_id
        longest = max(map(len, texts))
        return torch.tensor([[*text, *[pad] * (longest - len(text))] for text in texts], device=self.device)

    @classmethod
    def can_generate(cls) -> bool:
        """True: `generate` takes and gives what transformers' own does."""
        return True

    # -- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *,
        config: EmberVLMConfig | None = None,
        dtype: Any = None,
        device_map: Any = None,
        revision: str | None = None,
        **others: Any,
    ) -> EmberVLM:
        """The model in a checkpoint folder (or of a hub id), ready to answer.

        Where the checkpoint has been evaluated, its `confidence` is calibrated with what was fitted then, and it
        refuses questions that are unlike those of its training.

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
        hub = {name: others.pop(name) for name in HUB_OPTIONS if name in others}
        others.pop("trust_remote_code", None)  # nothing here runs any; AutoModel always passes it
        if "_adapter_model_path" not in (others.get("adapter_kwargs") or {}):  # it passes these too, for no adapter
            others.pop("adapter_kwargs", None)
        _refuse_options("from_pretrained", others, ("config", "dtype", "device_map", "revision", *HUB_OPTIONS))
        folder = resolve_folder(pretrained_model_name_or_path, revision, **hub)
        try:
            config = config or EmberVLMConfig.from_pretrained(str(folder))
        except UNREADABLE as error:
            raise _unreadable(folder, error) from error
        path, state = read_weights(folder, int8=True)
        small = holds_int8(state)
        try:
            # floats that nobody writes take no memory
            with no_init_weights() if small and config.stage == STAGE4 else contextlib.nullcontext():
                model = cls(config)
        except UNREADABLE as error:
            raise _unreadable(folder, error) from error
        if small:
            room_for_int8(model, state)
        load_state(model, state, COMPONENTS if config.stage == STAGE4 else BACKBONE, path)
        if small:
            model.language_model.find_head()
        model.attach_tokenizer(ReasoningTokenizer.from_folder(folder))
        model.confidence_temperature, model.written_scale = read_calibration(folder)
        model.known = read_known(folder)
        model.generation_config.max_new_tokens = Decoding().for_model(config).max_new_tokens
        return _moved(model, device, dtype).eval()

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, state_dict: Mapping[str, Tensor] | None = None, **others: Any
    ) -> None:
        """Write config, weights and tokenizer under the guide's file names. Not atomic; see `run_dir`.

        Adapters are merged into the weights, and written apart as well.

        Raises:
            ConfigError: `others` ask for something; `embervlm export` writes safetensors.
        """
        _refuse_options("save_pretrained", others, ("state_dict",))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        state = self.state_dict() if state_dict is None else state_dict
        save_weights(merged(self, state), folder, self.config.stage != STAGE3)
        save_adapters(self, state, folder)
        if self._tokenizer is not None:
            self._tokenizer.save(folder)


def _moved(model: EmberVLM, device: torch.device, dtype: torch.dtype) -> EmberVLM:
    """`model` there and in `dtype`, but for the rotary frequencies: rounded to bfloat16 they are wrong by a radian at
    distance 1,000, and transformers keeps them in float32 too."""
    kept = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq")
    ]
    model.to(device=device, dtype=dtype)
    for module, name, buffer in kept:
        setattr(module, name, buffer.to(device))
    return model


def _unreadable(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder / 'config.json'}: not a readable configuration ({error})")


def _refuse_options(method: str, others: Mapping[str, Any], known: Sequence[str]) -> None:
    """ConfigError that names those of `others` that ask for something, since nothing reads them."""
    if wrong := sorted(name for name, value in others.items() if value not in (None, False, {})):
        raise ConfigError(f"{method}: {', '.join(wrong)}: not known; known are {', '.join(known)}")


_GENERATE_OPTIONS = (
    *("attention_mask", "pixel_values", "max_new_tokens", "do_sample", "temperature", "top_p"),
    *("num_return_sequences", "pad_token_id"),
)


def _dtype_of(given: Any) -> torch.dtype:
    found = {None: torch.float32, "auto": torch.float32}.get(given, given)
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"from_pretrained: dtype {given!r} is not a type of weights; use one such as bfloat16")
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
            f"from_pretrained: device_map {given!r} is not one device; use one such as cuda:0, or auto"
        ) from error


def build_model(settings: Mapping[str, Any], *, load_pretrained: bool = True) -> EmberVLM:
    """A new model from the settings of a preset; pretrained parts are loaded where they say so."""
    if wrong := sorted(set(settings) - set(EmberVLMConfig.__annotations__)):
        raise ConfigError(f"model: unknown keys {wrong}")
    if (resize := settings.get("resize", SQUASH)) not in (SQUASH, PAD):
        raise ConfigError(f"resize: {resize!r} is not {SQUASH} or {PAD}")
    whole = {"surprise_by_magnitude": True, "text_format": TEXT_FORMAT, **with_preprocessor(settings)}
    return EmberVLM(EmberVLMConfig(**whole), load_pretrained=load_pretrained)


AutoConfig.register("embervlm", EmberVLMConfig)
AutoModel.register(EmberVLMConfig, EmberVLM)
AutoModelForImageTextToText.register(EmberVLMConfig, EmberVLM)
AutoProcessor.register(EmberVLMConfig, EmberVLMProcessor)
