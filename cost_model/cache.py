"""Where what was measured on this machine is kept between processes."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_dir"]


def cache_dir() -> Path:
    """The folder for profiles and calibrations: ``GRAPHOPT_CACHE_DIR``, or else the user's cache folder of graphopt.

    The folder may not exist yet, and it may not be writable: whoever writes there makes it and says what to do when
    it cannot. The variable is read at each call.
    """
    chosen = os.environ.get("GRAPHOPT_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("graphopt", appauthor=False))
