"""The solver behind --budget, against every choice there is."""

from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.bit_allocation.knapsack import Option, _greedy_fill, allocate

COSTS = st.floats(0, 1e6, allow_nan=False) | st.integers(0, 3).map(float)
OPTIONS = st.builds(Option, st.integers(0, 60), COSTS)
ITEMS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), max_size=5)


def least(items: list[list[Option]], limit: int) -> float:
    """The cost of a best choice; infinite where nothing fits."""
    fitting = (x for x in product(*items) if sum(option.nbytes for option in x) <= limit)
    return min((sum(option.cost for option in x) for x in fitting), default=inf)


@given(ITEMS, st.integers(0, 250), st.sampled_from([1, 7, 40, 1 << 20]))
def test_never_beyond_the_limit_nor_below_the_bound(
    items: list[list[Option]], limit: int, max_cells: int
) -> None:
    true, found = least(items, limit), allocate(items, limit, max_cells)
    if true == inf:
        assert found is None
        return
    assert found is not None
    picked = [options[n] for options, n in zip(items, found.chosen, strict=True)]
    assert found.nbytes == sum(option.nbytes for option in picked) <= limit
    assert found.cost == pytest.approx(sum(option.cost for option in picked))
    assert found.bound <= true * (1 + 1e-9)
    assert found.cost >= true * (1 - 1e-9)
    if found.exact:
        assert found.cost == pytest.approx(true, rel=1e-9)


@given(ITEMS, st.integers(0, 250))
def test_small_tables_are_solved_exactly(items: list[list[Option]], limit: int) -> None:
    found = allocate(items, limit)
    assert found is None or found.exact


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1))
def test_rounded_sizes_stay_near_the_bound(seed: int) -> None:
    """Many items and a table that is too small: what a model of any size looks like."""
    import random

    rng = random.Random(seed)
    items = []
    for _ in range(60):
        size, weight = rng.randint(900, 1100), rng.random() + 0.5
        items.append([Option(size * bits, weight * 4.0**-bits) for bits in (2, 3, 4, 5, 6, 8)])
    found = allocate(items, 60 * 4000, max_cells=60 * 400)
    assert found is not None
    assert not found.exact
    assert found.cost <= 1.03 * found.bound


def test_among_equals_the_smaller_and_then_the_earlier() -> None:
    same = [Option(8, 1.0), Option(4, 1.0), Option(4, 1.0)]
    found = allocate([same, same], 100)
    assert found is not None
    assert found.chosen == (1, 1)
    assert found.nbytes == 8


def test_an_item_that_cannot_be_on_the_hull_is_chosen_where_it_fits_best() -> None:
    """The middle option costs more than any mixture, yet no mixture fits into 5 bytes."""
    found = allocate([[Option(0, 10.0), Option(5, 6.0), Option(8, 0.0)]], 5)
    assert found is not None
    assert (found.chosen, found.cost, found.exact) == ((1,), 6.0, True)


def test_nothing_to_choose() -> None:
    assert allocate([], 0) is not None
    assert allocate([], -1) is None


def test_what_saves_most_a_byte_is_filled_in_first() -> None:
    """3 bytes are left: the third item saves 2.0 with one of them, and no other fits the rest."""
    items = [
        [Option(1, 9.0), Option(5, 5.0)],
        [Option(1, 9.0), Option(4, 6.0)],
        [Option(1, 9.0), Option(2, 7.0)],
    ]
    assert _greedy_fill(items, [[0, 1]] * 3, [0, 0, 0], limit=6) == [0, 0, 1]


def test_among_equals_the_first_item_and_option_is_filled_in() -> None:
    items = [[Option(1, 9.0), Option(2, 8.0), Option(3, 7.0)], [Option(1, 9.0), Option(2, 8.0)]]
    assert _greedy_fill(items, [[0, 1, 2], [0, 1]], [0, 0], limit=3) == [1, 0]
