"""The cost of one micro-batch: PyTorch runs it on fake tensors, which have shapes and no contents."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from embervlm.config import PhaseConfig, StageConfig
from embervlm.config_lora import LoraConfig
from embervlm.data.collate import Batch, Collator
from embervlm.data.negatives import PairMaker
from embervlm.data.records import ReasoningRecord
from embervlm.data.samples import DIRECT, EDITED, REASONING, Sample
from embervlm.engines.param_groups import build_param_groups
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.model.lora import add_adapters
from embervlm.robots.domain import ROBOTS
from embervlm.training.module import TrainingModule
from embervlm.words.chain_text import CONCLUSION

NUM_STEPS = 4
"""Steps of a made-up chain, its conclusion included."""
ANSWER_TOKENS = 16
"""Scored tokens of a record that is answered directly."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The cost of one micro-batch, forward and backward, on one GPU."""

    flops: float
    operators: int
    """Calls of PyTorch operators."""
    activation_bytes: int
    """Peak memory besides parameters; most of it is the logits and their gradient."""


def count_micro_batch(
    settings: dict[str, Any], stage: StageConfig, phase: PhaseConfig, *, precision: str, **lengths: Any
) -> MicroBatch:
    """`step_on` for a model of these settings on fake tensors; `lengths` as in `micro_batch`."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = empty_model(settings, phase.lora).to(dtype)
    batch = micro_batch(model, stage, phase, **lengths)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return step_on(prepare(model, stage, phase), batch)


def empty_model(settings: dict[str, Any], lora: Mapping[str, LoraConfig] = {}) -> EmberVLM:
    """The model of a preset with shapes and no weights (PyTorch's meta device), and with the adapters of `lora`."""
    with torch.device("meta"):
        model = build_model(settings, load_pretrained=False)
        add_adapters(model, lora)
    return model


def count_parameters(settings: dict[str, Any], phase: PhaseConfig) -> tuple[int, int]:
    """Parameters of a model of these settings in `phase`, its adapters included, and those of them that are trained."""
    model = empty_model(settings, phase.lora)
    learning = sum(parameter.numel() for group in build_param_groups(model, phase) for parameter in group["params"])
    return sum(parameter.numel() for parameter in model.parameters()), learning


def prepare(model: EmberVLM, stage: StageConfig, phase: PhaseConfig) -> TrainingModule:
    """`model` frozen and wrapped for `phase`, as in training; the whole vocabulary is used."""
    tokenizer: Any = MadeUpTokenizer(model.language_model.vocab_size)
    model.attach_tokenizer(tokenizer)
    module = TrainingModule(model)
    build_param_groups(module, phase)
    module.train()
    model.freeze(phase.frozen_parts)
    if stage.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return module


def step_on(module: TrainingModule, batch: Batch) -> MicroBatch:
    """The cost of a forward and backward pass of `module` over `batch`."""
    return trace(lambda: sum(module(batch).values()).backward())


# -- a micro-batch ---------------------------------------------------------------------------------------------------


def micro_batch(
    model: EmberVLM,
    stage: StageConfig,
    phase: PhaseConfig,
    *,
    question_tokens: int,
    chain_tokens: int,
    cached_pictures: bool,
) -> Batch:
    """The collator's micro-batch of made-up records: `stage.batch_size` chains of this length, and what is mixed in.

    Args:
        cached_pictures: Give visual tokens that were computed beforehand, as for a frozen encoder.
    """
    tokenizer: Any = MadeUpTokenizer(model.language_model.vocab_size)
    chain = made_up_chain(question_tokens, chain_tokens, model.grid.size)
    edited = replace(chain, form=EDITED, picture_of=1, step_spans=(), attend=())
    direct = Sample(record=0, form=DIRECT, prompt=chain.prompt, target=[0] * ANSWER_TOKENS)
    collator = Collator(
        RECORDS,
        tokenizer,
        _Pictures(model.config.image_size),  # type: ignore[arg-type]
        seed=0,
        image_size=model.config.image_size,
        pair_maker=PairMaker(RECORDS, [chain, replace(chain, record=1)], tokenizer),
        pair_records_ratio=phase.validator_records_ratio,
        max_pair_tokens=model.max_pair_tokens,
        grounding=phase.multimodal_loss_weight > 0,
    )
    sampling = stage.scheduled_sampling
    batch = collator(
        [
            *[chain] * stage.batch_size,
            *[edited] * round(stage.batch_size * phase.edited_facts_ratio),
            *[direct] * round(stage.batch_size * phase.direct_records_ratio),
        ],
        step=0,
        teacher_forcing=sampling.final_teacher_forcing if sampling.enabled else 1.0,
        load_pictures=not cached_pictures,
    )
    if cached_pictures:
        shape = (len(batch.picture_index), model.num_visual_tokens, model.language_model.hidden_size)
        batch.inputs["visual"] = torch.zeros(shape, dtype=model.visual_dtype)
    return batch


RECORDS = [
    ReasoningRecord(
        record_id=value,
        image=f"{value}.png",
        instruction="",
        steps=(*[f"place is {value}"] * (NUM_STEPS - 1), f"{CONCLUSION}place is {value}"),
        answer=ROBOTS.candidates[:1],
        default_candidates=ROBOTS.candidates,
        metadata={"facts": {"place": value}, "boxes": [{"kind": "place", "box": [0, 0, 1, 1]}]},
    )
    for value in ("indoors", "outdoors")
]
"""Two records that differ in a fact, so that one's steps are wrong for the other. What a box shows is supervised."""


def made_up_chain(question_tokens: int, chain_tokens: int, num_places: int) -> Sample:
    """The chain of a record in `RECORDS`: steps of equal length, each of which looks at the whole picture."""
    num_steps = min(NUM_STEPS, chain_tokens)
    edges = [question_tokens + chain_tokens * step // num_steps for step in range(num_steps + 1)]
    whole = torch.ones(num_places, dtype=torch.bool)
    return Sample(
        record=0,
        form=REASONING,
        prompt=[0] * question_tokens,
        target=[0] * chain_tokens,
        answer_position=edges[-2],
        step_spans=tuple(zip(edges, edges[1:])),
        attend=tuple((step, whole) for step in range(num_steps)),
    )


class MadeUpTokenizer:
    """A token for each word, and an answer of four, in a vocabulary that uses every row of the model's embedding."""

    ids = {"<|reasoning_start|>": 0}

    def __init__(self, vocab_size: int) -> None:
        self.base_vocab_size = vocab_size

    def check_rows(self, num_rows: int) -> None:
        """Nothing to check: the vocabulary is as large as the embedding."""

    def use(self, text_format: int, prompt: Sequence[str] | None) -> None:
        """Nothing to set: no text is encoded."""

    def following(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] * len(text.split()) for text in texts]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [[0] * 4 for _ in texts]


class _Pictures:
    """As `PictureCache`; every picture is black."""

    def __init__(self, side: int) -> None:
        self.array = np.zeros((1, side, side, 3), np.uint8)

    def index(self, path: str) -> int:
        return 0


# -- counting --------------------------------------------------------------------------------------------------------


def trace(run: Callable[[], Any]) -> MicroBatch:
    """The cost of `run`, on fake or real tensors."""
    aten: Any = torch.ops.aten
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    live, counter = _Live(), FlopCounterMode(display=False, custom_mapping=fused)
    with _OnGpu(), counter, live:
        run()
    return MicroBatch(flops=counter.get_total_flops(), operators=live.operators, activation_bytes=live.peak)


class _OnGpu(TorchFunctionMode):
    """Attention as a GPU's fused kernels compute it: no weights are kept, nor a mask of their dropout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
        if func is torch.Tensor.nonzero:  # fake tensors have no contents; the validator reads a step in four tokens
            return args[0].new_zeros(args[0].numel() // 4, 1, dtype=torch.int64)
        return func(*args, **kwargs)


class _Live(TorchDispatchMode):
    """Counts the bytes of live storages, and their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = self.operators = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out

    def _free(self, num_bytes: int) -> None:
        self.bytes -= num_bytes
