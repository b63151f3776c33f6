"""The teacher client against a server that misbehaves."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from measure_endpoint import measure
from scripted_teacher import Act, chain, serving

from embervlm.cli import main
from embervlm.data.records import read_records
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS

REPOSITORY = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tasks(tmp_path):
    """Ten tasks whose answer is Drone."""
    return write_tasks(tmp_path, 10)


def write_tasks(folder, number, robot="Drone"):
    path = folder / "tasks.json"
    path.write_text(json.dumps([{"input": f"Task: film roof {index}", "output": robot} for index in range(number)]))
    return path


def command(teacher, tasks, *flags, output="out.json"):
    return [
        "data",
        "generate",
        "--teacher_model",
        "deepseek-r1",
        "--teacher_base_url",
        teacher.url,
        "--input_dataset",
        str(tasks),
        "--output_file",
        str(tasks.parent / output),
        *map(str, flags),
    ]


def generate(teacher, tasks, *flags, output="out.json"):
    main(command(teacher, tasks, *flags, output=output))
    return read_records(tasks.parent / output, candidates=ROBOTS)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def good(body, number):
    return Act(content=chain("Drone"))


def first(*acts):
    """A script: these, then only good answers."""
    return lambda body, number: acts[number] if number < len(acts) else good(body, number)


def asked(teacher):
    return [body["messages"][1]["content"] for body, _, _ in teacher.requests]


# ---- all is well


def test_every_question_becomes_a_record_in_the_order_of_the_input(tasks, capsys):
    with serving(good) as teacher:
        records = generate(teacher, tasks)
    assert [record.record_id for record in records] == [f"task-{index:06d}" for index in range(10)]
    assert {record.metadata["source"] for record in records} == {"teacher_generated"}
    assert "10 accepted, none rejected; 1,500 tokens" in capsys.readouterr().out


def test_the_guides_script_takes_the_same_flags(tasks):
    with serving(good) as teacher:
        script = [sys.executable, str(REPOSITORY / "scripts" / "generate_reasoning_data.py")]
        subprocess.run([*script, *command(teacher, tasks, output="out.jsonl")[2:]], check=True, capture_output=True)
    assert len(read_records(tasks.parent / "out.jsonl", candidates=ROBOTS)) == 10


def test_no_more_are_asked_than_num_samples_needs(tasks):
    with serving(good) as teacher:
        assert len(generate(teacher, tasks, "--num_samples", 4)) == 4
    assert len(teacher.requests) == 4


def test_several_chains_of_a_question_are_different(tasks):
    def script(body, number):
        return Act(content=chain("Drone", conclusion=f"Drone, says {number % 2}."))

    with serving(script) as teacher:
        records = generate(teacher, tasks, "--samples_per_record", 3, "--attempts", 2, "--concurrency", 1)
    assert len({(record.instruction, record.steps) for record in records}) == len(records) <= 20
    assert {row["reason"] for row in lines(tasks.parent / "out.rejected.jsonl")} == {
        "repeated: the question has this chain already"
    }


def test_the_picture_is_sent_to_a_teacher_that_sees(scene_data, records, tmp_path):
    def script(body, number):
        text = body["messages"][1]["content"][1]["text"]
        return Act(content=chain(next(list(r.answer) for r in records if r.instruction == text)))

    data, out = scene_data / "reasoning_data.json", scene_data / "seen.json"
    with serving(script) as teacher:
        main(
            command(
                teacher, data, "--teacher_sees_pictures", "--num_samples", 3, "--concurrency", 1, output="seen.json"
            )
        )
    made = read_records(out, candidates=ROBOTS)
    sent = [body["messages"][1]["content"][0]["image_url"]["url"] for body, _, _ in teacher.requests]
    pictures = {f"data:image/jpeg;base64,{base64.b64encode(Path(r.image).read_bytes()).decode()}" for r in made}
    assert pictures <= set(sent)


def test_the_scenes_facts_are_told_to_a_teacher_that_does_not_see(scene_data, records):
    with serving(good) as teacher, pytest.raises(SystemExit):  # few answers are Drone alone
        main(
            command(
                teacher, scene_data / "reasoning_data.json", "--num_samples", 1, "--attempts", 1, output="told.json"
            )
        )
        raise SystemExit
    scene = records[0].metadata["scene"]
    assert f"place is {scene['place']}; weather is {scene['weather']}" in "".join(asked(teacher))


def test_a_picture_without_facts_needs_a_teacher_that_sees(scene_data, tmp_path):
    data = scene_data / "bare.json"
    data.write_text(json.dumps([{"image": "images/000000.jpg", "question": "Who?", "answer": "Drone"}]))
    with (
        serving(good) as teacher,
        pytest.raises(SystemExit, match=r"record bare\.json:1: has a picture.*--teacher_sees"),
    ):
        generate(teacher, data, output="bare_out.json")
    assert not teacher.requests


# ---- what goes wrong on the way

FAULTS = {
    "429": Act(status=429, headers={"Retry-After": "0.1"}),
    "500": Act(status=500),
    "503": Act(status=503),
    "cut before": Act(cut="before"),
    "cut within": Act(cut="within", content=chain("Drone")),
    "malformed": Act(body=b'{"choices": [{'),
    "not utf-8": Act(body=b"\xff\xfe\x00"),
    "not a completion": Act(body=b'{"error": "overloaded"}'),
    "no choice": Act(body=b'{"choices": []}'),
    "no object": Act(body=b"[]"),
    "silent": Act(delay_s=30),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_asked_again_and_counts_as_no_attempt(tasks, name):
    with serving(first(FAULTS[name])) as teacher:
        records = generate(teacher, tasks, "--attempts", 1, "--request_timeout_s", 1, "--concurrency", 4)
    assert len(records) == 10 and len(teacher.requests) == 11
    assert not lines(tasks.parent / "out.rejected.jsonl")


def test_retry_after_is_honoured(tasks):
    with serving(first(Act(status=429, headers={"Retry-After": "1.5"}))) as teacher:
        generate(teacher, tasks, "--num_samples", 1)
    (_, _, refused), (_, _, again) = teacher.requests
    assert 1.5 <= again - refused < 4


def test_a_question_without_an_answer_is_named_and_the_others_are_kept(tasks):
    def script(body, number):
        return Act(status=400, content="too long") if "roof 3" in body["messages"][1]["content"] else good(body, number)

    with (
        serving(script) as teacher,
        pytest.raises(SystemExit, match=r"record task-000003: has no answer \(400.*too long"),
    ):
        generate(teacher, tasks)
    assert len(read_records(tasks.parent / "out.json", candidates=ROBOTS)) == 9


def test_an_endpoint_that_is_down_stops_the_run(tasks):
    with serving(lambda body, number: Act(status=500)) as teacher:
        with pytest.raises(SystemExit, match="the endpoint failed 8 times in a row"):
            generate(teacher, tasks, "--max_retries", 0, "--concurrency", 2)
    assert len(teacher.requests) <= 9


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_of_everything_stops_at_once(tasks, status):
    with serving(lambda body, number: Act(status=status, content="no such model")) as teacher:
        with pytest.raises(SystemExit, match=f"deepseek-r1: the endpoint refused: {status}.*no such model"):
            generate(teacher, tasks, "--concurrency", 2)
    assert len(teacher.requests) <= 2


def test_fields_that_the_endpoint_does_not_take_are_left_out(tasks, capsys):
    def script(body, number):
        refused = next((name for name in ("response_format", "max_tokens") if name in body), None)
        return Act(status=400, content=f"Unsupported parameter: {refused}") if refused else good(body, number)

    with serving(script) as teacher:
        assert len(generate(teacher, tasks, "--concurrency", 1)) == 10
    assert len(teacher.requests) == 12
    assert teacher.requests[-1][0]["max_completion_tokens"] == 4096
    assert "does not accept response_format" in capsys.readouterr().out


# ---- rejection


def test_a_wrong_answer_is_kept_aside_and_asked_again(tasks):
    with serving(first(Act(content=chain("Humanoid")), Act(content=""))) as teacher:
        records = generate(teacher, tasks, "--concurrency", 1)
    assert len(records) == 10 and len(teacher.requests) == 12
    rejected = lines(tasks.parent / "out.rejected.jsonl")
    assert [row["reason"] for row in rejected] == ["wrong answer: Humanoid instead of Drone", "empty: there is no text"]
    assert rejected[0]["gold_answer"] == ["Drone"] and json.loads(rejected[0]["text"])["answer"] == ["Humanoid"]


def test_a_question_is_given_up_after_its_attempts(tasks, capsys):
    def script(body, number):
        return Act(content=chain("Humanoid" if "roof 3" in body["messages"][1]["content"] else "Drone"))

    with serving(script) as teacher:
        records = generate(teacher, tasks, "--attempts", 2)
        assert len(records) == 9 and len(teacher.requests) == 11
        generate(teacher, tasks, "--attempts", 2)
    assert len(teacher.requests) == 11
    assert "2 rejected, see" in capsys.readouterr().out


def test_nothing_accepted_is_an_error_with_the_reasons(tasks):
    with serving(lambda body, number: Act(content=chain("Humanoid"))) as teacher:
        with pytest.raises(SystemExit, match=r"no answer was accepted; 10 rejected.*wrong answer \(10\)"):
            generate(teacher, tasks, "--attempts", 1)


# ---- budget


def test_the_token_budget_is_not_exceeded_and_the_next_run_goes_on(tasks, capsys):
    with serving(good) as teacher:
        assert len(generate(teacher, tasks, "--max_tokens_total", 700)) == 4  # 150 each
        assert "stopped before the end: --max_tokens_total 700: 600 have been spent" in capsys.readouterr().out
        assert len(generate(teacher, tasks, "--max_tokens_total", 700)) == 4
        assert len(teacher.requests) == 4
        assert len(generate(teacher, tasks)) == 10
    assert len(teacher.requests) == 10


def test_the_cost_is_counted_and_limited(tasks, capsys):
    prices = ("--usd_per_million_input", 1000, "--usd_per_million_output", 2000)  # 20 cents an answer
    with serving(good) as teacher:
        assert len(generate(teacher, tasks, *prices, "--max_usd_total", 0.7)) == 3
    assert "450 tokens, $0.6000" in capsys.readouterr().out


def test_tokens_are_estimated_where_the_server_does_not_count(tasks, capsys):
    with serving(lambda body, number: Act(content=chain("Drone"), usage=None)) as teacher:
        generate(teacher, tasks, "--max_tokens_total", 1000)
    assert "stopped before the end: --max_tokens_total 1,000" in capsys.readouterr().out


# ---- secrets


@pytest.mark.parametrize("fault", [401, 400, 500, 200])
def test_the_key_is_sent_and_shows_up_nowhere(tasks, fault):
    def script(body, number):
        if fault == 200 and number == 0:
            return Act(content=f"Incorrect API key provided: {KEY}", thinking=KEY)
        return Act(status=fault, content=f"Incorrect API key provided: {KEY}") if fault != 200 else good(body, number)

    with serving(script) as teacher:
        found = subprocess.run(
            [sys.executable, "-m", "embervlm.cli", *command(teacher, tasks, "--max_retries", 0)],
            capture_output=True,
            text=True,
            env={**os.environ, "OPENAI_API_KEY": KEY, "PYTHONPATH": str(REPOSITORY)},
            check=False,
        )
    assert teacher.requests[0][1]["authorization"] == f"Bearer {KEY}"
    written = "".join(path.read_text() for path in tasks.parent.iterdir())
    assert KEY not in found.stdout + found.stderr + written
    assert (found.returncode == 0) == (fault == 200) and "Traceback" not in found.stderr
    if fault != 500:
        assert "[key]" in found.stderr + written


def test_a_key_that_cannot_be_sent_is_not_shown_either(tasks, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-with\nbreak")
    with serving(good) as teacher, pytest.raises(SystemExit) as caught:
        generate(teacher, tasks)
    assert "OPENAI_API_KEY: contains characters" in str(caught.value) and "sk-with" not in str(caught.value)


def test_the_key_may_be_in_a_variable_of_another_name(tasks, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_KEY", KEY)
    with serving(good) as teacher:
        generate(teacher, tasks, "--teacher_api_key_env", "DEEPSEEK_KEY", "--num_samples", 1)
    assert teacher.requests[0][1]["authorization"] == f"Bearer {KEY}"


# ---- flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher_base_url", "localhost"], "--teacher_base_url localhost is not an address"),
        (["--teacher_api_key_env", "NO_SUCH"], "NO_SUCH: this environment variable is not set"),
        (["--concurrency", "0"], "--concurrency 0: must be at least 1"),
        (["--max_tokens_total", "0"], "--max_tokens_total 0: must be more than 0"),
        (["--max_usd_total", "1"], "needs --usd_per_million_input"),
        (["--shard", "2/2"], "--shard 2/2: write i/n"),
        (["--output_file", "x.csv"], r"x\.csv: must end in"),
        (["--input_dataset", "nowhere.json"], "nowhere.json: No such file"),
        (["--num_samples", "0"], "--num_samples 0"),
    ],
)
def test_a_flag_that_cannot_be_is_named_before_anything_is_asked(tasks, flags, words):
    with serving(good) as teacher:
        with pytest.raises(SystemExit, match=words):
            generate(teacher, tasks, *flags)
        assert not teacher.requests


def test_without_questions_the_command_says_where_to_get_them(tmp_path):
    with pytest.raises(SystemExit, match="--teacher_model gpt: needs questions"):
        main(
            [
                "data",
                "generate",
                "--teacher_model",
                "gpt",
                "--teacher_base_url",
                "http://localhost:1/v1",
                "--output_file",
                str(tmp_path / "out.json"),
            ]
        )


def test_a_store_of_another_teacher_is_not_continued(tasks):
    with serving(good) as teacher:
        generate(teacher, tasks, "--num_samples", 2)
        with pytest.raises(SystemExit, match="started with --teacher_model deepseek-r1, not other"):
            generate(teacher, tasks, "--teacher_model", "other")


# ---- kills


def survive(folder, *, num_questions, kills, seed):
    """Kill the command at random moments, let it end, and return the requests that were asked more than once."""
    tasks, rng = write_tasks(folder, num_questions), random.Random(seed)
    faulty = random.Random(seed + 1)

    def script(body, number):
        if faulty.random() < 0.05:
            return faulty.choice([Act(status=500), Act(cut="within", content="x"), Act(body=b"{")])
        robot = "Humanoid" if faulty.random() < 0.05 else "Drone"
        return Act(content=chain(robot), delay_s=faulty.uniform(0.0, 0.1))

    with serving(script) as teacher:
        line = [sys.executable, "-m", "embervlm.cli", *command(teacher, tasks, "--concurrency", 8, "--attempts", 9)]
        options = {"cwd": REPOSITORY, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for _ in range(kills):
            before, process = len(teacher.requests), subprocess.Popen(line, **options)
            while len(teacher.requests) == before and process.poll() is None:  # its start is not the interesting part
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run(line, check=True, **options)
        requests = len(teacher.requests)
        subprocess.run(line, check=True, **options)
        assert len(teacher.requests) == requests, "a finished run asks nothing"
    return tasks, requests


def check_survival(tasks, requests, *, num_questions, kills):
    records = read_records(tasks.parent / "out.json", candidates=ROBOTS)
    assert [record.record_id for record in records] == [f"task-{index:06d}" for index in range(num_questions)]
    kept = lines(tasks.parent / "out.accepted.jsonl")
    assert len({row["key"] for row in kept}) == len(kept) == num_questions
    rejected = len(lines(tasks.parent / "out.rejected.jsonl"))
    faults = requests // 8  # 5% are faults; what is beyond is asked again because of a kill
    assert requests <= num_questions + rejected + faults + 10 * kills  # a concurrency of 8 has 10 workers


@pytest.mark.slow
def test_kills_lose_and_double_no_record(tmp_path):
    check_survival(*survive(tmp_path, num_questions=60, kills=3, seed=0), num_questions=60, kills=3)


@pytest.mark.slow
def test_twenty_kills_lose_and_double_no_record(tmp_path):
    check_survival(*survive(tmp_path, num_questions=600, kills=20, seed=5), num_questions=600, kills=20)


def test_a_stop_by_signal_waits_for_the_answers_in_flight(tasks):
    with serving(lambda body, number: Act(content=chain("Drone"), delay_s=0.5)) as teacher:
        process = subprocess.Popen(
            [sys.executable, "-m", "embervlm.cli", *command(teacher, tasks, "--concurrency", 2)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        while not teacher.requests:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()[0]
    assert "stopped before the end: SIGTERM" in printed
    assert len(read_records(tasks.parent / "out.json", candidates=ROBOTS)) == len(teacher.requests) <= 3


# ---- shards


def test_shards_share_the_work_and_merge_into_the_whole(tasks, tmp_path, capsys):
    with serving(good) as teacher:
        for index in range(3):
            generate(teacher, tasks, "--shard", f"{index}/3", output=f"part{index}.json")
    assert len(teacher.requests) == 10 == len(set(asked(teacher)))
    parts = [str(tmp_path / f"part{index}.json") for index in range(3)]
    main(["data", "merge", *parts, parts[0], "--output_file", str(tmp_path / "all.jsonl")])
    assert "10 records from 4 files, 4 duplicates left out" in capsys.readouterr().out
    assert len({record.record_id for record in read_records(tmp_path / "all.jsonl", candidates=ROBOTS)}) == 10


def test_two_shards_cannot_share_an_output_file(tasks):
    with serving(good) as teacher:
        generate(teacher, tasks, "--shard", "0/2")
        with pytest.raises(SystemExit, match="started with --shard 0/2, not 1/2"):
            generate(teacher, tasks, "--shard", "1/2")


def test_the_shards_of_the_rules_are_the_whole_job(tmp_path):
    flags = ["data", "generate", "--num_samples", "7", "--questions_per_picture", "2", "--workers", "1"]
    main([*flags, "--output_file", str(tmp_path / "whole.json")])
    for index in range(2):
        main([*flags, "--shard", f"{index}/2", "--output_file", str(tmp_path / f"{index}.json")])
    main(
        ["data", "merge", *(str(tmp_path / f"{i}.json") for i in range(2)), "--output_file", str(tmp_path / "all.json")]
    )
    whole = {record.record_id: record for record in read_records(tmp_path / "whole.json", candidates=ROBOTS)}
    assert whole == {record.record_id: record for record in read_records(tmp_path / "all.json", candidates=ROBOTS)}


def test_records_that_differ_under_one_id_are_not_merged(tmp_path):
    for name, robot in (("a", "Drone"), ("b", "Humanoid")):
        value = [{"id": 1, "question": "Who?", "reasoning": ["x"], "answer": robot}]
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(SystemExit, match=r"b\.json record 1: id: another record has it"):
        main(
            [
                "data",
                "merge",
                str(tmp_path / "a.json"),
                str(tmp_path / "b.json"),
                "--output_file",
                str(tmp_path / "c.json"),
            ]
        )


def test_pictures_that_the_merged_file_cannot_name_are_an_error(scene_data, tmp_path):
    with pytest.raises(SystemExit, match="write the output file to a folder that contains all pictures"):
        main(["data", "merge", str(scene_data / "reasoning_data.json"), "--output_file", str(tmp_path / "all.json")])


# ---- people


def test_annotations_of_people_become_unified_records(tmp_path):
    (tmp_path / "human.json").write_text(
        json.dumps(
            [
                {
                    "question": "What robot combination works best?",
                    "answer": ["Drone", "Humanoid"],
                    "annotator_id": "expert_123",
                    "reasoning_steps": [
                        "First, identify the task requirements...",
                        "Second, analyze the environment...",
                    ],
                }
            ]
        )
    )
    main(
        [
            "data",
            "generate",
            "--source",
            "human",
            "--input_dataset",
            str(tmp_path / "human.json"),
            "--output_file",
            str(tmp_path / "out.json"),
        ]
    )
    (value,) = json.loads((tmp_path / "out.json").read_text())
    assert value["reasoning"].startswith("<|reasoning_start|>\nStep 1: First, identify")
    assert value["answer"] == ["Drone", "Humanoid"]
    assert value["metadata"] == {"annotator_id": "expert_123", "source": "human_annotated", "num_steps": 2}


# ---- rate


def test_no_more_requests_are_in_flight_than_concurrency_and_a_pause_is_none(tmp_path):
    def script(body, number):
        refused = Act(status=429, headers={"Retry-After": "3"})
        return refused if number < 2 else Act(content=chain("Drone"), delay_s=0.2)

    tasks = write_tasks(tmp_path, 40)
    with serving(script) as teacher:
        generate(teacher, tasks, "--concurrency", 8)
    assert max(teacher.in_flight) == 8
    questions = asked(teacher)
    first_again = min(questions.index(questions[refused], 2) for refused in range(2))
    assert max(teacher.in_flight[:first_again]) == 8, "two pause, and eight are asked"


@pytest.mark.slow
@pytest.mark.timed
def test_64_requests_in_flight_come_near_the_ideal_rate(tmp_path):
    for attempt in range(3):  # others on the machine may take its processors for a while
        (tmp_path / str(attempt)).mkdir()
        share = measure(tmp_path / str(attempt), num_questions=6400, concurrency=64, delay_s=0.2, fault_rate=0.05)
        if share >= 0.8:
            return
    pytest.fail(f"{share:.1%} of the ideal rate at the third attempt")
