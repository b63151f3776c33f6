"""What the training tests share: a tiny model and its YAML, a few scenes, and starting real training processes."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import warm_start
import yaml

from embervlm import run_dir
from embervlm.config import PhaseConfig, TrainConfig
from embervlm.config_file import from_mapping
from embervlm.data.collate import Batch, Collator
from embervlm.data.dataset import encode_direct, encode_reasoning
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.facts import fact_domains
from embervlm.data.images import PictureCache
from embervlm.data.negatives import PairMaker
from embervlm.data.records import ReasoningRecord, read_records
from embervlm.data.samples import Sample
from embervlm.data.splits import split_records
from embervlm.data.tokenizer import ReasoningTokenizer, train_tokenizer
from embervlm.model.embervlm import EmberVLM, build_model
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.training.feed import deal
from embervlm.words.chain_text import format_reasoning
from embervlm.world import World

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
CPU = torch.device("cpu")
FIRST_PORT, PORTS = 61_000, 560
_turn = itertools.count(random.randrange(PORTS))
GRACE_S = 30
"""What is left to the other processes when one has failed, as under torchrun."""
VOCABULARY = 704
TINY: dict[str, Any] = {
    "vision": {
        "config": {
            "model_type": "vit",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 36,
            "patch_size": 12,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        }
    },
    "language": {
        "config": {
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        }
    },
    "image_size": 36,
    "projection_hidden_size": 24,
    "reasoning_width": 16,
    "reasoning_ffn": 24,
    "reasoning_heads": 2,
    "validator_width": 16,
    "validator_ffn": 24,
    "validator_heads": 2,
}
BATCH_NORM_VISION: dict[str, Any] = {
    "config": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    }
}
"""A vision backbone with running statistics, which are buffers that move in train mode."""

MULTIPLIERS = {"vision_encoder": 0.1, "projection": 0.5, "language_model": 0.5, "reasoning_module": 1.0}
PHASE1 = {
    "name": "train_reasoning_heads",
    "epochs": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "freeze_backbone": True,
    "reasoning_loss_weight": 0.4,
    "consistency_loss_weight": 0.3,
    "answer_loss_weight": 0.3,
}
PHASE2 = {
    "name": "joint_finetuning",
    "epochs": 2,
    "learning_rate": 5e-4,
    "warmup_steps": 2,
    "learning_rate_multipliers": MULTIPLIERS,
    "reasoning_loss_weight": 0.3,
    "consistency_loss_weight": 0.2,
    "answer_loss_weight": 0.3,
    "multimodal_loss_weight": 0.2,
    "direct_loss_weight": 0.1,
    "direct_records_ratio": 0.33,
}
STAGE3 = {
    "name": "perception",
    "epochs": 1,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "direct_loss_weight": 1.0,
    "dense_loss_weight": 1.0,
    "caption_records_ratio": 0.5,
    "glossary_records_ratio": 0.0,
}


def phase_config(values: dict[str, Any]) -> PhaseConfig:
    return from_mapping(PhaseConfig, values)


def write_model_yaml(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}))
    return path


def write_run_yaml(folder: Path, model: Path | str, data: Path, **changes: Any) -> Path:
    """A run of the tiny model; `changes` are dotted keys of the YAML, dots written as double underscores."""
    values: dict[str, Any] = {
        "model": str(model),
        "output_dir": str(folder / "outputs"),
        "reasoning_data": str(data),
        "precision": "fp32",
        "log_steps": 1,
        "keep_last": 9,
        "sample_records": 1,
        "stage3_batch_size": 4,
        "stage3": dict(STAGE3),
        "stage4": {
            "batch_size": 4,
            "phase1": dict(PHASE1),
            "phase2": dict(PHASE2),
            "max_reasoning_length": 400,
            "scheduled_sampling": {"enabled": True},
        },
    }
    for key, value in changes.items():
        at = values
        *parents, last = key.split("__")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_data(folder: Path, num_samples: int = 36) -> Path:
    """Rendered scenes with their records."""
    from embervlm.robots.generate import generate_scenes

    path = folder / "reasoning_data.json"
    generate_scenes(path, num_samples=num_samples, questions_per_picture=3, seed=0, workers=1, progress=False)
    return path


def make_tokenizer(records: Sequence[ReasoningRecord], size: int = VOCABULARY) -> ReasoningTokenizer:
    texts = [text for record in records for text in (record.instruction, format_reasoning(record.steps))]
    values = {value for found in fact_domains(records).values() for value in found}  # a token each, as in a run
    return ReasoningTokenizer(train_tokenizer(texts, size, values | set(ROBOTS)))


def save_stage3(folder: Path, settings: dict[str, Any], records: Sequence[ReasoningRecord]) -> Path:
    """An untrained model as the Stage 3 checkpoint that Stage 4 starts from."""
    torch.manual_seed(1)
    model = build_model({**settings, "stage": 3, "candidates": ROBOTS}, load_pretrained=False)
    model.attach_tokenizer(make_tokenizer(records, model.language_model.vocab_size))
    part = run_dir.new_tmp_dir(folder)
    model.save_pretrained(part)
    return run_dir.publish_checkpoint(part, run_dir.checkpoint_path(folder, None), step=0)


@dataclasses.dataclass
class Bench:
    """Data and a freshly built tiny model; the same in every process that makes one of the same arguments."""

    model: EmberVLM
    collator: Collator
    plan: EpochPlan
    chains: list[Sample]
    direct: list[Sample]
    config: TrainConfig

    @classmethod
    def make(
        cls,
        data: Path,
        phase: PhaseConfig,
        *,
        global_batch: int = 8,
        draws: bool = True,
        seed: int = 0,
        vision: dict[str, Any] | None = None,
        text_only: bool = False,
        boxes: bool = True,
        most_groups: int = 1,
        **config: Any,
    ) -> Bench:
        """
        Args:
            draws: Also what is drawn at random, such as the validator's negatives.
            text_only: The same records without their pictures.
            boxes: Where things are in the pictures is known.
            most_groups: See `Collator`.
        """
        torch.manual_seed(seed)
        records = split_records(read_records(data, candidates=ROBOTS))["train"]
        if text_only:
            records = [dataclasses.replace(record, image=None, metadata={}) for record in records]
        if not boxes:
            records = [dataclasses.replace(record, metadata={}) for record in records]
        tokenizer = make_tokenizer(records)
        settings = {**TINY, **({"vision": vision} if vision else {}), "candidates": ROBOTS}
        model = build_model(settings, load_pretrained=False)
        torch.nn.init.normal_(model.reasoning_module.reasoning_head.output.weight, std=0.02)  # an untrained head is 0
        model.attach_tokenizer(tokenizer)
        chains = encode_reasoning(records, tokenizer, model.grid, 400)
        direct = encode_direct(records, tokenizer)
        pictures = PictureCache([record.image for record in records if record.image], model.config.image_size)
        collator = Collator(
            records,
            tokenizer,
            pictures,
            seed=0,
            image_size=model.config.image_size,
            pair_maker=PairMaker(records, chains, tokenizer) if draws else None,
            grounding=phase.multimodal_loss_weight > 0,
            most_groups=most_groups,
        )
        mixed = ((direct, phase.direct_records_ratio),)
        plan = EpochPlan(main=chains, mixed=mixed, global_batch=global_batch, seed=0)
        return cls(model, collator, plan, chains, direct, from_mapping(TrainConfig, {"precision": "fp32", **config}))

    def batches(self, step: int, rank: int, size: int, accumulation: int, forcing: float = 1.0) -> list[Batch]:
        """Process `rank`'s micro-batches of step `step`, dealt as the loop deals them."""
        samples = self.plan.batch(step)
        out = []
        for places, mine in deal(samples, World(rank, size, CPU), accumulation):
            batch = self.collator(mine or samples[:1], step=step, places=places or [0], teacher_forcing=forcing)
            if not mine:
                batch.mute()
            out.append(batch)
        return out


# -- processes ------------------------------------------------------------------------------------------------------


def free_port() -> str:
    """A port that no other test takes: above those of outgoing connections, in a range of this pytest process."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    for port in _turn:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", found := FIRST_PORT + worker % 8 * PORTS + port % PORTS))
            return str(found)
    raise AssertionError("not reached")


def command(launcher: str, script: str | Path, *args: str | Path, processes: int = 2) -> list[str]:
    if launcher == "torchrun":
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(processes),
            "--master_port",
            free_port(),
        ]
    elif launcher == "deepspeed":
        start = [str(BIN / "deepspeed"), "--num_gpus", str(processes), "--master_port", free_port()]
    else:
        start = [sys.executable]
    return [*start, str(script), *map(str, args)]


def environment() -> dict[str, str]:
    """Of a training that is started here, whatever started the tests."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WANDB_API_KEY")
    }
    clean |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    clean["PYTHONPATH"] = str(REPOSITORY)  # whatever the working folder
    clean["PATH"] = f"{BIN}{os.pathsep}{clean['PATH']}"
    return clean


def run(
    argv: Sequence[str], *, timeout_s: float = 120, cwd: Path = REPOSITORY, cold: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; everything it started is killed when `timeout_s` is over.

    A Python program is forked from a process that has its imports (`warm_start`), unless `cold`.
    """
    own = environment() | env
    if argv[0] == sys.executable and not cold and all(own[key] == environment()[key] for key in warm_start.FIXED):
        return _run_warm(argv, [own], timeout_s, cwd)
    process = subprocess.Popen(
        list(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=own, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"still running after {timeout_s} s: {' '.join(argv)}\n{out[-2000:]}\n{err[-4000:]}"
        ) from None
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def run_ranks(
    script: Path, *args: str | Path, processes: int, timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """A script on so many processes that join, as under torchrun, but without torchrun's own start."""
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = free_port()
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    argv = [sys.executable, str(script), *map(str, args)]
    return _run_warm(argv, [environment() | env | world | rank for rank in ranks], timeout_s, REPOSITORY)


def _run_warm(
    argv: Sequence[str], envs: Sequence[dict[str, str]], timeout_s: float, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """One process for each environment; when one fails, the others have `GRACE_S` to end.

    The result has what all of them wrote, and the first status that is not 0.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(Path(folder, f"{number}.out"), Path(folder, f"{number}.err")) for number in range(len(envs))]
        processes = [
            warm_start.start(argv[1:], env=env, cwd=cwd, out=out, err=err) for env, (out, err) in zip(envs, outputs)
        ]
        until, is_late = time.monotonic() + timeout_s, False
        while None in (codes := [process.poll() for process in processes]):
            if any(codes):
                until = min(until, time.monotonic() + GRACE_S)
            if is_late := time.monotonic() > until:
                break
            time.sleep(0.02)
        for process in processes:
            process.kill()
        out, err = ("".join(path.read_text(errors="replace") for path in paths) for paths in zip(*outputs))
    failed = next((code for code in codes if code), 0)
    if is_late and not failed:
        raise AssertionError(f"still running after {timeout_s} s: {' '.join(argv)}\n{out[-2000:]}\n{err[-4000:]}")
    return subprocess.CompletedProcess(argv, failed, out, err)


def train(
    launcher: str, *args: str | Path, processes: int = 2, timeout_s: float = 120, **env: str
) -> subprocess.CompletedProcess[str]:
    """`launch/train.py` with `args`. `ranks` is two or more processes where no launcher is what is tested."""
    script = REPOSITORY / "launch" / "train.py"
    if launcher == "ranks":
        return run_ranks(script, *args, processes=processes, timeout_s=timeout_s, **env)
    return run(command(launcher, script, *args, processes=processes), timeout_s=timeout_s, **env)


def ok(result: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert result.returncode == 0, f"{' '.join(result.args)}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint / "pytorch_model.bin", weights_only=True)


def unfinish(folder: Path, *, keep_step: int) -> None:
    """Delete `checkpoint-final` and every checkpoint after `keep_step`, as if the run had been killed there."""
    for found in run_dir.list_checkpoints(folder):
        if found.is_final or found.step > keep_step:
            shutil.rmtree(found.path)


def changed_components(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Components with any parameter or buffer that is not the same, bit for bit."""
    assert before.keys() == after.keys()
    return {key.removeprefix("model.").partition(".")[0] for key in before if not torch.equal(before[key], after[key])}


def timed(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, float, float]:
    """The result, seconds on the clock, and seconds that child processes kept a processor busy."""
    began, busy = time.monotonic(), _seconds_of_children()
    result = function(*args, **kwargs)
    return result, time.monotonic() - began, _seconds_of_children() - busy


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def without_key_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Softmax does not see a bias of the keys: its gradient is rounding noise, which Adam blows up to a full step."""
    halved = {key: value.chunk(2)[1] for key, value in weights.items() if key.endswith("key_value.bias")}
    return {
        key: value for key, value in {**weights, **halved}.items() if not key.endswith((".key.bias", "k_proj.bias"))
    }


def assert_same_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-4) -> None:
    assert found.keys() == wanted.keys()
    found = without_key_biases(found)
    for key, value in without_key_biases(wanted).items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
