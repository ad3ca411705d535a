"""`python -m bench.autoencoder` or `python bench/autoencoder`: see `bench.autoencoder`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.autoencoder.command import main

if __name__ == "__main__":
    raise SystemExit(main())
