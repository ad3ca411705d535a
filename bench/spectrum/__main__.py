"""`python -m bench.spectrum` or `python bench/spectrum`: see `bench.spectrum`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.spectrum.command import main

if __name__ == "__main__":
    raise SystemExit(main())
