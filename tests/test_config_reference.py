"""docs/configuration.md says what every key of the YAML files means, and is not stale."""

import dataclasses
import re

from embervlm.config import REPOSITORY, TrainConfig
from embervlm.run.config_reference import reference

WRITTEN = REPOSITORY / "docs" / "configuration.md"


def test_the_reference_is_the_one_that_the_dataclasses_make():
    assert WRITTEN.read_text(encoding="utf-8") == reference(), (
        "stale: `embervlm describe --config_reference > docs/configuration.md` writes it anew"
    )


def test_every_key_has_a_meaning():
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    assert not [key for key, _, _, meaning in rows if not meaning.strip()]


def test_every_setting_of_a_run_is_there():
    text = reference()
    for field in dataclasses.fields(TrainConfig):
        assert f"| `{field.name}` |" in text
    assert "### `stage4.phase2.lora.<component>`" in text and "### `curriculum.stage2`" in text
