from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.pages import PageTable


def make_table(num_slots: int = 2, num_pages: int = 6, page_length: int = 4) -> PageTable:
    return PageTable(num_slots=num_slots, num_pages=num_pages, page_length=page_length)


@pytest.mark.parametrize(("length", "expected"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_page_is_begun_by_its_first_token(length: int, expected: int) -> None:
    assert make_table().num_pages_for(length) == expected


def test_a_slot_grows_by_what_it_lacks_and_keeps_its_order() -> None:
    table = make_table()
    first = table.grow(0, 5)
    assert [index for index, _ in first] == [0, 1]
    assert table.grow(0, 8) == ()
    table.grow(1, 1)
    (third,) = table.grow(0, 9)
    assert third[0] == 2
    assert table.pages(0) == (first[0][1], first[1][1], third[1])
    assert table.num_free == 2


def test_released_pages_serve_another_slot() -> None:
    table = make_table()
    pages = [page for _, page in table.grow(0, 24)]
    table.release(0)
    assert table.num_free == 6
    assert table.pages(0) == ()
    assert sorted(page for _, page in table.grow(1, 24)) == sorted(pages)


def test_growing_past_the_free_pages_is_our_own_mistake() -> None:
    table = make_table()
    with pytest.raises(AssertionError, match="7 pages wanted, 6 free"):
        table.grow(0, 25)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=40))
def test_every_page_is_free_or_owned_by_one_slot(steps: list[tuple[int, int]]) -> None:
    table = make_table(num_slots=4, num_pages=9, page_length=3)
    for slot, length in steps:
        if length == 0:
            table.release(slot)
        elif table.num_missing(slot, length) <= table.num_free:
            table.grow(slot, length)
            assert table.num_missing(slot, length) == 0
        owned = [page for other in range(4) for page in table.pages(other)]
        assert len(owned) == len(set(owned))
        assert set(owned) <= set(range(9))
        assert len(owned) + table.num_free == 9
