"""What a chain is rewarded for, and rewards of a user's own that do not work."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from embervlm.config_policy import RewardConfig
from embervlm.data.records import ReasoningRecord
from embervlm.judge.rewards import answer_reward, form_reward, gaming_fault, length_reward, rewards_of
from embervlm.training import reward_worker
from embervlm.training.rewards import RewardError, RewardWorker
from embervlm.words.chain_text import parse_answer

ROBOTS = ("Drone", "Humanoid", "Robot with Wheels")


def record_of(answer: tuple[str, ...] = ("Drone",), candidates: tuple[str, ...] = ROBOTS) -> ReasoningRecord:
    return ReasoningRecord(
        record_id="r",
        image=None,
        instruction="Which robot?",
        steps=(),
        answer=answer,
        metadata={"candidates": list(candidates)},
    )


def chain_of(text: str = "Drone", steps: tuple[str, ...] | None = None, **more: Any) -> dict[str, Any]:
    candidates = more.pop("candidates", ROBOTS)
    steps = ("The place is cliff.", "So Drone is suited.", f"Conclusion: {text}.") if steps is None else steps
    answer = parse_answer(text, candidates) if candidates else (text,) if text else ()
    return {
        "reasoning_steps": list(steps),
        "answer_set": list(answer),
        "text": text,
        "num_tokens": 40,
        "cut_off": None,
        **more,
    }


def test_the_right_answer_behind_reasons_is_rewarded() -> None:
    assert answer_reward(record_of(), chain_of()) == 1
    assert answer_reward(record_of(), chain_of("Humanoid")) == 0
    both = record_of(("Drone", "Humanoid"))
    assert answer_reward(both, chain_of("Drone, Humanoid")) == answer_reward(both, chain_of("Humanoid, Drone")) == 1
    assert answer_reward(both, chain_of("Drone")) == 0


@pytest.mark.parametrize(
    ("chain", "fault"),
    [
        (chain_of("Drone, Drone"), "once and alone"),
        (chain_of("Drone or whatever else there is"), "once and alone"),
        (chain_of(steps=("Conclusion: Drone.",)), "no reasons"),
        (chain_of(steps=()), "no reasons"),
        (chain_of(steps=("The answer is Drone.", "The place is cliff.", "Conclusion: Drone.")), "before its reasons"),
        (chain_of(steps=("Drone.", "The place is cliff.", "Conclusion: Drone.")), "first step is the answer"),
        (chain_of(steps=("The place is cliff.", "Conclusion: Drone and Humanoid.")), "names Drone, Humanoid"),
        (chain_of(steps=("The place is cliff.", "Conclusion: Humanoid.")), "names Humanoid"),
    ],
)
def test_a_gamed_answer_earns_nothing(chain: dict[str, Any], fault: str) -> None:
    assert fault in gaming_fault(record_of(), chain)
    assert answer_reward(record_of(), chain) == 0


def test_naming_all_answers_earns_nothing() -> None:
    assert answer_reward(record_of(), chain_of(", ".join(ROBOTS))) == 0


def test_an_open_answer_is_compared_as_in_an_evaluation() -> None:
    record = record_of(("3",), ())
    steps = ("There are two cubes and a ball.", "Conclusion: three.")
    assert answer_reward(record, chain_of("three", steps, candidates=())) == 1
    assert answer_reward(record, chain_of("3, 3", steps, candidates=())) == 0
    assert answer_reward(record, chain_of("2 or 3 or 4", steps, candidates=())) == 0
    assert answer_reward(record, chain_of("3", ("3.", "Conclusion: three."), candidates=())) == 0


def test_form_wants_steps_and_an_answer_that_ended_by_itself() -> None:
    assert form_reward(chain_of()) == 1
    assert form_reward(chain_of(cut_off="tokens")) == form_reward(chain_of(steps=())) == form_reward(chain_of("")) == 0


def test_length_costs_from_three_quarters_of_the_most_tokens_on() -> None:
    found = [length_reward({"num_tokens": number}, 100) for number in (10, 75, 87.5, 100, 120)]
    assert found == [0, 0, -0.5, -1, -1]


def test_soundness_is_the_share_of_steps_without_a_fault() -> None:
    facts = {"place": "cliff", "weather": "rain"}
    record = ReasoningRecord(
        record_id="r", image=None, instruction="Which?", steps=(), answer=("Drone",), metadata={"facts": facts}
    )
    domains = {"place": frozenset(("cliff", "lake")), "weather": frozenset(("rain", "clear"))}
    steps = ("The place is cliff.", "The weather is clear.", "The place is cliff.", "The weather is rain.")
    chain = chain_of("Drone", steps)
    found = rewards_of([record], [chain], ("soundness",), domains=domains, most_tokens=100)
    assert found["soundness"][0] == pytest.approx(0.5)  # the second contradicts the facts, the third repeats


def test_without_facts_what_a_step_reads_off_the_picture_is_not_held_against_it() -> None:
    steps = ("The place is cliff, weather is fog.", "Ground is crowded: Drone is suited.", "Conclusion: Drone.")
    domains = {"place": frozenset(("cliff", "lake")), "weather": frozenset(("fog", "clear"))}
    chains = [chain_of("Drone", steps), chain_of("Drone", (*steps[:1], "The place is lake.", steps[0]))]
    found = rewards_of([record_of()] * 2, chains, ("soundness",), domains=domains, most_tokens=100)
    assert found["soundness"] == pytest.approx([1.0, 1 / 3])


# -- a user's own ----------------------------------------------------------------------------------------------------

MODULE = """
import time
def short(records, chains):
    print("a function may print")
    return [1.0 - chain["num_tokens"] / 100 + len(record["instruction"]) * 0 for record, chain in zip(records, chains)]
def raises(records, chains): raise KeyError("colour")
def not_a_number(records, chains): return [float("nan")] * len(chains)
def too_few(records, chains): return [1.0]
def hangs(records, chains): time.sleep(60)
def dies(records, chains): __import__("os")._exit(7)
"""


@pytest.fixture(scope="module")
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_rewards_of_a_test.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield "own_rewards_of_a_test"
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("raises", "raised KeyError: 'colour' (own_rewards_of_a_test.py line 6)"),
        ("not_a_number", "returned nan"),
        ("too_few", "returned 1 numbers for 4 chains"),
        ("hangs", "no result for 4 chains after"),
        ("dies", "ended with status 7"),
    ],
)
def test_a_reward_that_does_not_work_is_found_before_training_and_named(
    own_module: str, function: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embervlm.training.rewards.START_S", 3.0 if function == "hangs" else 60.0)
    name = f"{own_module}:{function}"
    with RewardWorker(RewardConfig(own={name: 1.0}, timeout_s=0.2), {}, 100) as worker:
        with pytest.raises(RewardError) as caught:
            worker.check([record_of(), record_of()])
    assert told in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(("values", "told"), [(["good"], "returned 'good' among"), (1.0, "returned float, not a list")])
def test_what_is_no_list_of_numbers_is_named(values: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        reward_worker.plain(values)


@pytest.mark.parametrize(
    ("name", "told"), [("no_such_module:f", "no_such_module cannot be imported"), ("json:f", "has no function f")]
)
def test_a_function_that_is_not_there_is_named(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        reward_worker.load(name)


def test_parts_are_computed_apart_and_summed_by_weight(own_module: str) -> None:
    name = f"{own_module}:short"
    config = RewardConfig(answer=2.0, form=0.5, soundness=0.0, own={name: 0.1})
    with RewardWorker(config, {}, 100) as worker:
        worker.check([record_of()])
        worker.begin([record_of(), record_of()], [chain_of(), chain_of("Humanoid", num_tokens=90)])
        found = worker.result()
    assert found == {"answer": [1, 0], "form": [1, 1], name: pytest.approx([0.6, 0.1])}
    assert worker.total(found) == pytest.approx([2.56, 0.51]) and all(map(math.isfinite, worker.total(found)))
