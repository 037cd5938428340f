"""A few of the faults and of the topologies that `tests/faults.py` and `tests/resume_matrix.py` have."""

import pytest

from tests import faults, resume_matrix

pytestmark = pytest.mark.slow


def test_a_broken_run_goes_on_as_if_nothing_had_happened(capfd):
    assert faults.main(["--trials", "1", "--kinds", "kill-launcher"]) == 0, capfd.readouterr()


def test_the_matrix_of_topologies_is_measured(capfd):
    """Its smallest part; `test_topologies.py` goes everywhere."""
    drawn = ["--kinds", "lora", "--pairs", "1", "--seed", "2"]  # from one process to two
    assert resume_matrix.main([*drawn, "--steps", "4"]) == 0, capfd.readouterr()
