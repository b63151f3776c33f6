"""Submit training to Slurm from Python: the node recipes through submitit, `--sweep`, `--local`, `--dry_run`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embervlm.run.submit import main

if __name__ == "__main__":
    main()
