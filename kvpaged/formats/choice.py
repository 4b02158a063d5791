"""Which code each layer gets: the fewest bytes whose expected harm stays within a limit. Pure."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way of coding a layer.

    Attributes:
        codes: of K and V.
        size: bytes of the layer in a page.
        harm: what it is expected to cost, in what the limit is in; harms of layers add up.
    """

    codes: tuple[str, str]
    size: int
    harm: float


def frontier(options: Sequence[Option]) -> list[Option]:
    """Those worth choosing, from the least harm to the least size: of the lower convex hull of
    harm over size.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.size, each.harm)):
        if hull and option.harm >= hull[-1].harm:
            continue
        while len(hull) > 1 and _slope(hull[-1], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull[::-1]


def _slope(small: Option, large: Option) -> float:
    """Harm that a larger option saves a byte, as a number below 0."""
    return (large.harm - small.harm) / (large.size - small.size)


def choose(layers: Sequence[Sequence[Option]], most: float) -> list[Option]:
    """One option of each layer, of small total size, whose harms add up to `most` at most; the
    least harmful ones where even those add up to more.

    Steps towards smaller options are taken in the order of harm for each byte saved, which is best
    for every total that they reach (the Lagrangian's optimum); those that no longer fit are passed
    over, and what room is left is filled.
    """
    hulls = [frontier(options) for options in layers]
    chosen = [hull[0] for hull in hulls]
    total = sum(option.harm for option in chosen)
    steps = sorted(
        (-_slope(after, before), layer, n)
        for layer, hull in enumerate(hulls)
        for n, (before, after) in enumerate(itertools.pairwise(hull), 1)
    )
    at = [0] * len(hulls)
    for _, layer, n in steps:
        more = hulls[layer][n].harm - chosen[layer].harm
        if at[layer] == n - 1 and total + more <= most:
            chosen[layer], at[layer] = hulls[layer][n], n
            total += more
    return _filled(layers, chosen, most - total)


def _filled(layers: Sequence[Sequence[Option]], chosen: list[Option], room: float) -> list[Option]:
    """`chosen`, with smaller options where what is left of the limit allows, those that save most
    first; any option, for what lies above the hull may still fit.
    """
    while True:
        fitting = [
            (now.size - option.size, -n, option)
            for n, (options, now) in enumerate(zip(layers, chosen, strict=True))
            for option in options
            if option.size < now.size and option.harm - now.harm <= room
        ]
        if not fitting:
            return chosen
        _, n, option = max(fitting)
        room -= option.harm - chosen[-n].harm
        chosen[-n] = option
