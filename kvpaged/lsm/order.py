"""In which order values are laid out: pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Link(NamedTuple):
    """A value's key and its parent's, empty for none."""

    key: bytes
    parent: bytes


def locality(links: Sequence[Link]) -> list[int]:
    """Numbers of values so that chains lie in one piece: each value behind its parent, the longest
    continuation first, then its siblings in the order of their keys. Values without a parent among
    these are in the order of their parents and keys.

    A prompt of pages is then one piece, and one more for each point where it leaves a longer one.
    Keys are distinct. Parents that go round in a circle do no harm.
    """
    places = {link.key: number for number, link in enumerate(links)}
    children: dict[int, list[int]] = {}
    roots = []
    for number, link in enumerate(links):
        parent = places.get(link.parent) if link.parent else None
        if parent is None or parent == number:
            roots.append(number)
        else:
            children.setdefault(parent, []).append(number)
    heights = _heights(links, places)
    for family in children.values():
        family.sort(key=lambda number: (-heights[number], links[number].key))
    roots.sort(key=lambda number: (links[number].parent or links[number].key, links[number].key))
    circles = sorted(children, key=lambda number: links[number].key)
    order: list[int] = []
    seen = [False] * len(links)
    for start in (*roots, *circles):
        stack = [start]
        while stack:
            number = stack.pop()
            if not seen[number]:
                seen[number] = True
                order.append(number)
                stack.extend(reversed(children.get(number, [])))
    return order


def _heights(links: Sequence[Link], places: dict[bytes, int]) -> list[int]:
    """How many values follow each, along its longest continuation."""
    waiting = [0] * len(links)
    parents: list[int | None] = []
    for number, link in enumerate(links):
        parent = places.get(link.parent) if link.parent else None
        parents.append(None if parent == number else parent)
        if parents[-1] is not None:
            waiting[parents[-1]] += 1
    heights = [0] * len(links)
    leaves = [number for number, count in enumerate(waiting) if not count]
    while leaves:
        number = leaves.pop()
        parent = parents[number]
        if parent is not None:
            heights[parent] = max(heights[parent], heights[number] + 1)
            waiting[parent] -= 1
            if not waiting[parent]:
                leaves.append(parent)
    return heights
