"""One thread: matrices are small here, and threads would only wait for each other."""

from __future__ import annotations

import os

# Read when torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
