"""A few of the faults and of the topologies that `tests/faults.py` and `tests/resume_matrix.py` have."""

import pytest

from tests import faults, resume_matrix

pytestmark = pytest.mark.slow


def test_a_broken_run_goes_on_as_if_nothing_had_happened(capfd):
    assert faults.main(["--trials", "1", "--kinds", "kill-launcher"]) == 0, capfd.readouterr()


def test_a_lora_run_goes_on_with_the_same_losses_on_another_topology(capfd):
    """Full training does so in `test_resume.py`."""
    assert resume_matrix.main(["--kinds", "lora", "--pairs", "1", "--seed", "4", "--steps", "6"]) == 0, (
        capfd.readouterr()
    )
