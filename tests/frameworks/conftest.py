"""No test may look for a model on the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
