"""What was right, out of how much, in which group, so that easy questions can't hide hard ones.

A Score holds counts, never shares: the shares of a group are made once, from its sums.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """One example's result."""

    right: Mapping[str, tuple[float, int]]  # measure → (right, of how many)
    group: dict[str, Any] = field(default_factory=dict)  # what it is reported under; equal values are one group

    def shown(self) -> dict[str, str]:
        """For a sample: 14 of 16."""
        return {measure: f"{right:g} of {of}" for measure, (right, of) in self.right.items()}


def summarise(scores: Iterable[Score]) -> dict[str, Any]:
    """Return `examples`, the share of each measure, and under `groups` the same for every group, in order."""
    groups: dict[str, list[Score]] = {}
    everything = list(scores)
    for score in sorted(everything, key=lambda score: [_order(value) for value in score.group.values()]):
        if score.group:
            groups.setdefault(json.dumps(score.group, default=str), []).append(score)
    measures = list(dict.fromkeys(measure for score in everything for measure in score.right))
    by_group = [{**members[0].group, **_shares(members, measures)} for members in groups.values()]
    return {**_shares(everything, measures), "groups": by_group}


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers before everything else."""
    is_number = isinstance(value, int | float)
    return (not is_number, value if is_number else str(value))


def _shares(scores: list[Score], measures: Iterable[str]) -> dict[str, Any]:
    """Each measure over the examples that have it; None where none has."""
    shares: dict[str, Any] = {"examples": len(scores)}
    for measure in measures:
        found = [score.right[measure] for score in scores if measure in score.right]
        right, of = sum(right for right, _ in found), sum(of for _, of in found)
        shares[measure] = right / of if of else None
    return shares
