"""The page table: who owns which page of the KV cache, and which are free. Host only, no JAX."""

from __future__ import annotations


class PageTable:
    """Owns the ids 0..num_pages-1; each is free or belongs to one slot.

    A slot's pages are in the order of its tokens: page i holds the tokens from position
    i * page_length on. Paging as in Kwon et al., "Efficient Memory Management for Large Language
    Model Serving with PagedAttention", 2023.
    """

    def __init__(self, *, num_slots: int, num_pages: int, page_length: int) -> None:
        self.num_pages = num_pages
        self.page_length = page_length
        self._free = list(reversed(range(num_pages)))
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_pages_for(self, length: int) -> int:
        """The number of pages that hold `length` tokens."""
        return -(-length // self.page_length)

    def pages(self, slot: int) -> tuple[int, ...]:
        """The page ids of the slot, in the order of its tokens."""
        return tuple(self._owned[slot])

    def num_owned(self, slot: int) -> int:
        return len(self._owned[slot])

    def num_missing(self, slot: int, length: int) -> int:
        """How many more pages the slot needs to hold `length` tokens."""
        return max(0, self.num_pages_for(length) - self.num_owned(slot))

    def grow(self, slot: int, length: int) -> tuple[tuple[int, int], ...]:
        """Give the slot the pages it lacks for `length` tokens, which must be free.

        Returns (index in the slot's pages, page id) of each new page.
        """
        num_missing = self.num_missing(slot, length)
        assert num_missing <= self.num_free, f"{num_missing} pages wanted, {self.num_free} free"
        first = self.num_owned(slot)
        new = [self._free.pop() for _ in range(num_missing)]
        self._owned[slot] += new
        return tuple(enumerate(new, start=first))

    def release(self, slot: int) -> None:
        """Take all pages back from the slot."""
        self._free += reversed(self._owned[slot])
        self._owned[slot] = []
