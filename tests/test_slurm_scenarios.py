"""Jobs on a real Slurm: chained, timed out, killed, preempted, moved. Each ends as a run that nothing happened to.

They run beside each other, because most of the time goes by while Slurm holds a requeued job.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import slurm_cluster
import torch
import yaml
from slurm_cluster import ENDED, SlurmCluster, is_held
from training_helpers import BIN, REPOSITORY, TINY, make_data, save_stage3, weights_of, write_model_yaml, write_run_yaml

from embervlm import run_dir
from embervlm.cluster import load_recipe
from embervlm.config_file import read_yaml
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run.submit import limit_minutes, result_of, slurm_parameters, submit_to_slurm, training_jobs
from embervlm.slurm_commands import fields

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=f"no Slurm: {slurm_cluster.missing()}"),
]
STEPS, SAVE_STEPS, STOP = 16, 4, 6
MINUTES = 600
PATIENCE_S = 900
"""How long to wait for what a job does, on a machine that is busy with other things."""
AT_ONCE = 3
"""Scenarios that run at the same time."""
RECIPES = {
    "one": (1, 4, 2, "a100"),
    "two": (2, 4, 1, "a100"),
    "four": (4, 2, 1, "a100"),
    "lost": (2, 4, 1, "v100"),
    "preempted": (2, 4, 1, "h100"),
}
"""Nodes of one GPU, micro-batch, accumulation, type; the global batch is always 8."""


class Bench:
    """A cluster, data, a Stage 3 checkpoint that the jobs start from, and a job that nothing happens to."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        data = make_data(folder)
        self.stage3 = save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
        write_run_yaml(
            folder,
            write_model_yaml(folder),
            data,
            stage4__phase2__epochs=60,
            stage4__phase1__epochs=2,
            save_steps=SAVE_STEPS,
            max_steps=STEPS,
        )
        for name, (nodes, batch_size, accumulation, gpu_type) in RECIPES.items():
            recipe = {
                "nodes": nodes,
                "gpus_per_node": 1,
                "gpu_type": gpu_type,
                "precision": "fp32",
                "zero_stage": 2,
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "cpus_per_task": 1,
                "phase1_minutes": MINUTES,
                "phase2_minutes": MINUTES,
            }
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        self.straight = self.submit("straight", "two")

    @property
    def env(self) -> dict[str, str]:
        return {
            "EMBERVLM_VENV": str(BIN.parent),
            "SBATCH_OUTPUT": f"{self.folder}/%x-%j.log",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def flags(self, name: str, recipe: str, *more: str) -> list[str]:
        return [
            "--cluster",
            f"{self.folder}/{recipe}.yaml",
            "--config",
            f"{self.folder}/run.yaml",
            "--output_dir",
            f"{self.folder}/{name}",
            "--resume_from",
            str(self.stage3),
            *more,
        ]

    def submit(self, name: str, recipe: str, **env: str) -> str:
        """Submit phase 2 from Stage 3 into the output folder `name`, as a user does, and return its job."""
        script = ("bash", "slurm/stage4_phase2.sh")
        return self.cluster.run(*script, *self.flags(name, recipe), **(self.env | env)).split()[-1]

    def log(self, job: str) -> str:
        logs = [*self.folder.glob(f"*-{job}.log"), *self.folder.glob(f"*/jobs/{job}_*_log.*")]
        return "".join(path.read_text() for path in sorted(logs))

    def state(self, job: str) -> str:
        return self.cluster.job(job)["JobState"]

    def wait(self, job: str, what: str, holds: Callable[[], object], pause_s: float = 0.2) -> None:
        """Wait for what a job does; fails at once where it has ended before."""
        looked = time.monotonic()

        def now() -> bool:
            nonlocal looked
            if holds():
                return True
            if time.monotonic() > looked + 5:
                ended = self.state(job) in ENDED
                assert not ended or holds(), f"job {job} ended before {what}\n{self.log(job)[-6000:]}"
                looked = time.monotonic()
            return False

        self.cluster.wait(f"{what} of job {job}", now, PATIENCE_S, pause_s)

    def finish(self, job: str, *, state: str = "COMPLETED") -> None:
        """Wait for the end of a job, which must be this one."""
        self.cluster.wait(f"the end of job {job}", lambda: self.state(job) in ENDED, PATIENCE_S, 1)
        assert self.state(job) == state, self.log(job)[-6000:]

    def phase(self, name: str) -> Path:
        return run_dir.phase_dir(self.folder / name, 2)

    def hold(self, name: str, job: str, step: int) -> dict[int, int]:
        """Stop a job's processes soon after a step, so that what comes next finds them in training."""
        log = run_dir.metrics_log_path(self.phase(name))
        self.wait(job, f"step {step}", lambda: log.exists() and len(log.read_text().splitlines()) >= step, 0.02)
        ranks = self.cluster.ranks(job)
        for pid in ranks.values():
            os.kill(pid, signal.SIGSTOP)
        return ranks

    def restarts(self, job: str, count: int) -> None:
        """Wait until Slurm has put a job back into the queue that often."""
        self.wait(job, f"requeue {count}", lambda: self.cluster.job(job)["Restarts"] == str(count), 1)

    def saved_steps(self, job: str) -> list[int]:
        """Steps that signals made the job save at, and checks that it went on from each."""
        found = [int(step) for step in re.findall(r"asked to stop: saved at step (\d+)", self.log(job))]
        assert [f"checkpoint-{step}" in self.log(job) for step in found] == [True] * len(found)
        return found

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return weights_of(run_dir.checkpoint_path(self.phase(name), None))

    def ends_undisturbed(self, name: str) -> bool:
        """Whether a run's final weights are, bit for bit, those of the job that nothing happened to."""
        self.finish(self.straight)
        found, wanted = self.weights(name), self.weights("straight")
        return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


def phase_1_phase_2_and_evaluation_run_one_after_the_other(bench: Bench) -> None:
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


def a_job_that_reaches_its_time_limit_saves_is_requeued_and_finishes(bench: Bench) -> None:
    job = bench.submit("limit", "two")
    ranks = bench.hold("limit", job, STOP).values()
    hours, minutes, _ = map(int, bench.cluster.job(job)["RunTime"].split(":"))
    limit = 60 * hours + minutes + 3  # nearer than the scripts' --signal=USR2@180, so that is due at the next look
    bench.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    bench.wait(job, "SIGUSR2", lambda: not any(is_held(pid, signal.SIGUSR2) for pid in ranks))
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):  # some Slurms wake them
            os.kill(pid, signal.SIGCONT)
    bench.restarts(job, 1)
    bench.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={MINUTES}")
    bench.finish(job)
    (step,) = bench.saved_steps(job)
    assert STOP <= step < STEPS
    assert bench.ends_undisturbed("limit")


def a_job_that_is_requeued_in_the_middle_of_a_save_finishes(bench: Bench) -> None:
    job = bench.submit("saving", "two")
    bench.wait(job, "a process", lambda: 0 in bench.cluster.ranks(job))
    writer = bench.cluster.ranks(job)[0]

    def stopped_while_saving() -> bool:
        if not list(bench.phase("saving").glob(".tmp-*")):
            return False
        os.kill(writer, signal.SIGSTOP)
        if list(bench.phase("saving").glob(".tmp-*")):
            return True
        os.kill(writer, signal.SIGCONT)  # it was done a moment before
        return False

    bench.wait(job, "a save", stopped_while_saving, pause_s=0.001)
    bench.cluster.run("scontrol", "requeue", job)  # wakes it
    bench.restarts(job, 1)
    bench.finish(job)
    assert bench.ends_undisturbed("saving")


def a_killed_process_takes_the_others_along_and_the_job_is_requeued_and_finishes(bench: Bench) -> None:
    job = bench.submit("killed", "two")
    ranks = bench.hold("killed", job, STOP)
    os.kill(ranks[1], signal.SIGKILL)
    os.kill(ranks[0], signal.SIGCONT)
    bench.cluster.wait("the end of the other process", lambda: not Path(f"/proc/{ranks[0]}").exists(), 60)
    bench.restarts(job, 1)
    bench.finish(job)
    assert f"resuming from {bench.phase('killed')}/checkpoint-{SAVE_STEPS}" in bench.log(job)
    assert bench.ends_undisturbed("killed")


def a_job_whose_node_is_lost_goes_on_elsewhere(bench: Bench) -> None:
    job = bench.submit("lost", "lost")
    ranks = bench.hold("lost", job, STOP)
    lost = bench.cluster.nodes_of(job)[-1]
    bench.cluster.lose_node(lost)
    os.kill(ranks[0], signal.SIGCONT)
    bench.restarts(job, 1)
    bench.finish(job)
    nodes = bench.cluster.nodes_of(job)
    assert len(nodes) == 2 and lost not in nodes
    assert bench.ends_undisturbed("lost")


def a_run_moves_from_two_nodes_to_one_and_to_four(bench: Bench) -> None:
    for recipe, step in (("two", STOP), ("one", 2 * STOP)):
        job = bench.submit("moved", recipe)
        bench.hold("moved", job, step)
        bench.cluster.run("scancel", job)  # wakes them, too
        bench.finish(job, state="CANCELLED")  # and not requeued: what is cancelled stays so
        bench.cluster.wait("the end of its processes", lambda job=job: not bench.cluster.ranks(job), 60)
        assert "asked to stop: saved at step" in bench.log(job)
    bench.finish(bench.submit("moved", "four"))
    bench.finish(bench.straight)
    straight, moved = bench.weights("straight"), bench.weights("moved")
    for key, value in straight.items():
        torch.testing.assert_close(moved[key], value, rtol=1e-3, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def a_job_of_submitit_is_preempted_requeued_and_returns_its_result(bench: Bench) -> None:
    recipe = load_recipe(f"{bench.folder}/preempted.yaml")
    (job,) = training_jobs([*bench.flags("submitit", "preempted"), "--phase", "2"], sweeps=[])
    parameters = slurm_parameters(recipe, limit_minutes(recipe, 2))
    (submitted,) = submit_to_slurm([job], bench.folder / "submitit" / "jobs", parameters, max_timeouts=0)
    bench.hold("submitit", submitted.job_id, STOP)
    urgent = bench.cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
        f"--nodelist={bench.cluster.job(submitted.job_id)['NodeList']}",
    ).strip()
    bench.restarts(submitted.job_id, 1)  # the preemption woke it, too
    bench.finish(urgent)
    bench.finish(submitted.job_id)
    assert result_of(submitted) == f"{bench.folder}/submitit"
    log = submitted.paths.stdout.read_text()
    assert log.count("Calling checkpoint method.") == 1 and "this job is preempted" in log
    assert bench.ends_undisturbed("submitit")


def a_training_goes_on_while_jobs_of_their_own_evaluate_its_checkpoints(bench: Bench) -> None:
    flags = bench.flags(
        "evaluated",
        "two",
        "--eval_cluster",
        f"{bench.folder}/one.yaml",
        "--eval_steps",
        "8",
        "--set",
        "eval_samples=2",
        "keep_last=1",
    )
    job = bench.cluster.run("bash", "slurm/stage4_phase2.sh", *flags, **bench.env).split()[-1]
    bench.finish(job)
    assert bench.log(job).count("is evaluated by job") == STEPS // 8
    assert bench.ends_undisturbed("evaluated")
    checkpoints = run_dir.list_checkpoints(bench.phase("evaluated"))
    noted = [found.path for found in checkpoints if run_dir.eval_job_path(found.path, "val").exists()]
    assert run_dir.checkpoint_path(bench.phase("evaluated"), None) in noted
    for path in noted:
        evaluation = run_dir.read_json(run_dir.eval_job_path(path, "val"))["job_id"]
        assert evaluation != job
        bench.finish(evaluation)
        assert run_dir.read_eval(run_dir.eval_path(path, "val"))["num_samples"] == 2


def a_job_is_not_requeued_for_ever(bench: Bench) -> None:
    def start(job: str) -> list[int]:
        bench.wait(job, "a process", lambda: bench.cluster.ranks(job))
        return list(bench.cluster.ranks(job).values())

    def kill(job: str) -> None:
        for pid in start(job):
            os.kill(pid, signal.SIGKILL)

    never = bench.submit("never", "one", EMBERVLM_MAX_REQUEUES="0")
    once, stuck = bench.submit("once", "one", EMBERVLM_MAX_REQUEUES="1"), bench.submit("stuck", "one")
    for job in (never, once, stuck):
        kill(job)
    bench.finish(never, state="FAILED")
    for job in (once, stuck):
        bench.restarts(job, 1)
    kill(stuck)
    start(once)
    bench.cluster.run("scontrol", "requeue", once)
    for job in (once, stuck):
        bench.finish(job, state="FAILED")
    assert "is not requeued: it was requeued 0 times (EMBERVLM_MAX_REQUEUES=0)" in bench.log(never)
    assert "was requeued 2 times, more than EMBERVLM_MAX_REQUEUES=1" in bench.log(once)
    assert "is not requeued: the last requeue made no progress" in bench.log(stuck)


def an_element_of_a_data_array_that_failed_runs_again_alone(bench: Bench) -> None:
    output = bench.folder / "array" / "reasoning_data.json"
    blocked = output.with_name("reasoning_data-1.json")
    blocked.mkdir(parents=True)  # a folder where element 1 would write

    def submit(array: str) -> str:
        return bench.cluster.run(
            "sbatch",
            "--parsable",
            f"--array={array}",
            "--cpus-per-task=1",
            "--constraint=a100",
            "slurm/generate_data.sh",
            "--teacher_model",
            "rules",
            "--num_samples",
            "30",
            "--output_file",
            output,
            **bench.env,
            EMBERVLM_SHARDS="3",
        ).strip()

    job = submit("0-2")
    for element, state in enumerate(("COMPLETED", "FAILED", "COMPLETED")):
        bench.finish(f"{job}_{element}", state=state)
    blocked.rmdir()
    bench.finish(f"{submit('1')}_1")
    shares = [output.with_name(f"reasoning_data-{element}.json") for element in range(3)]
    bench.cluster.run(sys.executable, "-m", "embervlm.cli", "data", "merge", *shares, "--output_file", output)
    assert len(read_records(output, candidates=ROBOTS)) == 30


def a_stopped_element_of_a_sweep_is_requeued_alone(bench: Bench) -> None:
    """The last element's SLURM_JOB_ID is the array's number, by which Slurm shows and requeues all of them."""
    recipe = load_recipe(f"{bench.folder}/one.yaml")
    jobs = training_jobs([*bench.flags("sweep", "one"), "--phase", "2"], sweeps=["seed=0,1"])
    parameters = slurm_parameters(recipe, limit_minutes(recipe, 2))
    other, last = submit_to_slurm(jobs, bench.folder / "sweep" / "jobs", parameters, max_timeouts=0)
    array = last.job_id.partition("_")[0]
    ranks = bench.hold("sweep/seed=1", array, STOP)
    bench.cluster.run("scancel", other.job_id)
    bench.finish(other.job_id, state="CANCELLED")
    for pid in ranks.values():
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGCONT)
    bench.restarts(last.job_id, 1)
    bench.finish(last.job_id)
    assert run_dir.read_json(run_dir.checkpoint_path(bench.phase("sweep/seed=1"), None) / "state.json")["step"] == STEPS
    assert bench.state(other.job_id) == "CANCELLED"


def commands_wait_for_a_controller_that_is_away(bench: Bench) -> None:
    away = bench.folder / "away.conf"
    there = Path(bench.cluster.env["SLURM_CONF"]).read_text()
    state = f"from embervlm.slurm_commands import job_state; print(job_state({bench.straight!r}))"
    evaluate = ["bash", "slurm/evaluate.sh", "--cluster", f"{bench.folder}/one.yaml", "--", "--checkpoint", "none"]
    for command in ([sys.executable, "-c", state], evaluate):
        away.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", there))  # nobody listens there
        asking = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=bench.cluster.env | bench.env | {"SLURM_CONF": str(away)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert asking.stderr is not None and asking.stdout is not None
        assert "Slurm's controller does not answer" in asking.stderr.readline()
        away.write_text(there)
        said = asking.stdout.read().strip()
        assert asking.wait(120) == 0, asking.stderr.read()
        assert said.split()[0] in ("RUNNING", "COMPLETED", "PENDING", "Submitted"), said
    bench.cluster.run("scancel", said.split()[-1])


def what_sbatch_was_given_reaches_the_job_that_is_submitted_in_its_place(bench: Bench) -> None:
    given = (
        "--partition=other",
        "--time=20",
        "--mem=700M",
        "--tmp=1M",
        "--switches=1@5",
        "--comment=a b",
        "--mail-type=END,FAIL",
        "--mail-user=me@here",
        "--nice=5",
        "--exclude=n1",
        "--job-name=mine",
        "--no-requeue",
        f"--output={bench.folder}/a log-%j.txt",
    )
    flags = bench.flags("given", "two")
    small = bench.cluster.run("sbatch", "--parsable", *given, "slurm/stage4_phase2.sh", *flags, **bench.env).strip()
    bench.finish(small)
    said = (bench.folder / f"a log-{small}.txt").read_text()
    job = said.split()[-1]
    found = slurm_commands_fields(bench, job)
    bench.cluster.run("scancel", job)
    wanted = {
        "Partition": "other",
        "TimeLimit": "00:20:00",
        "MinMemoryNode": "700M",
        "MinTmpDiskNode": "1M",
        "Switches": "1@00:05:00",
        "Comment": "a b",
        "Nice": "5",
        "MailType": "END,FAIL",
        "MailUser": "me@here",
        "ExcNodeList": "n1",
        "JobName": "mine",
        "Requeue": "0",
        "StdOut": f"{bench.folder}/a log-{job}.txt",
    }
    assert {key: found[key] for key in wanted} == wanted
    assert f"job {job}: slurm/stage4_phase2.sh with --nodes=2" in said
    refused = bench.cluster.run("sbatch", "--parsable", "--gres=gpu:2", "slurm/stage4_phase2.sh", *flags, **bench.env)
    bench.finish(refused.strip(), state="FAILED")
    assert "error: sbatch was given other nodes (nodes: 1, GPUs per node: 2)" in bench.log(refused.strip())


def slurm_commands_fields(bench: Bench, job: str) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", bench.cluster.env["SLURM_CONF"])
        return fields("job", job)


def a_bare_sbatch_trains_at_a_site_that_passes_no_environment_on(bench: Bench) -> None:
    """SBATCH_EXPORT=NONE, a path with a space, a `module` that looks at an unset variable, an unsuitable option."""
    site = bench.folder / "a site" / "embervlm"
    for name in ("embervlm", "launch", "slurm", "configs"):
        shutil.copytree(REPOSITORY / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    run_yaml = read_yaml(bench.folder / "run.yaml")
    changes = {
        "output_dir": str(site / "out puts"),
        "resume_from": str(bench.stage3),
        "max_steps": 1,
        "engine": "torch",
        "report": False,
    }
    (site / "configs" / "training_stages.yaml").write_text(yaml.safe_dump({**run_yaml, **changes}))
    values = {"SBATCH_EXPORT": "NONE", **bench.env, "SBATCH_OUTPUT": f"{site}/%x-%j.log"}
    env_file = site / "slurm" / "site.env"
    shipped = env_file.read_text()
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    # what srun and the wrapper get keeps its quotes
    lines += [
        "EMBERVLM_SRUN_OPTIONS=--label",
        "EMBERVLM_WRAPPER='bash -c '\\''echo \"in $0\"; exec \"$@\"'\\'' \"my image\"'",
    ]
    lines += ["module() { [[ $1 == load && $NEVER_SET == '' ]]; }", "module load python", shipped]
    env_file.write_text("\n".join(lines))

    def submit(*argv: str) -> str:
        found = subprocess.run(
            argv,
            cwd=site,
            env={"PATH": os.environ["PATH"], "SLURM_CONF": bench.cluster.env["SLURM_CONF"]} | values,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        return found.stdout.split()[-1]

    on_its_gpus = submit("sbatch", "--gres=gpu:2", "slurm/stage4_phase2.sh")
    nowhere = submit("sbatch", "slurm/stage4_phase2.sh")
    bench.finish(on_its_gpus)
    env_file.write_text(env_file.read_text() + "\nEMBERVLM_SRUN_OPTIONS=--nonsense\n")
    unknown = submit("sbatch", "--gres=gpu:2", "slurm/stage4_phase2.sh")
    bench.finish(unknown, state="FAILED")
    with env_file.open("a") as file:
        file.write(
            f"\nEMBERVLM_SBATCH_GPU='--gres=gpu:1 --ntasks-per-node=3'\nEMBERVLM_CLUSTER={bench.folder}/one.yaml\n"
        )
    endless = submit("bash", "slurm/stage4_phase2.sh")
    for job in (nowhere, endless):
        bench.finish(job, state="FAILED")
    logs = {job: next(site.glob(f"*-{job}.log")) for job in (on_its_gpus, nowhere, unknown, endless)}
    assert logs[nowhere].read_text().count("error: the nodes are not given") == 1
    assert "error: Slurm gave other nodes (nodes: 1, GPUs per node: 1, tasks per node: 3)" in logs[endless].read_text()
    assert "is not requeued: exit status 255 means an error that would occur again" in logs[unknown].read_text()
    assert len(list(site.glob("*.log"))) == 4, "a job has submitted another"
    for rank in range(2):
        assert f"{rank}: in my image" in logs[on_its_gpus].read_text()
    state = run_dir.read_json(run_dir.checkpoint_path(run_dir.phase_dir(site / "out puts", 2), None) / "state.json")
    assert state["step"] == 1
    assert "using the job's resources (nodes: 1, GPUs per node: 2)" in logs[on_its_gpus].read_text()


def in_an_allocation_without_srun_a_training_is_alone(bench: Bench) -> None:
    train = f"{sys.executable} launch/train.py --phase 2 --max_steps 1 --engine torch --set report=false"
    for name, start in (
        ("salloc", ("salloc", "--ntasks=2", "bash", "-c")),
        ("batch", ("sbatch", "--wait", "--ntasks=2", "--wrap")),
    ):
        flags = shlex.join(bench.flags(name, "one")[2:])
        bench.cluster.run(*start, f"cd {shlex.quote(str(REPOSITORY))} && {train} {flags}", **bench.env)
        assert run_dir.checkpoint_path(bench.phase(name), None).exists()


SCENARIOS = (
    a_job_whose_node_is_lost_goes_on_elsewhere,
    a_job_that_reaches_its_time_limit_saves_is_requeued_and_finishes,
    a_job_of_submitit_is_preempted_requeued_and_returns_its_result,
    a_job_that_is_requeued_in_the_middle_of_a_save_finishes,
    a_killed_process_takes_the_others_along_and_the_job_is_requeued_and_finishes,
    a_run_moves_from_two_nodes_to_one_and_to_four,
    a_job_is_not_requeued_for_ever,
    an_element_of_a_data_array_that_failed_runs_again_alone,
    phase_1_phase_2_and_evaluation_run_one_after_the_other,
    a_training_goes_on_while_jobs_of_their_own_evaluate_its_checkpoints,
    a_stopped_element_of_a_sweep_is_requeued_alone,
    commands_wait_for_a_controller_that_is_away,
    what_sbatch_was_given_reaches_the_job_that_is_submitted_in_its_place,
    a_bare_sbatch_trains_at_a_site_that_passes_no_environment_on,
    in_an_allocation_without_srun_a_training_is_alone,
)


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[float]]]:
    """The scenarios that were asked for, started; each gives the seconds that it took."""
    names = {item.callspec.id for item in request.session.items if item.path == request.path}  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, SlurmCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        bench = Bench(cluster, tmp_path_factory.mktemp("slurm"))
        for name, value in (cluster.env | bench.env).items():  # submitit calls sbatch from this process
            patch.setenv(name, value)

        def timed(scenario: Callable[[Bench], None]) -> float:
            began = time.monotonic()
            scenario(bench)
            return time.monotonic() - began

        pool = ThreadPoolExecutor(AT_ONCE)
        yield {found.__name__: pool.submit(timed, found) for found in SCENARIOS if found.__name__ in names}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("scenario", [found.__name__ for found in SCENARIOS])
def test_on_slurm(scenario: str, running: dict[str, Future[float]]) -> None:
    print(f"{running[scenario].result():.0f} s")
