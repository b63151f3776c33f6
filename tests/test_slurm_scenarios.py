"""Training jobs on a real Slurm: chained, timed out, killed, moved. Each ends as a run that nothing happened to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import slurm_cluster
import torch
import yaml
from slurm_cluster import SlurmCluster, wait_for
from training_helpers import (
    BIN,
    TINY,
    make_data,
    save_stage3,
    weights_of,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data.records import read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"no Slurm: {slurm_cluster.missing()}"),
]
STEPS = 120
MINUTES = 10
RECIPES = {"one": (1, 4, 2), "two": (2, 4, 1), "four": (4, 2, 1)}
"""Nodes of one GPU, micro-batch and accumulation; the global batch is always 8."""


@dataclass
class Bench:
    """A cluster, data, and a Stage 3 checkpoint that the jobs start from."""

    cluster: SlurmCluster
    folder: Path
    stage3: Path
    finished: dict[str, Path] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {"EMBERVLM_VENV": str(BIN.parent), "SBATCH_OUTPUT": f"{self.folder}/%x-%j.log", "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip

    def flags(self, name: str, recipe: str, *more: str) -> list[str]:
        return ["--cluster", f"{self.folder}/{recipe}.yaml", "--config", f"{self.folder}/run.yaml", "--output_dir",
                f"{self.folder}/{name}", "--resume_from", str(self.stage3), *more]  # fmt: skip

    def submit(self, name: str, recipe: str, *more: str) -> str:
        """Submit phase 2 from Stage 3 into the output folder `name`, as a user does, and return its job."""
        printed = self.cluster.run("bash", "slurm/stage4_phase2.sh", *self.flags(name, recipe, *more), **self.env)
        return printed.split()[-1]

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}.log"))) + str(
            self.cluster.job(job)
        )

    def finish(self, job: str, timeout_s: float = 240) -> None:
        assert self.cluster.finish(job, timeout_s, lambda: self.log(job)) == "COMPLETED", self.log(job)

    def phase(self, name: str) -> Path:
        return run_dir.phase_dir(self.folder / name, 2)

    def step(self, name: str) -> int:
        """The last step in the log of a run."""
        log = run_dir.metrics_log_path(self.phase(name))
        return len(log.read_text().splitlines()) if log.exists() else 0

    def reaches(self, name: str, job: str, step: int) -> None:
        wait_for(f"step {step} of {name}", lambda: self.step(name) >= step, 120, lambda: self.log(job))

    def undisturbed(self, recipe: str) -> dict[str, torch.Tensor]:
        """The final weights on these nodes when nothing happens."""
        name = f"straight-{recipe}"
        if name not in self.finished:
            self.finish(self.submit(name, recipe))
            self.finished[name] = self.phase(name)
        return self.weights(name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return weights_of(run_dir.checkpoint_path(self.phase(name), None))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("slurm")
    data = make_data(folder)
    stage3 = save_stage3(folder / "start" / "stage3", TINY, read_records(data))
    write_run_yaml(folder, write_model_yaml(folder), data, stage4__phase2__epochs=60, stage4__phase1__epochs=2,
                   save_steps=40, max_steps=STEPS)  # fmt: skip
    for name, (nodes, batch_size, accumulation) in RECIPES.items():
        recipe = {
            "nodes": nodes, "gpus_per_node": 1, "gpu_type": "a100", "precision": "fp32", "zero_stage": 2,
            "batch_size": batch_size, "gradient_accumulation_steps": accumulation, "cpus_per_task": 1,
            "phase1_minutes": MINUTES, "phase2_minutes": MINUTES,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    with SlurmCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield Bench(cluster, folder, stage3)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_run(bench):
    import time

    t = time.time()
    job = bench.submit("x", "two")
    bench.finish(job)
    print(time.time() - t)
    print(bench.log(job))
    bench.undisturbed("two")
    print(time.time() - t)
    assert same(bench.weights("x"), bench.undisturbed("two"))
