"""Node recipes of `configs/cluster/`: what a job asks Slurm for, and how it trains there.

Every shipped recipe has the same global batch, so a run can move from one to another.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embervlm.config import REPOSITORY, ConfigError
from embervlm.config_file import from_mapping, read_yaml

RECIPES = REPOSITORY / "configs" / "cluster"
CLUSTER_VARIABLE = "EMBERVLM_CLUSTER"
"""Environment variable that is used if `--cluster` is not given."""
GPU_OPTIONS_VARIABLE = "EMBERVLM_SBATCH_GPU"
"""How this site asks for GPUs; see `slurm/site.env`."""
GPU_OPTIONS = "--gres=gpu:{count} --constraint={type}"


@dataclass(frozen=True, kw_only=True)
class ClusterRecipe:
    """Nodes and GPUs of a job, and the settings that fit them. One process per GPU."""

    nodes: int
    """Nodes of a job."""
    gpus_per_node: int
    """GPUs of a node, all of which are used."""
    gpu_type: str
    """The site's name for this GPU type: the constraint, or the type within the gres."""
    precision: str
    """As in a run's YAML."""
    zero_stage: int
    """As in a run's YAML."""
    batch_size: int
    """Records per GPU and micro-batch."""
    gradient_accumulation_steps: int
    """Micro-batches per update."""
    cpus_per_task: int
    """CPU cores per GPU."""
    phase1_minutes: int
    """Time limit of a phase 1 job; about twice what the guide expects. A job that reaches it is requeued."""
    phase2_minutes: int
    """The same for phase 2, and for phase 3."""

    def __post_init__(self) -> None:
        for name in (
            "nodes",
            "gpus_per_node",
            "batch_size",
            "gradient_accumulation_steps",
            "cpus_per_task",
            "phase1_minutes",
            "phase2_minutes",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is less than 1")

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def global_batch(self) -> int:
        """Records per update."""
        return self.num_gpus * self.batch_size * self.gradient_accumulation_steps

    def minutes_of(self, phase: int | None) -> int | None:
        """Time limit of a job that trains `phase`; phase 3 has that of phase 2. None where none is trained."""
        return {1: self.phase1_minutes, 2: self.phase2_minutes, 3: self.phase2_minutes}.get(phase or 0)

    @property
    def train_settings(self) -> dict[str, Any]:
        """Dotted key of the training YAML -> value."""
        return {
            "precision": self.precision,
            "zero_stage": self.zero_stage,
            "stage4.batch_size": self.batch_size,
            "stage4.gradient_accumulation_steps": self.gradient_accumulation_steps,
        }

    def sbatch_options(self, minutes: int | None) -> list[str]:
        """Options of `sbatch` for a job on these nodes; with `minutes` None the site's time limit applies."""
        gpus = os.environ.get(GPU_OPTIONS_VARIABLE) or GPU_OPTIONS
        try:
            gpus = gpus.format(count=self.gpus_per_node, type=self.gpu_type)
        except (KeyError, IndexError, ValueError):
            raise ConfigError(
                f"{GPU_OPTIONS_VARIABLE}={gpus}: only the placeholders {{count}} and {{type}} are known"
            ) from None
        time = [f"--time={minutes}"] if minutes else []
        return [
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.gpus_per_node}",
            f"--cpus-per-task={self.cpus_per_task}",
            *shlex.split(gpus),
            *time,
        ]


def load_recipe(name: str) -> ClusterRecipe:
    """The recipe with that name in `configs/cluster/`, or the one in that YAML file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(
                f"--cluster: no recipe {name!r}; known are {', '.join(recipe_names())}, or give a path to a YAML"
            )
    values = read_yaml(path)
    try:
        if missing := sorted(set(ClusterRecipe.__dataclass_fields__) - set(values)):
            raise ConfigError(f"{', '.join(missing)} missing; every key is needed")
        return from_mapping(ClusterRecipe, values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def recipe_names() -> list[str]:
    """Shipped recipes, smallest first."""
    found = {path.stem: load_recipe(str(path)) for path in RECIPES.glob("*.yaml")}
    return sorted(found, key=lambda name: (found[name].num_gpus, name))


def check_recipes() -> str:
    """A table of the shipped recipes with the global batch of each; ConfigError if these differ."""
    found = {name: load_recipe(name) for name in recipe_names()}
    lines = [
        f"{'recipe':<10} {'nodes':>5} {'GPUs':>5}  {'precision':<9} {'ZeRO':>4} {'micro-batch':>11} "
        f"{'accumulation':>12} {'global batch':>12}"
    ]
    for name, recipe in found.items():
        lines.append(
            f"{name:<10} {recipe.nodes:>5} {recipe.num_gpus:>5}  {recipe.precision:<9} {recipe.zero_stage:>4} "
            f"{recipe.batch_size:>11} {recipe.gradient_accumulation_steps:>12} {recipe.global_batch:>12}"
        )
    if len({recipe.global_batch for recipe in found.values()}) > 1:
        raise ConfigError("\n".join([*lines, f"the global batches differ; make them equal in {RECIPES}"]))
    return "\n".join(lines)


def cluster_options(parser: argparse.ArgumentParser) -> None:
    """`embervlm cluster` has no flags."""


def cluster() -> None:
    print(check_recipes())
