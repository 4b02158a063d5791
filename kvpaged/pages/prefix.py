"""The prefix index: which tokens the pages in memory hold, as a tree.

    region (namespace)      no page; its children are first pages
      page "a"              tokens 0 .. 15 of everything that begins so
        page "b"
        page "c"            two continuations
          region (salt)     no page; what one tenant's sequences go on with from here

A node is one logical page: its tokens, its key, and a physical page in each layer group. Children
are found by their tokens, exactly: nothing is hashed to find a page, a hit compares its tokens, and
a page's key is computed once, when the page enters the tree. A node of another salt or namespace is
in another region, which no search of this one touches.
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kvpaged.errors import IntegrityError
from kvpaged.keys import TOKEN_BYTES, Region
from kvpaged.pages.allocator import CACHED, FREE, OPEN
from kvpaged.pages.mixed import AnyAllocator
from kvpaged.pages.trail import Match, Node, Trail, usable


class PrefixIndex:
    """The trees of a cache, over the pages of its allocators (one a layer group).

    Used under the cache's lock. Invariants:
      1. A page in the tree is kept by its allocator (`depths`), and the other way round.
      2. A node has a page in every group without a window, or is the start of a region.
      3. A node without pages has children (groups with a window only).
      4. Bytes under a node never change: pages in the tree are sealed or cached.
    """

    def __init__(
        self, allocators: Sequence[AnyAllocator], windows: Sequence[int | None], page_size: int,
        keep: int | None = None,
    ) -> None:  # fmt: skip
        """`keep`: see `Match`."""
        self._allocators = tuple(allocators)
        self._windows = tuple(windows)
        self._whole = tuple(g for g, window in enumerate(windows) if window is None)
        self._size = page_size
        self._keep = keep
        self._roots: weakref.WeakValueDictionary[bytes, Node] = weakref.WeakValueDictionary()
        self._nodes: tuple[dict[int, Node], ...] = tuple({} for _ in allocators)  # by page
        self.visited = 0
        """Nodes that searches have looked at."""
        self.evicted = 0
        """Pages that went: memory was needed, or `clear` was called."""
        self.on_enter: Callable[[Node, int, int], None] | None = None
        """Called with each page that enters: node, group, page."""
        self.on_leave: Callable[[Node, int, int], None] | None = None
        """Called with each page that is to go, while its bytes are there."""
        for group, allocator in enumerate(allocators):
            allocator.on_evict = functools.partial(self._evict, group)

    def root(self, namespace: bytes, extra: bytes = b"") -> Node:
        """The region of a namespace (and what else its bytes depend on)."""
        name = len(namespace).to_bytes(8, "big") + namespace + extra
        found = self._roots.get(name)
        if found is None:
            region = Region.of(namespace, extra)
            found = self._roots[name] = Node(None, region, b"", region.first)
        return found

    def pages(self, group: int = 0) -> int:
        """Pages of a group in the trees."""
        return len(self._nodes[group])

    def node_of(self, group: int, page: int) -> Node | None:
        """The node that has a page of a group."""
        return self._nodes[group].get(page)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer group: tokens a query sees, or `None`."""
        return self._windows

    @property
    def page_size(self) -> int:
        """Token slots a page."""
        return self._size

    def usable(self, tokens: int) -> int:
        """See `usable`."""
        return usable(tokens, self._size, self._keep)

    # -- searching ---------------------------------------------------------------------------------

    def find(self, trail: Trail, tokens: bytes, limit: int) -> Match:
        """The longest prefix of encoded `tokens`, at most `limit` of them, that is in memory.

        One dictionary access a page; no key is computed, nothing changes.
        """
        full = limit // self._size
        nodes: list[Node] = []
        turn = full if trail.salt is None else min(trail.salt_page, full)
        node = self._walk(trail.root, tokens, turn, nodes)
        if len(nodes) == turn and trail.enters(node, turn):
            salted = node.salted(trail.salt or b"", make=False)
            if salted is None:
                return self._match(nodes, len(nodes) * self._size)
            node = self._walk(salted, tokens, full, nodes)
        width = self._size * TOKEN_BYTES
        rest = tokens[len(nodes) * width : min(limit * TOKEN_BYTES, (len(nodes) + 1) * width)]
        part = node.nearest(rest) if rest else None
        if part is None:
            return self._match(nodes, len(nodes) * self._size)
        self.visited += 1
        return self._match([*nodes, part[0]], len(nodes) * self._size + part[1])

    def _walk(self, node: Node, tokens: bytes, full: int, nodes: list[Node]) -> Node:
        """Follow full pages from `node` while they agree, up to `full` of them in `nodes`."""
        width = self._size * TOKEN_BYTES
        before = len(nodes)
        for start in range(before * width, full * width, width):
            child = node.children.get(tokens[start : start + width])
            if child is None:
                break
            nodes.append(child)
            node = child
        self.visited += len(nodes) - before + 1
        return node

    def _match(self, nodes: list[Node], tokens: int) -> Match:
        return Match(nodes, tokens, self._size, self._windows, self._keep)

    # -- entering and leaving ----------------------------------------------------------------------

    def enter(self, trail: Trail, tokens: bytes, pages: Sequence[int | None]) -> Node | None:
        """Put the next full page of a sequence into the tree, and move its trail on.

        Args:
            trail: of the sequence; it stands before this page.
            tokens: the page's, encoded.
            pages: its sealed page in each group; `None` in a group that has given it back.

        Returns:
            The node: its `pages` are those given, or those of the same tokens that were there
            first, which the sequence should hold instead. `None`: the trail has been lost (the
            page before was evicted), nothing entered.
        """
        before = trail.node
        if trail.enters(before, before.depth):
            before = before.salted(trail.salt or b"", make=True) or before
        node = before.children.get(tokens)
        if node is None:
            if not before.reachable() or any(pages[g] is None for g in self._whole):
                return None
            node = Node(before, before.region, tokens, before.region.page_key(before.key, tokens))
            node.pages = [None] * len(pages)
            before.add(node)
        held = node.pages
        for group, page in enumerate(pages):
            if page is not None and held[group] is None:
                held[group] = page
                self._nodes[group][page] = node
                self._allocators[group].keep(page, node.depth)
                if self.on_enter is not None:
                    self.on_enter(node, group, page)
        trail.node = node
        return node

    def clear(self) -> None:
        """Free every cached page. Pages somebody holds stay in the tree."""
        for allocator in self._allocators:
            while allocator.evict_oldest():
                pass

    def _evict(self, group: int, page: int) -> None:
        """A cached page goes: the node loses it, and its other pages if it is of no use without."""
        node = self._nodes[group].pop(page)
        if self.on_leave is not None:
            self.on_leave(node, group, page)
        node.pages[group] = None
        self.evicted += 1
        if group in self._whole:
            for other, rest in enumerate(node.pages):
                if rest is not None:
                    del self._nodes[other][rest]
                    if self.on_leave is not None:
                        self.on_leave(node, other, rest)
                    node.pages[other] = None
                    self._allocators[other].drop(rest)
                    self.evicted += 1
        self._prune(node)

    def _prune(self, node: Node) -> None:
        """Take a node without pages and children out, and those before it that it leaves so."""
        while node.parent is not None and node.tokens:
            if node.children or node.has_salts() or any(page is not None for page in node.pages):
                return
            parent = node.parent
            parent.remove(node)
            node = parent
            if not node.tokens and node.parent is not None:  # the start of a salt's region
                node = node.parent

    # -- looking after itself ----------------------------------------------------------------------

    def nodes(self) -> Iterator[Node]:
        """Every node that has a page, once."""
        seen: set[int] = set()
        for by_page in self._nodes:
            for node in by_page.values():
                if id(node) not in seen:
                    seen.add(id(node))
                    yield node

    def check_integrity(self) -> None:
        """Raise `IntegrityError` naming the first invariant that does not hold."""
        for group, allocator in enumerate(self._allocators):
            kept = set(np.flatnonzero(allocator.depths).tolist())
            if kept != set(self._nodes[group]):
                odd = sorted(kept ^ set(self._nodes[group]))
                raise IntegrityError(
                    f"group {group}: pages {odd[:8]} are kept and in no tree, or the reverse"
                )
            for page, node in self._nodes[group].items():
                if node.pages[group] != page or allocator.states[page] in (FREE, OPEN):
                    raise IntegrityError(
                        f"group {group}, page {page}: in the tree as {node.pages[group]}, state "
                        f"{allocator.states[page]}"
                    )
                if allocator.depths[page] != node.depth:
                    raise IntegrityError(f"group {group}, page {page}: kept at another depth")
        for node in self.nodes():
            self._check_node(node)

    def _check_node(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children.get(node.tokens) is not node or not node.attached:
            raise IntegrityError(f"a page at depth {node.depth} can't be reached")
        if parent.region.page_key(parent.key, node.tokens) != node.key:
            raise IntegrityError(f"the page at depth {node.depth} has the key of other tokens")
        if sorted(node.children) != node.ordered():
            raise IntegrityError(f"the page at depth {node.depth}: its continuations are unsorted")
        for group in self._whole:
            page = node.pages[group]
            if page is None:
                raise IntegrityError(f"the page at depth {node.depth} lacks group {group}")
            above = parent.pages[group] if parent.tokens else None
            if above is None:
                continue
            states = self._allocators[group].states
            if states[above] == CACHED and states[page] != CACHED:
                raise IntegrityError(f"group {group}: page {page} is held, {above} before it not")
