"""Memory of training on many text records: write records of 1 KB, train Stage 3 and both phases for a few steps.

    torchrun --nproc_per_node 2 benchmarks/data_memory.py --num_records 5000000 --folder /tmp/data_memory

Every process prints the processor time of batches at the beginning of an epoch, at its 50,001st record and at its end,
and for each part of the run its time and the most memory it held: RSS (all of its pages that are in memory, those of
libraries and mapped files included) and USS (those of them that no other process shares).
Nothing is deleted: the same command again shows what starting from the prepared data costs.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from embervlm import run_dir
from embervlm.config import REPOSITORY
from embervlm.config_file import load_train_config
from embervlm.data.collate import Collator
from embervlm.data.dataset import encode_reasoning
from embervlm.data.epoch_plan import EpochPlan
from embervlm.data.images import PictureCache
from embervlm.data.negatives import PairMaker
from embervlm.data.samples import Grid
from embervlm.data.store import RecordView
from embervlm.data.tokenizer import ReasoningTokenizer
from embervlm.progress import progress_bar
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.run_data import load_data
from embervlm.run.stages import Run
from embervlm.world import World

INTERVAL_S = 0.2
BATCH_SIZE, NUM_TIMED = 16, 100
WORDS = (
    "the a crate tunnel river flooded lifts robot heavy shelf wind carries sees night narrow stairs sand mud box field "
    "bridge under over slowly across roof cable wheel arm leg rotor tide harbour forest rubble ladder is are can cannot"
).split()


def write_records(path: Path, num_records: int) -> None:
    """JSONL of about 1 KB a line, no two instructions alike; chains of five steps of three clauses out of 5,000."""
    rng = random.Random(0)
    clauses = [" ".join(rng.choices(WORDS, k=9)) for _ in range(5_000)]
    with run_dir.atomic_text(path) as file:
        for number in progress_bar(range(num_records), desc="write", unit="record", delay=2):
            steps = [", ".join(rng.choices(clauses, k=3)) for _ in range(5)]
            answer = ROBOTS[number % len(ROBOTS)]
            chain = [*(f"Step {i}: {step}." for i, step in enumerate(steps, 1)), f"Conclusion: {answer}."]
            record = {
                "instruction": f"Task {number}: {rng.choice(clauses)}, {rng.choice(clauses)}. Which robot?",
                "reasoning": "\n".join(chain),
                "answer": answer,
            }
            file.write(json.dumps(record) + "\n")


def memory_mb() -> tuple[float, float]:
    """RSS and USS of this process."""
    sizes = {}
    with open("/proc/self/smaps_rollup") as file:
        for line in file.readlines()[1:]:
            name, kilobytes, *_ = line.split()
            sizes[name] = int(kilobytes) * 1024 / 1e6
    return sizes["Rss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


class Watch:
    """Time and peak memory of each part of this process's work."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[float, float, float]] = {}
        """Part -> seconds, peak RSS and peak USS in MB."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        found, done = [memory_mb()], threading.Event()

        def look() -> None:
            while not done.wait(INTERVAL_S):
                found.append(memory_mb())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        began = time.monotonic()
        try:
            yield
        finally:
            done.set()
            thread.join()
            found.append(memory_mb())
            rss, uss = zip(*found)
            self.parts[name] = (time.monotonic() - began, max(rss), max(uss))


def time_of_batches(records: RecordView, output: Path) -> dict[int, float]:
    """Median milliseconds to plan, read, encode and collate a batch, by the place in the epoch at which it begins."""
    tokenizer = ReasoningTokenizer.from_folder(run_dir.checkpoint_path(run_dir.phase_dir(output, 2), None))
    samples = encode_reasoning(records, tokenizer, Grid(6, 6), max_length=600)
    plan = EpochPlan(main=samples, global_batch=BATCH_SIZE, seed=0)
    pictures = PictureCache([], 72)
    collator = Collator(
        records, tokenizer, pictures, seed=0, image_size=72, pair_maker=PairMaker(records, samples, tokenizer)
    )
    plan.batch(0)  # the order of the epoch
    found = {}
    for start in (1, 50_001, len(records) - BATCH_SIZE * NUM_TIMED):
        times = []
        for step in range(max(0, start) // BATCH_SIZE, max(0, start) // BATCH_SIZE + NUM_TIMED):
            began = time.process_time()
            collator(plan.batch(step), step=step, teacher_forcing=0.5)
            times.append(time.process_time() - began)
        found[start] = 1000 * sorted(times)[len(times) // 2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_records", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="records and the run's output go here")
    parser.add_argument("--max_steps", type=int, default=5, help="updates of each phase")
    parser.add_argument("--until", choices=("records", "prepared", "trained"), default="trained", help="stop there")
    args = parser.parse_args()

    watch, world = Watch(), World.join()
    folder = args.folder / str(args.num_records)
    data, output = folder / "records.jsonl", folder / "run"
    if world.rank == 0:
        for name in ("stage3", "stage4"):  # a finished run would return at once; what is prepared stays
            shutil.rmtree(output / name, ignore_errors=True)
        if not data.exists():
            with watch.part("write the records"):
                folder.mkdir(parents=True, exist_ok=True)
                write_records(data, args.num_records)
    world.barrier()
    config = load_train_config(
        REPOSITORY / "configs" / "quickstart.yaml",
        {
            "output_dir": str(output),
            "reasoning_data": str(data),
            "max_steps": args.max_steps,
            "sample_records": 1,
            "log_steps": 1,
            "stage4.max_reasoning_length": 600,
            "stage3_batch_size": 2,
            "stage4.batch_size": 2,
            "stage4.gradient_accumulation_steps": 4,
        },
    )
    run = Run(config, world)
    if args.until != "records":
        with watch.part("prepare"):
            run._data = load_data(config, 72, world)
    if args.until == "trained":
        for name, stages, phase in (("stage 3", ["3"], None), ("phase 1", ["4"], 1), ("phase 2", ["4"], 2)):
            with watch.part(name):
                run.go(stages, phase)
        assert run._data is not None
        with watch.part("batches"):
            for number, milliseconds in time_of_batches(run._data.train, output).items():
                print(f"rank {world.rank}: a batch from record {number:,} on: {milliseconds:.1f} ms")
    for name, (seconds, rss, uss) in watch.parts.items():
        print(f"rank {world.rank}: {name}: {seconds:.0f} s, RSS {rss:.0f} MB, USS {uss:.0f} MB")


if __name__ == "__main__":
    main()
