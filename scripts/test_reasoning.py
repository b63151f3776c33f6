"""The guide's name for `embervlm test-reasoning`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embervlm.cli import main

if __name__ == "__main__":
    main(["test-reasoning", *sys.argv[1:]])
