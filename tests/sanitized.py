"""Run pytest on a kronfac of another folder: `python tests/sanitized.py FOLDER tests/ops` (`make sanitize`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def main(site: Path, arguments: list[str]) -> int:
    """Run pytest with `arguments` once kronfac and its compiled libraries have come from `site`."""
    # An editable install answers before sys.path is asked.
    sys.meta_path = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
    sys.path.insert(0, str(site))
    import kronfac._library
    from kronfac import _host

    for file in (*kronfac._library.LOADED.values(), _host.__file__):
        if not Path(file).is_relative_to(site):
            raise SystemExit(f"{file} was loaded, which is not in {site}; is another kronfac first on the path?")
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
