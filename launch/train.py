"""Train: `deepspeed launch/train.py`, `torchrun launch/train.py`, `srun python launch/train.py` or plain `python`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embervlm.run.train import main
from embervlm.signals import end_after

if __name__ == "__main__":
    end_after(main)
