"""One option for each item with the least summed cost within a limit of bytes.

The multiple-choice knapsack problem in whole bytes. Options that no best answer holds are dropped;
the linear relaxation gives a first answer and a lower bound; dynamic programming gives the answer,
which is exact where its table is small enough. Nothing here knows what an item is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from operator import itemgetter

import numpy as np

# Cells of the table of choices, one byte each, and what a table may cost in time.
MAX_CELLS = 1 << 25


@dataclass(frozen=True, slots=True)
class Option:
    """One option of an item: its size and its cost."""

    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """An answer."""

    chosen: tuple[int, ...]  # of each item, the index of its option
    nbytes: int
    cost: float
    bound: float  # no choice within the limit costs less than this
    exact: bool  # the answer is a best one


def allocate(
    items: Sequence[Sequence[Option]], limit: int, max_cells: int = MAX_CELLS
) -> Allocation | None:
    """Choose an option for every item.

    Args:
        items: The options of each item; at least one, sizes and costs not negative.
        limit: Most bytes of all the chosen options.
        max_cells: Largest table of the exact solver; above it sizes are rounded up.

    Returns:
        The answer; None where even the smallest options exceed the limit. Among equals the
        smaller option is taken, then the earlier one.

    Example:
        >>> allocate([[Option(2, 5.0), Option(4, 1.0)], [Option(2, 3.0), Option(4, 2.0)]], 6)
        Allocation(chosen=(1, 0), nbytes=6, cost=4.0, bound=4.0, exact=True)
    """
    useful = [_pareto_front(options) for options in items]
    least = sum(items[n][kept[0]].nbytes for n, kept in enumerate(useful))
    if least > limit:
        return None
    greedy, bound = _greedy_relaxation(items, useful, limit - least)
    table, exact = _dynamic_program(items, useful, limit - least, max_cells)
    best = min((greedy, table), key=lambda chosen: _total(items, chosen))
    if exact:
        cost, nbytes = _total(items, best)
        return Allocation(tuple(best), nbytes, cost, bound=cost, exact=True)
    best = _greedy_fill(items, useful, best, limit)
    cost, nbytes = _total(items, best)
    # A table of rounded sizes proves nothing, but an answer that costs no more than the relaxation
    # is a best one all the same. With costs 5 and 1 for 2 and 4 bytes and a limit of 3 bytes the
    # relaxation takes half of the step: its bound is 3, the answer costs 5, and is not proved.
    # With a limit of 4 bytes it takes the whole step: both are 1.
    return Allocation(tuple(best), nbytes, cost, bound=min(bound, cost), exact=cost <= bound)


def _total(items: Sequence[Sequence[Option]], chosen: Sequence[int]) -> tuple[float, int]:
    """Cost and bytes of a choice."""
    picked = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(x.cost for x in picked), sum(x.nbytes for x in picked)


def _pareto_front(options: Sequence[Option]) -> list[int]:
    """Options by size, without those that cost no less than one of at most their size."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda n: (options[n].nbytes, options[n].cost, n)):
        if not kept or options[index].cost < options[kept[-1]].cost:
            kept.append(index)
    return kept


def _hull(options: Sequence[Option], kept: Sequence[int]) -> list[int]:
    """Of useful options, those on the lower convex hull of cost over size."""
    hull: list[int] = []
    for index in kept:
        while len(hull) > 1 and _saving_per_byte(options, hull[-2], hull[-1]) <= _saving_per_byte(
            options, hull[-1], index
        ):
            hull.pop()
        hull.append(index)
    return hull


def _saving_per_byte(options: Sequence[Option], small: int, large: int) -> float:
    """Cost that a byte saves from one option to a larger one."""
    nbytes = options[large].nbytes - options[small].nbytes
    return (options[small].cost - options[large].cost) / nbytes


def _greedy_relaxation(
    items: Sequence[Sequence[Option]], useful: Sequence[Sequence[int]], room: int
) -> tuple[list[int], float]:
    """Steps up the hulls, those that save most a byte first.

    Returns:
        A choice that fits, and the cost of the best choice of fractions, which none is below.
    """
    chosen = [kept[0] for kept in useful]
    cost = sum(options[index].cost for options, index in zip(items, chosen, strict=True))
    steps = []
    for n, options in enumerate(items):
        hull = _hull(options, useful[n])
        for at, (a, b) in enumerate(pairwise(hull)):
            steps.append((-_saving_per_byte(options, a, b), n, at, a, b))
    bound, left, stopped = cost, room, set[int]()
    fraction = True
    for gain, n, _, small, large in sorted(steps):
        nbytes = items[n][large].nbytes - items[n][small].nbytes
        if fraction:
            taken = min(nbytes, left)
            bound += gain * taken
            fraction = taken == nbytes
        if n not in stopped and nbytes <= left:
            chosen[n], left = large, left - nbytes
        else:
            stopped.add(n)
    # Each addition above rounds by up to 1e-16 of the cost at the start, so that the sum may lie
    # above the true bound: for costs of 1e6 in all it is lowered by 1e-6. A bound that is too low
    # says less; one that is too high would call an answer a best one that is not.
    return chosen, bound - 1e-12 * cost


def _dynamic_program(
    items: Sequence[Sequence[Option]], useful: Sequence[Sequence[int]], room: int, max_cells: int
) -> tuple[list[int], bool]:
    """Dynamic programming over bytes beyond the smallest options.

    Returns:
        The choice, and whether it is a best one: not where sizes had to be rounded up.
    """
    extra = [
        [options[i].nbytes - options[kept[0]].nbytes for i in kept]
        for options, kept in zip(items, useful, strict=True)
    ]
    room = min(room, sum(sizes[-1] for sizes in extra))
    unit = gcd(*(size for sizes in extra for size in sizes)) or 1
    most = max(max_cells // max(len(items), 1), 1)
    exact = room // unit < most
    if not exact:
        unit = -(-room // (most - 1)) if most > 1 else room + 1
    cells = room // unit + 1
    best = np.zeros(cells)
    choices = np.zeros((len(items), cells), np.uint8)
    sizes_in_units = [[-(-size // unit) for size in sizes] for sizes in extra]
    for n, kept in enumerate(useful):
        new = np.full(cells, np.inf)
        for number, index in enumerate(kept):
            size = sizes_in_units[n][number]
            if size >= cells:
                break
            cost = best[: cells - size] + items[n][index].cost
            better = cost < new[size:]
            new[size:][better] = cost[better]
            choices[n, size:][better] = number
        best = new
    at, chosen = cells - 1, [0] * len(items)
    for n in range(len(items) - 1, -1, -1):
        number = int(choices[n, at])
        chosen[n] = useful[n][number]
        at -= sizes_in_units[n][number]
    return chosen, exact


def _greedy_fill(
    items: Sequence[Sequence[Option]],
    useful: Sequence[Sequence[int]],
    chosen: Sequence[int],
    limit: int,
) -> list[int]:
    """Take the larger option that saves most a byte and still fits, until none does.

    Example: the chosen options leave 3 bytes. One item saves 4.0 with 4 bytes more (too large),
    another 3.0 with 3 bytes, a third 2.0 with 1 byte: the third is taken, 2 bytes are left, and
    neither of the others fits them.
    """
    filled = list(chosen)
    left = limit - _total(items, filled)[1]
    while larger := list(_larger_options(items, useful, filled, left)):
        _, item, filled_with, nbytes = max(larger, key=itemgetter(0))
        filled[item] = filled_with
        left -= nbytes
    return filled


def _larger_options(
    items: Sequence[Sequence[Option]],
    useful: Sequence[Sequence[int]],
    chosen: Sequence[int],
    left: int,
) -> Iterator[tuple[float, int, int, int]]:
    """The options that cost less than the chosen ones and take at most ``left`` bytes more.

    Each with what a byte saves, its item and index, and the bytes beyond the chosen one's.
    """
    for item, options in enumerate(items):
        present = options[chosen[item]]
        for index in sorted(useful[item]):
            nbytes = options[index].nbytes - present.nbytes
            if 0 < nbytes <= left and options[index].cost < present.cost:
                yield _saving_per_byte(options, chosen[item], index), item, index, nbytes
