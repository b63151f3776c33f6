"""Where a run's numbers go: by W&B's own rules, and what happens when its server does not answer."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb
from wandb_file import history

from embervlm.training.tracking import Tracker, log_evaluation, log_figures


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_run_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()  # what an earlier test started would keep that one's settings
    tracker = Tracker(tmp_path, active=True, name="phase 2", first_step=0, total_steps=1, project="embervlm")
    tracker.advance(1, {"loss": {"total": 1.5}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1})
    tracker.close()
    (line,) = history(tmp_path)
    assert line["loss/total"] == 1.5
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert str(tracker.wandb_run_id) in said and f"`wandb sync` in {tmp_path} to send" in said


@pytest.mark.slow
def test_whatever_wandb_raises_costs_the_curves_there_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    tracker = Tracker(tmp_path, active=True, name="phase 2", first_step=0, total_steps=2, project="embervlm")
    wandb.finish()  # a run that has ended takes nothing more: its log() raises
    values = {"loss": {"total": 1.5}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1}
    for step in (1, 2):
        tracker.advance(step, values)
    tracker.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    (said,) = [record.getMessage() for record in caplog.records if "W&B" in record.getMessage()]
    assert "Nothing more is sent there; training continues" in said


KEY = "k" * 40


class Server(ThreadingHTTPServer):
    """A W&B that answers nothing sensible and keeps who came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.authorizations: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        self.server.authorizations.append(self.headers.get("Authorization"))
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """W&B's server of this test, in a home without a key."""
    found = Server()
    threading.Thread(target=found.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{found.server_address[1]}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()
    yield found
    wandb.teardown()
    found.shutdown()


def track(folder: Path) -> None:
    tracker = Tracker(folder, active=True, name="phase 2", first_step=0, total_steps=1, project="embervlm")
    tracker.advance(1, {"loss": {"total": 1.5}, "learning_rate": {"all": 0.1}, "samples_per_s": 1.0, "epoch": 1})
    tracker.close()


@pytest.mark.slow
def test_wandb_mode_disabled_keeps_nothing_and_talks_to_nobody(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    track(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"] and not server.authorizations
    (tmp_path / "run" / "wandb_run_id").write_text("known")
    log_evaluation(tmp_path / "run", {"split": "val", "metrics": {}, "checkpoint": "x"}, {}, project="embervlm")
    assert not log_figures(tmp_path / "run", {"figure": tmp_path / "none.png"}, project="embervlm")
    assert not (tmp_path / "run" / "wandb").exists() and not server.authorizations


@pytest.mark.slow
@pytest.mark.parametrize("mode", [None, "offline", "online"])
def test_without_a_key_a_run_is_kept_offline_whatever_was_asked_for(
    mode: str | None, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    track(tmp_path)
    (line,) = history(tmp_path)
    assert line["loss/total"] == 1.5 and not server.authorizations
    assert ("WANDB_MODE=online, but no key was found" in caplog.text) == (mode == "online")


@pytest.mark.slow
def test_the_key_that_wandb_login_leaves_is_used(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = f"127.0.0.1:{server.server_address[1]}"
    (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    track(tmp_path)
    wanted = "Basic " + base64.b64encode(f"api:{KEY}".encode()).decode()
    assert set(server.authorizations) - {None} == {wanted}
    (line,) = history(tmp_path)  # the server does not take it, so the run is kept
    assert line["loss/total"] == 1.5 and "is kept offline" in caplog.text


@pytest.mark.slow
def test_a_key_that_is_none_costs_no_run(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    track(tmp_path)
    (line,) = history(tmp_path)
    assert line["loss/total"] == 1.5 and "the run is kept offline" in caplog.text
