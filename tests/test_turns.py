"""Contestants of a benchmark take turns, and none waits for one that failed."""

import pytest
from conftest import ROOT


@pytest.fixture
def side_by_side(monkeypatch):
    """Return the function under test, which is no part of the package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from turns import side_by_side

    return side_by_side


def test_whoever_has_done_least_goes_next(side_by_side):
    order = []

    def contestant(name, shares):
        def run(report):
            for share in shares:
                order.append(name)
                report(share)
            return len(shares)

        return run

    results, seconds = side_by_side(dict(half=contestant("half", [0.5] * 2), quarter=contestant("quarter", [0.25] * 4)))
    assert order == ["half", "quarter", "quarter", "half", "quarter", "quarter"]
    assert results == dict(half=2, quarter=4)
    assert seconds.keys() == results.keys() and min(seconds.values()) > 0


def test_the_others_end_when_one_fails(side_by_side):
    ended = []

    def fails(report):
        report(0.5)
        raise ArithmeticError("on purpose")

    def ends(report):
        report(0.75)
        ended.append(True)

    with pytest.raises(ArithmeticError, match="on purpose"):
        side_by_side(dict(fails=fails, ends=ends))
    assert ended == [True]
