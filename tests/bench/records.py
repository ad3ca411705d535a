"""Records of the autoencoder race with curves that are made up, for tests of what is done with records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.autoencoder.settings import Setting


def write_record(
    results: Path,
    setting: Setting,
    curve: Sequence[tuple[int, float, float]],
    *,
    stage: str = "grid",
    minutes: float = 4,
    seconds: float | None = None,
    waited: float = 0.0,
    status: str = "finished",
    planned: int | None = None,
) -> None:
    """Write one record: curve entries are (step, seconds, error), the averaged network always 1 worse."""
    steps = curve[-1][0]
    seconds = 0.95 * 60 * minutes if seconds is None else seconds
    content = {
        "setting": setting.to_json(),
        "stage": stage,
        "minutes": minutes,
        "status": status,
        "steps": steps,
        "planned_steps": steps if planned is None else planned,
        "cut_short": planned is not None,
        "seconds": seconds,
        "cpu_seconds": 2 * seconds,
        "waited_seconds": waited,
        "threads": 2,
        "curve": [{"step": k, "seconds": s, "raw": error, "averaged": error + 1} for k, s, error in curve],
        "machine": {"cpu": "a processor", "instruction_set": "avx2", "torch": "2.13.0", "kronfac": "0.1.0"},
    }
    path = results / f"{stage}-{minutes:g}min-{setting.key}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
