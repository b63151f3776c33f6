"""Learning rate and teacher forcing against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from embervlm.config import ScheduledSamplingConfig
from embervlm.training.schedule import learning_rate_factor, teacher_forcing_ratio, timed_learning_rate_factor

GUIDE = ScheduledSamplingConfig()


def test_warmup_rises_in_equal_parts_to_the_peak() -> None:
    found = [learning_rate_factor(step, 100, 4, 0.1) for step in range(5)]
    assert found == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0])


def test_the_first_step_has_a_rate_above_zero() -> None:
    assert learning_rate_factor(0, 5000, 500, 0.1) == pytest.approx(1 / 501)


def test_the_rate_stands_at_its_peak_when_warmup_ends() -> None:
    assert learning_rate_factor(500, 5000, 500, 0.1) == 1.0


def test_the_rate_is_half_way_down_in_the_middle_of_the_decay() -> None:
    assert learning_rate_factor(60, 100, 20, 0.1) == pytest.approx(0.1 + 0.9 / 2)


def test_a_quarter_of_the_decay_is_the_cosine_of_an_eighth_turn() -> None:
    assert learning_rate_factor(40, 100, 20, 0.0) == pytest.approx((1 + math.sqrt(0.5)) / 2)


def test_the_rate_ends_at_the_final_ratio_and_stays_there() -> None:
    assert learning_rate_factor(100, 100, 20, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(140, 100, 20, 0.1) == pytest.approx(0.1)


def test_the_rate_never_rises_after_warmup() -> None:
    found = [learning_rate_factor(step, 57, 9, 0.1) for step in range(9, 58)]
    assert found == sorted(found, reverse=True)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, 100, 0, 0.1) == 1.0


@pytest.mark.parametrize("warmup", [26, 99, 100, 500])
def test_no_warmup_takes_more_than_a_quarter_of_the_run(warmup: int) -> None:
    found = [learning_rate_factor(step, 100, warmup, 0.1) for step in range(101)]
    assert found == [learning_rate_factor(step, 100, 25, 0.1) for step in range(101)]
    assert max(found) == 1.0 and found[-1] == pytest.approx(0.1)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    assert learning_rate_factor(0, 1, 500, 0.1) > 0.5


def test_all_inputs_are_gold_in_the_first_epoch() -> None:
    assert teacher_forcing_ratio(0, 5, GUIDE) == 1.0


def test_half_the_inputs_are_gold_in_the_last_epoch() -> None:
    """The guide's words; its formula would give 0.6 here (counting from 0) or 0.9 in the first (from 1)."""
    assert teacher_forcing_ratio(4, 5, GUIDE) == 0.5


def test_teacher_forcing_falls_in_equal_parts_in_between() -> None:
    found = [teacher_forcing_ratio(epoch, 5, GUIDE) for epoch in range(5)]
    assert found == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5])


def test_teacher_forcing_stays_at_its_end_beyond_the_last_epoch() -> None:
    assert teacher_forcing_ratio(9, 5, GUIDE) == 0.5


def test_a_phase_of_one_epoch_keeps_the_first_epochs_value() -> None:
    assert teacher_forcing_ratio(0, 1, GUIDE) == 1.0


def test_disabled_scheduled_sampling_is_gold_throughout() -> None:
    off = ScheduledSamplingConfig(enabled=False, initial_teacher_forcing=0.7)
    assert [teacher_forcing_ratio(epoch, 3, off) for epoch in range(3)] == [1.0, 1.0, 1.0]


def test_the_configured_ends_are_used() -> None:
    config = ScheduledSamplingConfig(initial_teacher_forcing=0.8, final_teacher_forcing=0.2)
    assert [teacher_forcing_ratio(epoch, 3, config) for epoch in range(3)] == pytest.approx([0.8, 0.5, 0.2])


def test_a_run_that_the_clock_ends_warms_up_by_steps_and_comes_down_with_the_time() -> None:
    assert [timed_learning_rate_factor(step, 4, 0.0, 0.1) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert timed_learning_rate_factor(10**6, 4, 0.5, 0.1) == pytest.approx(0.55)
    assert timed_learning_rate_factor(10**6, 4, 1.0, 0.1) == pytest.approx(0.1)


def test_a_warmup_that_the_time_does_not_allow_ends_after_a_quarter_of_it() -> None:
    assert timed_learning_rate_factor(50, 500, 0.125, 0.1) == pytest.approx(0.5)
    assert timed_learning_rate_factor(100, 500, 0.25, 0.1) > 0.8
