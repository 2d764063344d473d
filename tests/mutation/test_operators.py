"""What is changed in a module, and what is left alone."""

from __future__ import annotations

import pytest

from tests.mutation.operators import apply, difference, mutants


def changed(source: str) -> set[str]:
    """The changed lines of every mutant of a function body of one line."""
    return {difference(f"def f(a, b):\n    {source}\n", m)[1] for m in mutants(f"def f(a, b):\n    {source}\n")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("return a < b", {"return (a <= b)"}),
        ("return a >= b", {"return (a > b)"}),
        ("return a != b", {"return (a == b)"}),
        ("return a < b <= c", {"return (a <= b <= c)", "return (a < b < c)"}),
        ("return a is not None", {"return (a is None)"}),
        ("return a not in b", {"return (a in b)"}),
        # Only the operator changes: what was multiplied first still is.
        ("return a * b // c", {"return (a + b) // c", "return (a * b * c)"}),
        ("return (a + b) * c", {"return ((a - b)) * c", "return ((a + b) + c)"}),
        ("return a - b % c", {"return (a + b % c)", "return a - (b // c)"}),
        ("return a and b or c", {"return (a or b) or c", "return (a and b and c)"}),
        ("return not a", {"return (a)"}),
        ("return ~a", {"return (a)"}),
        ("return a if b else c", {"return (c if b else a)"}),
        ("return True", {"return False"}),
        ("return 5", {"return 6", "return 4"}),
        ("return 0", {"return 1", "return (-1)"}),
        ("return f(side='left')", {'return f(side="right")'}),
        ("return zip(a, b, strict=True)", set[str]()),
        ("return a['x']", {'return a["XXx"]'}),
        ("return a[b:c]", {"return a[:c]", "return a[b:]"}),
        ("return np.minimum(a, b)", {"return np.maximum(a, b)"}),
        ("return a.min()", {"return a.max()"}),
        ("return min(a, b)", {"return max(a, b)"}),
        ("return np.add.reduceat(a, b)", {"return np.subtract.reduceat(a, b)"}),
        ("return np.searchsorted(a, b)", {'return np.searchsorted(a, b, side="right")'}),
        ("return np.where(a, b, c)", {"return np.where(a, c, b)"}),
        ("return np.lexsort((a, b))", {"return np.lexsort((a, ))", "return np.lexsort((b, ))"}),
        ("return a.copy()", {"return a"}),
        ("return sorted(a)", {"return (a)"}),
        ("g(a)", {"pass"}),
        ("a[b] = c", {"pass"}),
        ("a += b", {"pass", "a -= b"}),
        ("a |= (b)", {"pass", "a &= (b)"}),
        ("b = g(a)", {"pass"}),  # `b` had a value before
        ("c = g(a)", set[str]()),
        ("raise ValueError(f'{a} < 0')", {"pass"}),
        ("return [x for x in a if g(x)]", {"return [x for x in a if not (g(x))]"}),
    ],
)
def test_one_thing_is_changed_at_a_time(source: str, expected: set[str]) -> None:
    assert changed(source) == expected


def test_what_computes_no_number_is_left_alone() -> None:
    source = '''"""Docstring."""

from module import name

__all__ = ["f"]


@decorated(frozen=True)
class C:
    """Docstring."""

    field: list[int | None]


def f(a: int | None = None) -> Literal["x"]:
    """Docstring."""
    raise ValueError("text", 1 + 1)
'''
    assert [difference(source, mutant) for mutant in mutants(source)] == [('raise ValueError("text", 1 + 1)', "pass")]


def test_a_mutant_is_the_source_with_one_change() -> None:
    source = "# Ü\nx = 1\n\n\ndef f(y):\n    return g(\n        y,\n        2,\n    )\n"
    texts = {apply(source, mutant) for mutant in mutants(source)}
    assert texts == {
        source.replace("x = 1", "x = 2"),
        source.replace("x = 1", "x = 0"),
        source.replace("        2,", "        3,"),
        source.replace("        2,", "        1,"),
    }
    assert [(mutant.line, *difference(source, mutant)) for mutant in mutants(source)][-1] == (8, "2,", "3,")
