"""A few of the faults and of the topologies that `tests/faults.py` and `tests/resume_matrix.py` have."""

import pytest

from tests import faults, resume_matrix

pytestmark = pytest.mark.slow


def test_a_broken_run_goes_on_as_if_nothing_had_happened(capfd):
    assert faults.main(["--trials", "2", "--kinds", "kill-in-write", "kill-launcher"]) == 0, capfd.readouterr()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_goes_on_with_the_same_losses_on_another_topology(kind, capfd):
    assert resume_matrix.main(["--kinds", kind, "--pairs", "1", "--seed", str(len(kind))]) == 0, capfd.readouterr()
