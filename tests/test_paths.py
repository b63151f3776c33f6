"""Paths with `~` and `$SCRATCH` in a YAML and behind flags."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from embervlm.cli import main as embervlm
from embervlm.config import ConfigError, TrainConfig
from embervlm.config_file import load_train_config, model_preset
from embervlm.paths import PathError, expanded
from embervlm.run.train import main
from embervlm.run.train_flags import load_config, parser
from embervlm.select_best import main as select_best

SETTINGS = ("output_dir", "reasoning_data", "image_root", "resume_from", "deepspeed_config", "model", "eval_cluster")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("WORK_DIR", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "home/x"),
        ("$SCRATCH/x", "scratch/x"),
        ("${SCRATCH}/a/{000..009}.tar", "scratch/a/{000..009}.tar"),
        ("$SCRATCH", "scratch"),
        ("~", "home"),
    ],
)
def test_home_and_variables_are_filled_in(written: str, meant: str, home: Path) -> None:
    assert expanded(written) == str(home / meant)


@pytest.mark.parametrize("plain", ["outputs", "a~b/c", "./~/x", "shards/*.tar", "data/{a,b}.json", "5$", ""])
def test_what_holds_none_stays_as_it_is(plain: str) -> None:
    assert expanded(plain) == plain


@pytest.mark.parametrize("written", ["$WORK_DIR/x", "~nobody-of-this-name/x", "$SCRATCH/${WORK_DIR}/x"])
def test_what_cannot_be_filled_in_is_an_error_that_names_it(written: str) -> None:
    with pytest.raises(PathError, match=r"WORK_DIR is not set|~nobody-of-this-name is not the home of any user"):
        expanded(written)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_path_of_a_run_is_filled_in_from_the_yaml_and_from_its_flag(name: str, home: Path) -> None:
    (home / "scratch").mkdir()
    (home / "scratch" / "run.yaml").write_text(yaml.safe_dump({name: "$SCRATCH/it.yaml"}))
    assert getattr(load_train_config(home / "scratch" / "run.yaml"), name) == str(home / "scratch" / "it.yaml")
    args = parser().parse_args([f"--{name}=~/it.yaml", "--config", "$SCRATCH/run.yaml"])
    assert getattr(load_config(args), name) == str(home / "home" / "it.yaml")
    with pytest.raises(ConfigError, match=rf"--{name} \$WORK_DIR/x: {name}: \$WORK_DIR/x: \$WORK_DIR is not set"):
        load_config(parser().parse_args([f"--{name}=$WORK_DIR/x"]))


def test_no_path_of_a_run_is_forgotten() -> None:
    """Text settings of a run that are no paths; a new one belongs here or among the paths."""
    other = {"domain", "resume", "engine", "precision", "on_save_error", "wandb_project", "wandb_run_name"}
    texts = {name for name, kind in TrainConfig.__annotations__.items() if kind.startswith("str")}
    assert texts - other == set(SETTINGS)


def test_a_presets_folder_of_weights_is_filled_in(home: Path) -> None:
    preset = {"vision": {"name_or_path": "~/vit"}, "language": {"name_or_path": "$SCRATCH/gpt"}}
    (home / "own.yaml").write_text(yaml.safe_dump(preset))
    found = model_preset(str(home / "own.yaml"))
    assert found["vision"]["name_or_path"] == str(home / "home" / "vit")
    assert found["language"]["name_or_path"] == str(home / "scratch" / "gpt")


def test_paths_of_other_commands_are_filled_in(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embervlm(["data", "generate", "--teacher_model", "rules", "--output_file=$SCRATCH/made.json", "--num_samples", "2"])
    assert (home / "scratch" / "made.json").exists()
    for call, where in (
        (lambda: select_best(["--checkpoints_dir=~/none"]), str(home / "home" / "none")),
        (lambda: main(["--config=~/none.yaml"]), str(home / "home" / "none.yaml")),
    ):
        with pytest.raises(SystemExit) as ended:
            call()
        assert where in str(ended.value.code)
    with pytest.raises(SystemExit):
        embervlm(["evaluate", "--checkpoint=$WORK_DIR/x", "--output_file", "y"])
    assert "argument --checkpoint: $WORK_DIR/x: $WORK_DIR is not set" in capsys.readouterr().err
