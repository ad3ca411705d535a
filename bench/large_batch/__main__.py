"""`python -m bench.large_batch` or `python bench/large_batch`: see `bench.large_batch`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.large_batch.command import main

if __name__ == "__main__":
    raise SystemExit(main())
