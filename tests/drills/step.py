"""One step in a process of its own, to be killed: ``python -m tests.drills.step backfill params.yaml``."""

import sys
from pathlib import Path

from tests.drills import kit

if __name__ == "__main__":
    with kit.opened(Path(sys.argv[2])) as phase:
        print("begins", flush=True)
        sys.stdout = sys.stderr
        kit.STEPS[sys.argv[1]](phase)
