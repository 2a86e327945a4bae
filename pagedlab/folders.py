"""Where pagedlab keeps on this machine what it can fetch or measure again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that PAGEDLAB_CACHE names, else the system's for caches."""
    if given := os.environ.get("PAGEDLAB_CACHE"):
        return Path(given)
    import pooch

    return Path(pooch.os_cache("pagedlab"))
