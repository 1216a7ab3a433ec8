"""Messages of several problems."""

from __future__ import annotations

from open_lm.errors import join_problems


def test_a_list_inside_a_list_of_problems_is_indented_under_its_number() -> None:
    inner = join_problems(["one", "two"], "B is wrong")
    assert join_problems([inner]) == inner
    assert join_problems(["A is wrong", inner], "Found").splitlines() == [
        "Found (2):",
        "  1. A is wrong",
        "  2. B is wrong (2):",
        "     1. one",
        "     2. two",
    ]
