"""A few of the faults that `tests/faults.py` has."""

import pytest

from tests import faults

pytestmark = pytest.mark.slow


def test_a_broken_run_goes_on_as_if_nothing_had_happened(capfd):
    assert faults.main(["--trials", "2", "--kinds", "kill-in-write", "kill-launcher"]) == 0, capfd.readouterr()
