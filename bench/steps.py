"""Whole K-FAC steps beside SGD steps: `kronfac bench --steps` under the name of its file.

python bench/steps.py [--network resnet20] [--threads 1,2] [--profile] [--quick] [--json FILE]
"""

from __future__ import annotations

import sys

from kronfac.cli.main import run

if __name__ == "__main__":
    sys.argv[1:1] = ["bench", "--steps"]
    run()
