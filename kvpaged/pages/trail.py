"""What the prefix index is made of: its nodes, where a sequence stands among them, and what of one
was found.
"""

import weakref
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvpaged.keys import TOKEN_BYTES, Region


class Node:
    """A page of the tree, or the start of a region (no tokens, no pages).

    Attributes:
        parent: what it follows; `None` for the region of a namespace.
        region: whose keys it has.
        tokens: its tokens, encoded; empty for the start of a region.
        key: its page key; for the start of a region, that of the page before.
        depth: pages from the start of the sequence up to and with this one.
        pages: the page of each layer group that has one; a group with a window may lack it.
        attached: it can be reached from its region.
    """

    __slots__ = (
        "__weakref__", "_ordered", "_salts", "attached", "children", "depth", "key", "pages",
        "parent", "region", "tokens",
    )  # fmt: skip

    def __init__(self, parent: "Node | None", region: Region, tokens: bytes, key: bytes) -> None:
        self.parent = parent
        self.region = region
        self.tokens = tokens
        self.key = key
        self.depth: int = 0 if parent is None else parent.depth + bool(tokens)
        self.pages: list[int | None] = []
        self.children: dict[bytes, Node] = {}
        self.attached = True
        self._ordered: list[bytes] = []
        self._salts: weakref.WeakValueDictionary[bytes, Node] | None = None

    def add(self, child: "Node") -> None:
        """Make `child` a continuation."""
        self.children[child.tokens] = child
        insort(self._ordered, child.tokens)

    def remove(self, child: "Node") -> None:
        """Forget a continuation."""
        del self.children[child.tokens]
        del self._ordered[bisect_left(self._ordered, child.tokens)]
        child.attached = False

    def salted(self, salt: bytes, *, make: bool) -> "Node | None":
        """The start of a salt's region after this page; `make` it if there is none.

        It lives as long as somebody holds it or a page of it.
        """
        found = None if self._salts is None else self._salts.get(salt)
        if found is None and make:
            if self._salts is None:
                self._salts = weakref.WeakValueDictionary()
            region = self.region.salted(salt, self.key)
            found = self._salts[salt] = Node(self, region, b"", region.first)
        return found

    def reachable(self) -> bool:
        """Whether a search can come here."""
        start = self.parent if not self.tokens else None
        return self.attached and (start is None or start.attached)

    def has_salts(self) -> bool:
        """Whether pages of some salt follow."""
        return self._salts is not None and any(node.children for node in self._salts.values())

    def ordered(self) -> list[bytes]:
        """The tokens of the continuations, ascending."""
        return self._ordered

    def nearest(self, tokens: bytes) -> "tuple[Node, int] | None":
        """The continuation that shares most with the beginning of `tokens`, and how many tokens.

        Of sorted byte strings, the one with the longest common prefix is a neighbour of the place
        where `tokens` would be put.
        """
        place = bisect_left(self._ordered, tokens)
        best: tuple[Node, int] | None = None
        for candidate in self._ordered[max(place - 1, 0) : place + 1]:
            shared = _shared_tokens(candidate, tokens)
            if shared > (best[1] if best else 0):
                best = self.children[candidate], shared
        return best


def _shared_tokens(a: bytes, b: bytes) -> int:
    size = min(len(a), len(b))
    differ = np.frombuffer(a, ">u4", size // 4) != np.frombuffer(b, ">u4", size // 4)
    return int(differ.argmax()) if differ.any() else size // TOKEN_BYTES


class Trail:
    """Where a sequence stands in the tree: the node of its last full page, and where its salt
    begins.

    Attributes:
        root: the region of its namespace.
        salt, salt_page: pages from `salt_page` on are the salt's; `salt` None: none are.
        node: of its last full page that is in the tree, or the start of a region.
        identity: what the namespace stood for when the sequence began.
    """

    __slots__ = ("identity", "node", "root", "salt", "salt_page")

    def __init__(
        self, root: Node, salt: bytes | None = None, salt_page: int = 0, identity: object = None
    ) -> None:
        self.root = root
        self.identity = identity
        self.salt = salt
        self.salt_page = salt_page
        self.node = root

    def copy(self) -> "Trail":
        """One that goes its own way from here."""
        other = Trail(self.root, self.salt, self.salt_page, self.identity)
        other.node = self.node
        return other

    def page_keys(
        self, tokens: bytes, page_size: int, after: Sequence[Node] = ()
    ) -> Iterator[bytes]:
        """The keys of the full pages of encoded `tokens`: of those that follow the pages `after`,
        the sequence's first; none: of all.
        """
        last, width = after[-1] if after else self.root, page_size * TOKEN_BYTES
        region, key = last.region, last.key
        for place in range(len(after), len(tokens) // width):
            if self.salt is not None and place == self.salt_page and region is self.root.region:
                region = region.salted(self.salt, key)
            key = region.page_key(key, tokens[place * width : (place + 1) * width])
            yield key

    def cut(self, depth: int) -> None:
        """Go back to the first `depth` pages."""
        while self.node.depth > depth and self.node.parent is not None:
            self.node = self.node.parent

    def enters(self, node: Node, depth: int) -> bool:
        """Whether what follows `node`, the page of this depth, is the salt's."""
        return self.salt is not None and depth == self.salt_page and node.region is self.root.region


@dataclass(frozen=True, slots=True)
class Match:
    """What of a sequence was found.

    Attributes:
        nodes: the pages that hold it, in order; the last may agree only in part.
        tokens: how many tokens agree.
        page_size: of the pages.
        windows: of each layer group: tokens a query sees, or `None`.
        keep: pages, from the first on, of which a part can be gone on from: `None`: all. Others
            are compressed, and shared whole.
    """

    nodes: list[Node]
    tokens: int
    page_size: int
    windows: tuple[int | None, ...]
    keep: int | None = None

    def first_page(self, group: int, tokens: int) -> int:
        """The first logical page that a query at position `tokens` sees in a group."""
        window = self.windows[group]
        return 0 if window is None else max(tokens - window + 1, 0) // self.page_size

    def longest(self, limit: int) -> int:
        """The most tokens, at most `limit`, after which a sequence can go on: every group has the
        pages that the next token sees.
        """
        tokens = usable(min(limit, self.tokens), self.page_size, self.keep)
        if all(window is None for window in self.windows):
            return tokens
        # Where the run of pages that a group has, up to and with each page, begins.
        begins: list[list[int]] = []
        for group, window in enumerate(self.windows):
            start, starts = 0, []
            for place, node in enumerate(self.nodes):
                if node.pages[group] is None:
                    start = place + 1
                starts.append(start)
            if window is not None:
                begins.append(starts)
        windowed = [group for group, window in enumerate(self.windows) if window is not None]
        while tokens > 0:
            last = -(-tokens // self.page_size) - 1
            if all(
                starts[last] <= self.first_page(group, tokens)
                for group, starts in zip(windowed, begins, strict=True)
            ):
                return tokens
            tokens = last * self.page_size
        return 0


def usable(tokens: int, page_size: int, keep: int | None) -> int:
    """How many of a sequence's first tokens pages can hold for another that goes on there: all, or
    those of whole pages where the last page is compressed (`Match.keep`).
    """
    if keep is None or tokens // page_size < keep:
        return tokens
    return tokens - tokens % page_size
