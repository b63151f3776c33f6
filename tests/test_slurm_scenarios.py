"""Training jobs on a real Slurm: chained, timed out, killed, moved. Each ends as a run that nothing happened to."""

from __future__ import annotations

import os
import re
import signal
import sys
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
STEPS, SAVE_STEPS = 48, 16
MINUTES = 60
PATIENCE_S = float(os.environ.get("EMBERVLM_TEST_PATIENCE_S", "300"))
"""How long to wait for a job on a machine that is busy with other things."""
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
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}.log")))

    def finish(self, job: str, *, state: str = "COMPLETED") -> None:
        """Wait for the end of a job, which must be this one."""
        assert self.cluster.finish(job, PATIENCE_S, lambda: self.log(job)) == state, self.log(job)

    def phase(self, name: str) -> Path:
        return run_dir.phase_dir(self.folder / name, 2)

    def reaches(self, name: str, job: str, step: int) -> None:
        """Wait until the log of a run has this step."""
        log = run_dir.metrics_log_path(self.phase(name))
        wait_for(f"step {step} of {name}", lambda: log.exists() and len(log.read_text().splitlines()) >= step,
                 PATIENCE_S, lambda: self.log(job), pause_s=0.02)  # fmt: skip

    def hold(self, name: str, job: str, step: int) -> dict[int, int]:
        """Stop a job's processes soon after a step, so that what comes next finds them in training."""
        self.reaches(name, job, step)
        ranks = self.cluster.ranks(job)
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        return ranks

    def restarts(self, job: str, count: int) -> None:
        """Wait until Slurm has put a job back into the queue that often."""
        wait_for(f"requeue {count} of job {job}", lambda: self.cluster.job(job)["Restarts"] == str(count), PATIENCE_S,
                 lambda: self.log(job))  # fmt: skip

    def saved_steps(self, job: str) -> list[int]:
        """Steps that signals made the job save at, and checks that it went on from each."""
        found = [int(step) for step in re.findall(r"asked to stop: saved at step (\d+)", self.log(job))]
        assert [f"checkpoint-{step}" in self.log(job) for step in found] == [True] * len(found)
        return found

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
                   save_steps=SAVE_STEPS, max_steps=STEPS)  # fmt: skip
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


def test_phase_1_phase_2_and_evaluation_run_one_after_the_other(bench: Bench) -> None:
    printed = bench.cluster.run(
        "bash", "slurm/stage4.sh", *bench.flags("chain", "two", "--max_steps", "3"), **bench.env
    )
    jobs = re.findall(r"job (\d+)", printed)
    for before, job in zip(jobs, jobs[1:]):
        assert bench.cluster.job(job)["Dependency"].startswith(f"afterok:{before}")
    for job in jobs:
        bench.finish(job)
    chain = bench.folder / "chain"
    first = run_dir.checkpoint_path(run_dir.phase_dir(chain, 1), None)
    second = run_dir.read_json(run_dir.checkpoint_path(run_dir.phase_dir(chain, 2), None) / "state.json")
    assert second["settings"]["config"]["resume_from"] == str(first)
    assert run_dir.read_json(run_dir.eval_results_path(chain))["split"] == "test"


@pytest.mark.cluster
def test_a_job_that_reaches_its_time_limit_saves_is_requeued_and_finishes(bench: Bench) -> None:
    job = bench.submit("limit", "two")
    bench.hold("limit", job, 10)
    bench.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=3")  # the signal, due now, wakes them
    bench.restarts(job, 1)
    bench.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={MINUTES}")
    bench.finish(job)
    (step,) = bench.saved_steps(job)
    assert 10 <= step < STEPS
    assert same(bench.weights("limit"), bench.undisturbed("two"))


@pytest.mark.cluster
def test_a_job_that_is_requeued_in_the_middle_of_a_save_finishes(bench: Bench) -> None:
    job = bench.submit("saving", "two")
    bench.reaches("saving", job, SAVE_STEPS - 1)
    wait_for("a save", lambda: list(bench.phase("saving").glob(".tmp-*")), 60, lambda: bench.log(job), pause_s=0.001)
    writer = bench.cluster.ranks(job)[0]
    os.kill(writer, signal.SIGSTOP)
    bench.cluster.run("scontrol", "requeue", job)
    os.kill(writer, signal.SIGCONT)
    bench.restarts(job, 1)
    bench.finish(job)
    assert same(bench.weights("saving"), bench.undisturbed("two"))


@pytest.mark.cluster
def test_a_killed_process_takes_the_others_along_and_the_job_is_requeued_and_finishes(bench: Bench) -> None:
    job = bench.submit("killed", "two")
    ranks = bench.hold("killed", job, SAVE_STEPS + 5)
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    wait_for("the end of the other process", lambda: not Path(f"/proc/{ranks[0]}").exists(), 60)
    bench.restarts(job, 1)
    bench.finish(job)
    assert f"checkpoint-{SAVE_STEPS}" in bench.log(job)
    assert same(bench.weights("killed"), bench.undisturbed("two"))


@pytest.mark.cluster
def test_a_job_whose_node_is_lost_goes_on_elsewhere(bench: Bench) -> None:
    job = bench.submit("lost", "two")
    ranks = bench.hold("lost", job, SAVE_STEPS + 5)
    lost = bench.cluster.run("scontrol", "show", "hostnames", bench.cluster.job(job)["NodeList"]).split()[-1]
    try:
        bench.cluster.lose_node(lost)
        os.kill(ranks[0], signal.SIGCONT)
        bench.restarts(job, 1)
        bench.finish(job)
        nodes = bench.cluster.run("scontrol", "show", "hostnames", bench.cluster.job(job)["NodeList"]).split()
        assert len(nodes) == 2 and lost not in nodes
        assert same(bench.weights("lost"), bench.undisturbed("two"))
    finally:
        bench.cluster.start_node(lost)
        wait_for("the node to come back", lambda: bench.cluster.states().count("idle") == 4, 60, bench.cluster.logs)


@pytest.mark.cluster
def test_a_run_moves_from_two_nodes_to_one_and_to_four(bench: Bench) -> None:
    for recipe, step in (("two", 10), ("one", 30)):
        job = bench.submit("moved", recipe)
        bench.hold("moved", job, step)
        bench.cluster.run("scancel", job)  # wakes them, too
        bench.finish(job, state="CANCELLED")  # and not requeued: what is cancelled stays so
        wait_for("the end of its processes", lambda job=job: not bench.cluster.ranks(job), 60)
        assert "asked to stop: saved at step" in bench.log(job)
    bench.finish(bench.submit("moved", "four"))
    straight, moved = bench.undisturbed("two"), bench.weights("moved")
    for key, value in straight.items():
        torch.testing.assert_close(moved[key], value, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.cluster
def test_an_element_of_a_data_array_that_failed_runs_again_alone(bench: Bench) -> None:
    output = bench.folder / "array" / "reasoning_data.json"
    blocked = output.with_name("reasoning_data-1.json")
    blocked.mkdir(parents=True)  # a folder where element 1 would write

    def submit(array: str) -> str:
        return bench.cluster.run(
            "sbatch", "--parsable", f"--array={array}", "--cpus-per-task=1", "slurm/generate_data.sh",
            "--teacher_model", "rules", "--num_samples", "30", "--output_file", output,
            **bench.env, EMBERVLM_SHARDS="3",
        ).strip()  # fmt: skip

    job = submit("0-2")
    for element, state in enumerate(("COMPLETED", "FAILED", "COMPLETED")):
        bench.finish(f"{job}_{element}", state=state)
    blocked.rmdir()
    bench.finish(f"{submit('1')}_1")
    shares = [output.with_name(f"reasoning_data-{element}.json") for element in range(3)]
    bench.cluster.run(sys.executable, "-m", "embervlm.cli", "data", "merge", *shares, "--output_file", output)
    assert len(read_records(output)) == 30
