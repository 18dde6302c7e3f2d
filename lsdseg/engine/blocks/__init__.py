"""Running blocks on workers: `run.py` runs a `BlockStep`; see there."""
