"""`--max_minutes`: the stages that a command trains share its time."""

from __future__ import annotations

import pytest

from embervlm.config import ConfigError, TrainConfig
from embervlm.run.train_flags import load_config, parser


def minutes(*flags: str) -> dict[str, float | None]:
    config: TrainConfig = load_config(parser().parse_args(["--config", "configs/own_data.yaml", *flags]))
    stage = config.stage4
    settings = {"stage3": config.stage3, "phase1": stage.phase1, "phase2": stage.phase2}
    return {name: phase.max_minutes for name, phase in settings.items() if phase.max_minutes is not None}


@pytest.mark.parametrize(
    ("flags", "shares"),
    [
        (("--stages", "3", "4"), {"stage3": 84, "phase1": 14, "phase2": 42}),
        (("--stages", "4"), {"phase1": 35, "phase2": 105}),
        (("--stages", "4", "--phase", "2"), {"phase2": 140}),
        (("--stages", "3"), {"stage3": 140}),
        (("--stages", "3", "4", "--phase", "1"), {"stage3": 120, "phase1": 20}),
        (("--stages", "4", "baseline"), {"phase1": 35, "phase2": 105}),
    ],
)
def test_the_stages_of_a_command_share_its_time(flags: tuple[str, ...], shares: dict[str, float]) -> None:
    assert minutes("--max_minutes", "140", *flags) == pytest.approx(shares)
    assert minutes(*flags) == {}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", "baseline"), "this command trains none of them"),
        (("--stages", "4", "--phase", "3"), "this command trains none of them"),
        (("--set", "stage4.phase2.max_minutes=3"), "for the whole run and for phase2"),
    ],
)
def test_a_time_that_would_do_nothing_or_is_given_twice_is_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        minutes("--max_minutes", "140", *flags)


@pytest.mark.parametrize("value", ["0", "-3"])
def test_a_time_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="max_minutes"):
        minutes(f"--max_minutes={value}")
