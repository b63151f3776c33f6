"""How near the teacher client comes to the ideal rate: `python tests/measure_endpoint.py`.

The server runs in a process of its own, answers in 200 ms and misbehaves 5 times in 100. Ideal is concurrency / 200 ms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from embervlm.data.records import read_records  # noqa: E402
from embervlm.robots.domain import ROBOTS as ROBOTS_DOMAIN  # noqa: E402
from embervlm.robots.rules import ROBOT_ORDER as ROBOTS  # noqa: E402


def measure(folder: Path, *, num_questions: int, concurrency: int, delay_s: float, fault_rate: float) -> float:
    """Share of the ideal rate, the start of the command left out; in [0, 1]."""
    questions = folder / "questions.json"
    tasks = [{"input": f"Task: film roof {number}", "output": "Drone"} for number in range(num_questions)]
    questions.write_text(json.dumps(tasks))
    server = subprocess.Popen(
        [sys.executable, str(HERE / "scripted_teacher.py"), "--delay_s", str(delay_s), "--fault_rate", str(fault_rate)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        from embervlm.curate.commands import generate_by_teacher
        from embervlm.curate.teachers.endpoint import EndpointConfig

        config = EndpointConfig(teacher_model="scripted", base_url=url, concurrency=concurrency)
        import openai  # noqa: F401  # its import takes longer than many answers

        start, start_cpu = time.monotonic(), time.process_time()
        generate_by_teacher(
            config,
            input_dataset=questions,
            output_file=folder / "out.jsonl",
            num_samples=num_questions,
            domain=ROBOTS_DOMAIN,
        )
        seconds, cpu_s = time.monotonic() - start, time.process_time() - start_cpu
    finally:
        server.terminate()
        server.wait()
    assert len({record.record_id for record in read_records(folder / "out.jsonl", candidates=ROBOTS)}) == num_questions
    rate, ideal = num_questions / seconds, concurrency / delay_s
    print(
        f"{num_questions} answers in {seconds:.1f} s: {rate:.0f} a second, {rate / ideal:.1%} of {ideal:.0f}; "
        f"{1000 * cpu_s / num_questions:.2f} ms of CPU for each"
    )
    return rate / ideal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_questions", type=int, default=6400)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--delay_s", type=float, default=0.2)
    parser.add_argument("--fault_rate", type=float, default=0.05)
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), **vars(parser.parse_args()))
