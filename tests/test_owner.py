"""One run at a time writes into an output folder, and no rank lives on unseen."""

import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from training_helpers import (
    REPOSITORY,
    TINY,
    command,
    environment,
    make_data,
    save_stage3,
    train,
    write_model_yaml,
    write_run_yaml,
)

from embervlm import run_dir
from embervlm.data import store
from embervlm.data.records import read_records
from embervlm.data.store import prepare
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS
from embervlm.run import owner
from embervlm.run.owner import OWNER, OwnedError, Owner, owning
from embervlm.signals import EXIT_FAULT, EXIT_REQUEUE, process_status


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(owner, "STALE_S", 1.0)


def elsewhere(folder, **changes):
    """Note a run of another machine as the folder's owner."""
    other = replace(Owner.of_this_process(), **{"host": "node7", "machine": "another boot", **changes})
    (folder / OWNER).write_text(json.dumps(asdict(other)))
    return other


def test_a_second_run_is_refused_by_the_name_of_the_first_until_that_has_ended(tmp_path):
    with owning(tmp_path / "outputs"):
        first = f"process {os.getpid()} on {os.uname().nodename}, since 20"
        with (
            pytest.raises(OwnedError, match=f"outputs: another run is writing there .{first}"),
            owning(tmp_path / "outputs"),
        ):
            pass
        assert (tmp_path / "outputs" / OWNER).exists()
    with owning(tmp_path / "outputs"):
        pass
    assert not list((tmp_path / "outputs").iterdir())


def test_an_owner_whose_process_is_gone_or_is_another_by_now_is_followed_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while process_status(ended.pid) is not None:  # it is not waited for: a zombie has ended too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for changes in ({"pid": ended.pid}, {"process": "1"}):
        (tmp_path / OWNER).write_text(json.dumps({**asdict(Owner.of_this_process()), **changes}))
        with owning(tmp_path):
            pass
    ended.wait()


def test_an_owner_on_another_machine_lives_as_long_as_it_gives_signs_of_life(tmp_path, impatient):
    elsewhere(tmp_path, job="12")
    stop = threading.Event()

    def live():
        while not stop.wait(0.05):
            os.utime(tmp_path / OWNER)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(OwnedError, match="process .* on node7, Slurm job 12, since"), owning(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
    with owning(tmp_path):  # it has fallen silent
        pass


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_an_owner_file_that_is_damaged_is_watched_as_well(tmp_path, impatient, content):
    (tmp_path / OWNER).write_text(content)
    with owning(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["pid"] == os.getpid()


def test_a_requeued_slurm_job_follows_itself_at_once(tmp_path, monkeypatch):
    elsewhere(tmp_path, job="12", restarts="0")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    began = time.monotonic()
    with owning(tmp_path):
        assert time.monotonic() - began < 1


def test_a_run_that_was_taken_for_dead_writes_no_more(tmp_path):
    code = (
        "import sys, time; from embervlm.run import owner; owner.HEARTBEAT_S = 0.1\n"
        "with owner.owning(sys.argv[1]): print('owns', flush=True); time.sleep(60)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None and first.stdout.readline() == "owns\n"
    other = elsewhere(tmp_path)
    _, said = first.communicate(timeout=30)
    assert first.returncode == EXIT_FAULT and f"now belongs to {other}; this run ends" in said
    assert (tmp_path / OWNER).exists()


def own_once(folder, start, results, seconds, over):
    look = Owner.is_dead

    def slow(self, other):
        time.sleep(seconds)  # all others have looked as well by now, and some have gone on
        return look(self, other)

    Owner.is_dead = slow
    start.wait()
    try:
        with owning(folder):
            results.put("owned")
            over.wait(60)  # until all others have tried, however long the machine makes them wait
    except OwnedError:
        results.put("refused")


@pytest.mark.parametrize("claimed", [False, True], ids=["no_claim", "claim_of_a_dead_run"])
@pytest.mark.parametrize("apart", [0.0, 0.002, 0.05])
def test_of_runs_that_follow_a_dead_one_at_the_same_moment_one_gets_the_folder(tmp_path, apart, claimed):
    dead = replace(Owner.of_this_process(), process="1")
    (tmp_path / OWNER).write_text(json.dumps(asdict(dead)))
    if claimed:  # a run that was about to follow it was killed
        (tmp_path / f"{OWNER}-after-{dead.token}").write_text(json.dumps(asdict(replace(dead, token="second"))))
    context = multiprocessing.get_context("fork")
    start, results, over = context.Barrier(6), context.Queue(), context.Event()
    runs = [context.Process(target=own_once, args=(tmp_path, start, results, i * apart, over)) for i in range(6)]
    for run in runs:
        run.start()
    found = [results.get(timeout=60) for _ in runs]
    over.set()
    assert sorted(found) == ["owned"] + ["refused"] * 5
    for run in runs:
        run.join()
    assert not list(tmp_path.iterdir())


def prepare_once(data, cache, start, results):
    look = store._open
    store._open = lambda folder: (look(folder), time.sleep(0.2))[0]  # all look before any of them is done
    start.wait()
    try:
        results.put(len(prepare(data, cache, candidates=ROBOTS).all()))
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("kind", ["json", "shard"])
def test_runs_that_share_a_cold_cache_do_not_break_each_other(tmp_path, scene_data, kind):
    data = scene_data / "reasoning_data.json"
    if kind == "shard":
        import tarfile

        data = tmp_path / "shard.tar"
        with tarfile.open(data, "w") as tar:
            for record in json.loads((scene_data / "reasoning_data.json").read_text()):
                (tmp_path / "one.json").write_text(json.dumps(record))
                tar.add(tmp_path / "one.json", f"{record['id']}.json")
                tar.add(scene_data / record["image"], f"{record['id']}.jpg")
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(4), context.Queue()
    runs = [context.Process(target=prepare_once, args=(data, tmp_path / "cache", start, results)) for _ in range(4)]
    for run in runs:
        run.start()
    assert [results.get(timeout=60) for _ in runs] == [48] * 4
    for run in runs:
        run.join()
    assert not [path for path in (tmp_path / "cache").rglob("*") if "tmp" in path.name]


def test_what_a_killed_run_left_in_the_cache_is_deleted_once_it_is_old(tmp_path, scene_data):
    for name, age_s in (("old", 2 * 86_400), ("new", 60)):
        part = tmp_path / f".tmp-records-{name}"
        part.mkdir()
        (part / "records.jsonl").write_text("")
        for path in (part / "records.jsonl", part):
            os.utime(path, (time.time() - age_s,) * 2)
    prepare(scene_data / "reasoning_data.json", tmp_path, candidates=ROBOTS)
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [".tmp-records-new"]


# -- whole runs


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owned")
    data = make_data(folder)
    stage3 = save_stage3(folder / "start" / "stage3", TINY, read_records(data, candidates=ROBOTS))
    config = write_run_yaml(folder, write_model_yaml(folder), data, stage4__phase2__epochs=900, save_steps=20)
    return [
        "--config",
        str(config),
        "--stages",
        "4",
        "--phase",
        "2",
        "--resume_from",
        str(stage3),
        "--engine",
        "torch",
        "--set",
        "report=false",
    ]


def started(argv, output_dir, **options):
    """The process, once training has made a few steps in `output_dir`."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **options}
    process = subprocess.Popen(argv, env=environment(), cwd=REPOSITORY, start_new_session=True, **options)
    log = run_dir.metrics_log_path(run_dir.phase_dir(output_dir, 2))
    deadline = time.monotonic() + 240
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


def wait_until_ended(pid):
    deadline = time.monotonic() + 120
    while process_status(pid) is not None:
        assert time.monotonic() < deadline, f"{pid} lives on"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_second_training_is_refused_and_harms_nothing_and_a_killed_one_is_followed(tmp_path, flags):
    flags = [*flags, "--output_dir", str(tmp_path)]
    first = started(command("python", REPOSITORY / "launch" / "train.py", *flags), tmp_path)
    folder = run_dir.phase_dir(tmp_path, 2)
    half_written = run_dir.new_tmp_dir(folder)
    try:
        second = train("torchrun", *flags)
        assert second.returncode != 0
        (said,) = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
        assert f"{tmp_path}: another run is writing there (process {first.pid} on " in said
        assert half_written.is_dir() and first.poll() is None
    finally:
        first.kill()
        first.wait()
    log = run_dir.metrics_log_path(folder)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")]
    assert steps == sorted(set(steps))
    third = train("python", *flags, "--max_steps", str(steps[-1] + 1))
    assert third.returncode == 0, third.stderr
    assert not half_written.exists() and not (tmp_path / OWNER).exists()


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "number"), [("torchrun", "KILL"), ("deepspeed", "TERM")])
def test_ranks_whose_launcher_is_gone_save_and_end(tmp_path, flags, launcher, number):
    argv = command(launcher, REPOSITORY / "launch" / "train.py", *flags, "--output_dir", str(tmp_path))
    process = started(argv, tmp_path)
    rank_0 = json.loads((tmp_path / OWNER).read_text())["pid"]
    try:
        process.send_signal(getattr(signal, f"SIG{number}"))
        process.wait(30)
        wait_until_ended(rank_0)
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process_status(rank_0) else None
    log = run_dir.metrics_log_path(run_dir.phase_dir(tmp_path, 2))
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert last in [found.step for found in run_dir.list_checkpoints(run_dir.phase_dir(tmp_path, 2))]
    assert not (tmp_path / OWNER).exists()


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends(tmp_path, flags):
    argv = command("python", REPOSITORY / "launch" / "train.py", *flags, "--output_dir", str(tmp_path))
    ours, its = pty.openpty()
    process = started(argv, tmp_path, stdin=its, stdout=its, stderr=its)
    try:
        os.close(its)
        os.close(ours)
        process.send_signal(signal.SIGHUP)  # what the shell of that terminal does
        assert process.wait(120) == EXIT_REQUEUE
    finally:
        process.kill()
    assert run_dir.list_checkpoints(run_dir.phase_dir(tmp_path, 2))


@pytest.mark.slow
def test_a_training_in_the_background_outlives_its_shell_and_nohup_its_terminal(tmp_path, flags):
    argv = command("python", REPOSITORY / "launch" / "train.py", *flags, "--output_dir", str(tmp_path))
    line = " ".join(f"'{word}'" for word in argv)
    shell = subprocess.Popen(
        ["bash", "-c", f"nohup {line} > {tmp_path / 'log'} 2>&1 & echo $!"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
    )
    pid = int(shell.communicate(timeout=30)[0])
    log = run_dir.metrics_log_path(run_dir.phase_dir(tmp_path, 2))
    try:
        deadline = time.monotonic() + 240
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(pid, signal.SIGHUP)
        steps = len(log.read_text().splitlines())
        while len(log.read_text().splitlines()) < steps + 5:
            assert process_status(pid) is not None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
    finally:
        os.kill(pid, signal.SIGKILL)
