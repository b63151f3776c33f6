"""How fast a training step is, beside a bare loop, `transformers.Trainer`, and itself with one thing switched off.

    python benchmarks/training_speed.py --run outputs/quickstart                        # both phases and Stage 3
    python benchmarks/training_speed.py --run outputs/quickstart --phases 2 --rounds 3 --json speed.json
    python benchmarks/training_speed.py --run outputs/smoke --check                     # `make bench-check`

`--run` is the output folder of a finished run, whose data and checkpoints are the start. All arms do the same steps on
the same records with the same model, one after the other in every round, so that other work on the machine slows all of
them; a number is the median of an arm's steps in seconds of processor time, in one process with one thread. On a GPU
it is wall-clock time. Texts are encoded before, which happens once in a run. Arms:

    loop         this project's step: batches made in between, visual tokens of phase 1 kept, texts of like length
    bare         ready batches, forward and backward pass, clipping and a fused AdamW, and nothing else
    trainer      transformers.Trainer with our collator as its data_collator, and losses as its compute_loss
    one group    `loop`, but every micro-batch padded to its longest text
    no cache     `loop`, but phase 1 encodes its pictures at every step

`--check` measures what `LEAST` has a bound for, and fails where an arm needs less of the time of `loop` than it says.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_run import REPOSITORY
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from embervlm import run_dir
from embervlm.config import TrainConfig
from embervlm.config_file import load_train_config
from embervlm.data.collate import Batch
from embervlm.engines.base import Engine
from embervlm.run import stages
from embervlm.training import loop
from embervlm.training.feed import Feed
from embervlm.training.job import PhaseJob
from embervlm.training.visual_cache import VisualCache
from embervlm.world import World

SLOW_RATE = 1e-9
"""So small that all steps train what is nearly the same model."""
Step = Callable[[int], float]
LEAST = {"3": {"bare": 0.86, "one group": 1.3}, "1": {"bare": 0.87}, "2": {"bare": 0.89, "one group": 1.03}}
"""An arm's time in parts of `loop`'s: what docs/performance.md has of a quiet machine, less a margin for noise."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs" / "quickstart.yaml")
    parser.add_argument("--phases", nargs="+", default=["3", "1", "2"], choices=("3", "1", "2"))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="steps of each arm in a round")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        found = {phase: measure(phase, options, Path(work)) for phase in options.phases}
    print(table(found))
    about = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.processor()}
    if options.json:
        options.json.write_text(json.dumps({"about": about, "phases": found}, indent=1), encoding="utf-8")
    if options.check and (slower := too_slow(found)):
        sys.exit("error: slower than it was: " + "; ".join(slower))


def too_slow(found: dict[str, dict[str, Any]]) -> list[str]:
    """What falls below `LEAST`."""
    out = []
    for phase, arms in found.items():
        for name, least in LEAST[phase].items():
            ratio = arms[name]["step_s"] / arms["loop"]["step_s"]
            if ratio < least:
                out.append(
                    f"phase {phase}: {name} needs {ratio:.2f} of our own step's time, and needed {least} or more"
                )
    return out


def measure(phase: str, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    given = {"output_dir": str(work), "reasoning_data": str(options.run / "data" / "reasoning_data.json")}
    config = load_train_config(str(options.config), {**given, "engine": "torch"})
    world = World.join()
    job = job_of(phase, options.run, config, world)
    engine, _, cache, _ = loop._prepare(job, config, world)
    job.model.train()
    arms: dict[str, Step] = {
        "loop": loop_step(job, engine, cache, world),
        "bare": bare_step(job, engine, cache, world),
        "trainer": trainer_step(job, engine, work, options.steps),
        "one group": loop_step(job, engine, cache, world),
    }
    if cache is not None:
        arms["no cache"] = loop_step(job, engine, None, world)
    if options.check:
        arms = {name: step for name, step in arms.items() if name == "loop" or name in LEAST[phase]}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(options.rounds):
        first = 1 + number * options.steps
        for each in range(first, first + options.steps + 1):
            list(job.plan.batch(each))  # texts are encoded once in a run; the first arm alone would pay for it
        for name, step in arms.items():
            job.collator.most_groups = 1 if name in ("trainer", "one group") else stages.MOST_GROUPS
            step(first)  # warms up
            times[name] += [step(first + each) for each in range(options.steps)]
            print(f"\rphase {phase}: round {number + 1} of {options.rounds}, {name:12}", end="", file=sys.stderr)
    print(file=sys.stderr)
    records = len(job.plan.batch(1))
    return {name: {"step_s": statistics.median(each), "records": records} for name, each in times.items()}


def job_of(phase: str, run: Path, config: TrainConfig, world: World) -> PhaseJob:
    """The job of a phase as a run makes it, taken before it is trained."""
    taken: list[PhaseJob] = []

    class Taken(Exception):
        pass

    def take(job: PhaseJob, config: TrainConfig, world: World) -> Path:
        taken.append(job)
        raise Taken

    stages.train_phase = take  # type: ignore[assignment]
    of_run = stages.Run(config, world)
    start = run_dir.stage3_dir(run) if phase != "2" else run_dir.phase_dir(run, 1)
    try:
        if phase == "3":
            of_run.stage3()
        else:
            of_run.phase(int(phase), run_dir.checkpoint_path(start, None))
    except Taken:
        pass
    return taken[0]


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def loop_step(job: PhaseJob, engine: Engine, cache: VisualCache | None, world: World) -> Step:
    feed = Feed(job, world, load_pictures=cache is None, num_workers=0, end=10**9)
    rates = dict.fromkeys(engine.peak_rates, SLOW_RATE)

    def step(number: int) -> float:
        began = clock()
        fed = feed.of(number)
        for batch in fed.batches:
            if cache is not None:
                cache.fill(batch, engine.compute_dtype)
        engine.train_step(fed.batches, job.phase.loss_weights, rates, number)
        return clock() - began

    return step


def weighted(terms: dict[str, Tensor], batch: Batch, weights: dict[str, float]) -> Tensor:
    means = [weights.get(term, 0.0) * value / max(1.0, batch.counts.get(term, 0.0)) for term, value in terms.items()]
    return torch.stack(means).sum()


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def bare_step(job: PhaseJob, engine: Engine, cache: VisualCache | None, world: World) -> Step:
    parameters = trained(engine.module)
    optimizer = torch.optim.AdamW(parameters, lr=SLOW_RATE, fused=True)
    feed = Feed(job, world, load_pictures=cache is None, num_workers=0, end=10**9)

    def step(number: int) -> float:
        (batch,) = feed.of(number).batches
        if cache is not None:
            cache.fill(batch, engine.compute_dtype)
        began = clock()
        weighted(engine.module(batch.to(world.device)), batch, job.phase.loss_weights).backward()
        nn.utils.clip_grad_norm_(parameters, job.phase.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return clock() - began

    return step


class Steps(torch.utils.data.Dataset[Any]):
    """The samples of each step from `first` on."""

    def __init__(self, job: PhaseJob, first: int, count: int) -> None:
        self._job, self._first, self._count = job, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> tuple[int, list[Any]]:
        return self._first + place, list(self._job.plan.batch(self._first + place))


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._began = clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        now = clock()
        self.times.append(now - self._began)
        self._began = now


class OurTrainer(Trainer):
    weights: dict[str, float]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        batch = inputs["batch"]
        return weighted(model(batch.to(self.args.device)), batch, self.weights)


def trainer_step(job: PhaseJob, engine: Engine, work: Path, steps: int) -> Step:
    """A `Trainer` that does a round's steps when it is asked for the first of them, as it cannot do them singly."""
    found: dict[int, float] = {}

    def collate(items: Sequence[tuple[int, list[Any]]]) -> dict[str, Any]:
        ((number, samples),) = items
        return {"batch": job.collator(samples, step=number)}

    def step(number: int) -> float:
        if number in found:
            return found.pop(number)
        clock_of_steps = Clock()
        trainer = OurTrainer(
            model=engine.module,
            args=TrainingArguments(
                output_dir=str(work / "trainer"),
                per_device_train_batch_size=1,  # an item is a whole batch
                max_steps=steps + 1,
                learning_rate=SLOW_RATE,
                max_grad_norm=job.phase.gradient_clipping,
                report_to=[],
                save_strategy="no",
                logging_steps=10,
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=Steps(job, number, steps + 1),
            data_collator=collate,
            callbacks=[clock_of_steps],
        )
        trainer.weights = job.phase.loss_weights
        trainer.train()
        first, *others = clock_of_steps.times
        found.update({number + place: took for place, took in enumerate(others)})
        return first

    return step


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':10}{'arm':12}{'ms a step':>12}{'of loop':>10}{'records/s':>12}"]
    for phase, arms in found.items():
        for name, each in arms.items():
            ratio = each["step_s"] / arms["loop"]["step_s"]
            name_of_phase = "stage 3" if phase == "3" else f"phase {phase}"
            lines.append(
                f"{name_of_phase:10}{name:12}{1e3 * each['step_s']:12.1f}{ratio:10.2f}"
                f"{each['records'] / each['step_s']:12.1f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
