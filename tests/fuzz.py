"""What the tests tests/test_fuzz_*.py share: how many cases, what JSON may hold, how a file may be damaged."""

import faulthandler
import os
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lsdseg.errors import UserError

FEW = 25  # cases of each kind without FUZZ_CASES
LONGEST = 120  # seconds that no case may take

# The suite has the same few cases in every run; with FUZZ_CASES, they are drawn anew. Hypothesis prints how to repeat
# one that fails.
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_CASES", FEW)),
    derandomize="FUZZ_CASES" not in os.environ,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([2**63, 10**400, 0, 1, 4, -1]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@contextmanager
def ends_well_or_in_one_line():
    """Let the body work, or fail with one line for the user. A hang ends the whole test run with a traceback.

    Yields:
        A list that holds the message afterwards if there was one.
    """
    messages = []
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    try:
        yield messages
    except UserError as error:
        messages.append(str(error))
        assert "\n" not in messages[0]
        assert 20 < len(messages[0]) < 700, messages[0]
    finally:
        faulthandler.cancel_dump_traceback_later()


@st.composite
def damage(draw):
    """A function that damages bytes: cut off, flipped, overwritten, inserted."""
    kind = draw(st.sampled_from(["cut", "flip", "overwrite", "insert"]))
    at, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 40))
    early = draw(st.booleans())  # headers are more interesting than what follows
    new = draw(st.binary(min_size=length, max_size=length) | st.sampled_from([b"\0" * length, b"\xff" * length]))

    def apply(content):
        begin = int(at * min(len(content), 64 if early else len(content)))
        if kind == "cut":
            return content[:begin]
        if kind == "flip":
            flipped = bytes(byte ^ 1 << new[0] % 8 for byte in content[begin : begin + 1])
            return content[:begin] + flipped + content[begin + 1 :]
        return content[:begin] + new + content[begin + (length if kind == "overwrite" else 0) :]

    apply.__name__ = f"{kind} at {at} ({'early' if early else 'anywhere'}) {new!r}"
    return apply
