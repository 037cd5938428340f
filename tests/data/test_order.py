"""The endless order: every example as often as it should come, in rows that hold what they may."""

from collections import Counter

import numpy as np
import pytest

from ds_dgemma.data.order import Arrangement, Item, Order, best_fit, permutation

LENGTHS = np.array([5, 9, 3, 7, 2, 8, 4, 6, 1, 10])


def make_order(lengths=LENGTHS, sizes=None, weights=None, seed=5, block=100, **arrangement) -> Order:
    sizes = sizes or (len(lengths),)
    return Order(seed, lengths, sizes, weights or (1.0,) * len(sizes), Arrangement(seed, **arrangement), block)


def epochs(order: Order, items: int) -> list[Item]:
    """The first rows that hold so many items, flat."""
    found: list[Item] = []
    position = 0
    while len(found) < items:
        found += order.row(position)
        position += 1
    assert len(found) == items
    return found


def test_every_epoch_visits_every_example_once_in_its_own_order():
    found = epochs(make_order(), 30)
    by_epoch = [found[start : start + 10] for start in range(0, 30, 10)]
    assert [sorted(items) for items in by_epoch] == [[(i, epoch) for i in range(10)] for epoch in range(3)]
    orders = [[item.place for item in items] for items in by_epoch]
    assert orders[0] != orders[1] != orders[2]
    assert [item.place for item in epochs(make_order(seed=6), 10)] != orders[0]


def test_the_order_of_a_seed_never_changes():
    assert [make_order(LENGTHS[:8], seed=0).row(place)[0] for place in range(6, 10)] == [(0, 0), (2, 0), (4, 1), (7, 1)]


def test_a_source_comes_as_often_as_its_weight_says_each_time_with_its_own_epoch():
    """4 examples twice an epoch, 6 examples once in two."""
    order = make_order(sizes=(4, 6), weights=(2.0, 0.5))
    assert Counter(epochs(order, 22)) == Counter(
        [Item(i, epoch) for i in range(4) for epoch in range(4)] + [Item(i, 0) for i in range(4, 10)]
    )
    assert sorted(epochs(order, 11)) != sorted(Item(i, 0) for i in range(11))


@pytest.mark.parametrize("block", [3, 4, 100])
def test_packed_rows_hold_every_example_once_within_their_length(block: int):
    order = make_order(packs_to=10, block=block)
    rows, position, seen = [], 0, 0
    while seen < 20:  # two epochs
        rows.append(order.row(position))
        seen += len(rows[-1])
        position += 1
    assert all(sum(LENGTHS[item.place] for item in row) <= 10 for row in rows)
    assert sorted(item for row in rows for item in row) == [(i, epoch) for i in range(10) for epoch in range(2)]
    if block == 100:
        assert len(rows) == 2 * 6  # 55 tokens need six rows of 10 at least
        assert rows[:6] != [[Item(item.place, 0) for item in row] for row in rows[6:]]


def test_best_fit_takes_the_fullest_row_that_has_room():
    assert best_fit([5, 3, 7, 2, 6], 10) == [[2, 1], [4, 3], [0]]
    assert best_fit([], 10) == []


def test_groups_are_of_like_length():
    order = make_order(group=2)
    rows = [order.row(position) for position in range(10)]
    assert sorted(item.place for (item,) in rows) == list(range(10))
    lengths = [int(LENGTHS[item.place]) for (item,) in rows]
    pairs = [tuple(lengths[start : start + 2]) for start in range(0, 10, 2)]
    assert sorted(pairs) == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    assert pairs != sorted(pairs)


def test_a_permutation_is_of_its_key_alone():
    assert permutation(50, "order", 1, 2).tolist() == permutation(50, "order", 1, 2).tolist()
    assert permutation(50, "order", 1, 2).tolist() != permutation(50, "order", 1, 3).tolist()
