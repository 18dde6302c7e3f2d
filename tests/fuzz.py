"""Settings of the tests tests/test_fuzz_*.py."""

import os

from hypothesis import HealthCheck, settings

FEW = 25  # cases of each kind without FUZZ_CASES

# Cases are drawn anew in every run. Hypothesis prints how to repeat one that fails.
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", FEW)),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
