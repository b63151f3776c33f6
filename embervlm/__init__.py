"""EmberVLM: a small vision-language model that reasons in steps before it answers."""

from __future__ import annotations

import os
from typing import Any

from embervlm.version import __version__

__all__ = ["EmberVLM", "__version__", "reasoning_validator", "save_to_dataset", "select_best_checkpoint"]

# Read by OpenMP when torch is imported. Its threads wait for each other after every operation, by default busily: with
# other work on the machine, an evaluation by two threads on two cores took 144 s so, and 27 s like this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that light commands never import torch."""
    if name == "EmberVLM":
        from embervlm.model.embervlm import EmberVLM

        return EmberVLM
    if name == "select_best_checkpoint":
        from embervlm.select_best import select_best_checkpoint

        return select_best_checkpoint
    if name in ("reasoning_validator", "save_to_dataset"):
        from embervlm.evaluation import own_chains

        return getattr(own_chains, name)
    raise AttributeError(f"module 'embervlm' has no attribute {name!r}")
