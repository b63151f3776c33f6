"""The test bed examples/babyai.py, where `minigrid` is installed; its pygame is too large for everybody's tests."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_helpers import REPOSITORY

from embervlm.curate.findings import CheckOptions
from embervlm.curate.validate import validate
from embervlm.robots.domain import NO_DOMAIN

pytest.importorskip("minigrid", reason="needs BabyAI: pip install minigrid")


@pytest.fixture(scope="module")
def babyai() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(REPOSITORY / "examples" / "babyai.py")))


@pytest.fixture(scope="module")
def made(babyai: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("babyai") / "records.jsonl"
    babyai.main("records", str(path), "--episodes", "10", "--levels", "GoToLocal", "PickupDist", "--per_episode", "99")
    return path


def test_the_simulator_rewards_what_brings_the_mission_nearer(babyai: SimpleNamespace, made: Path) -> None:
    values = [json.loads(line) for line in made.read_text().splitlines()][:40]
    good = [babyai.good_actions(value["id"]) for value in values]
    assert all(value["answer"] in actions for value, actions in zip(values, good)), "the bot gets nearer"
    assert all(len(actions) < 4 for actions in good) and any(len(actions) > 1 for actions in good)
    chains = [{"answer": "turn left"}, {"answer": ""}]
    found = babyai.nearer(values[:2], chains)
    assert found == [float("turn left" in good[0]), 0.0]


def test_records_train_and_no_room_is_in_two_splits(made: Path) -> None:
    report = validate(made, CheckOptions(unpack_dir=None, domain=NO_DOMAIN))
    assert report["trains"] and all(report["splits"].values())
    values = [json.loads(line) for line in made.read_text().splitlines()]
    assert {value["answer"] for value in values} == {"turn left", "turn right", "go forward", "pick up"}
    seeds = {
        split: {v["id"].split("-")[1] for v in values if v["metadata"]["split"] == split} for split in report["splits"]
    }
    assert not seeds["train"] & seeds["test"] and not seeds["train"] & seeds["val"]


def test_who_answers_as_the_records_say_fulfils_every_mission(babyai: SimpleNamespace) -> None:
    seeds = [seed for seed in range(12) if babyai.episode("GoToLocal", seed) is not None]
    moments = [moment for seed in seeds for moment in babyai.episode("GoToLocal", seed)]
    known = {(moment.frame.tobytes(), moment.mission): moment.action for moment in moments}

    def ask(frames, missions):
        return [known[frame.tobytes(), mission] for frame, mission in zip(frames, missions)]

    assert len(seeds) > 8 and all(babyai.play(ask, "GoToLocal", seeds))
    assert not any(babyai.play(lambda frames, _: ["turn left"] * len(frames), "PickupDist", seeds))
    assert not any(babyai.play(lambda frames, _: ["sit down"] * len(frames), "GoToLocal", seeds))


def test_steps_say_what_the_room_is_like(babyai: SimpleNamespace) -> None:
    """By hand: the agent in column 2, row 3 looks up; a key is 3 to the right and 1 up, a ball is on its right."""
    from minigrid.core.world_object import Ball, Key

    env = babyai.room("GoToObj", 0)
    for x in range(1, 7):
        for y in range(1, 7):
            env.grid.set(x, y, None)
    env.grid.set(5, 2, Key("blue"))
    env.grid.set(3, 3, Ball("red"))
    env.agent_pos, env.agent_dir = (2, 3), 3
    steps = babyai.chain(env, babyai.np.array([5, 2]), babyai.np.array([2, 2]), "go forward")
    assert steps == [
        "Step 1: I am in column 2, row 3, and look up.",
        "Step 2: The blue key is in column 5, row 2.",
        "Step 3: Next to me, ahead: free, left: free, right: red ball.",
        "Step 4: From me it is 3 to the right and 1 up.",
        "Step 5: Looking up, that is 1 ahead and 3 right.",
        "Step 6: The shortest free way starts ahead.",
        "Conclusion: go forward.",
    ]
