"""Reading a mapping into a record is strict, and its messages name the key."""

import dataclasses
import typing

import pytest

from dydit_jax.errors import InputError
from dydit_jax.records import read_mapping, read_record, require_range


@dataclasses.dataclass(frozen=True)
class Section:
    count: int
    rate: float = 0.5
    name: str = "a"
    limit: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    on: bool = False


def test_values_are_read_and_integers_pass_as_floats():
    section = read_record(Section, dict(count=3, rate=1, limit=2, pair=[1, 2]), "part")
    assert section == Section(3, rate=1.0, limit=2.0, pair=(1.0, 2.0))
    assert read_record(Section, dict(count=3, limit=None), "part").limit is None


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(count=3, naem="b"), "Unknown key part.naem; Did you mean part.name?"),
        (dict(count=3.5), "part.count must be of type int, not 3.5"),
        (dict(count=True), "part.count must be of type int, not True"),
        (dict(count=1, rate="fast"), "part.rate must be of type float, not 'fast'"),
        (dict(count=1, rate=float("nan")), "part.rate must be a finite number, not nan"),
        (dict(count=1, limit=float("-inf")), "part.limit must be a finite number, not -inf"),
        (dict(count=1, pair=(0.0, 10**400)), r"part.pair\[1\] must be a finite number, not 1000"),
        (dict(count=1, on=1), "part.on must be of type bool, not 1"),
        (dict(count=1, pair=[1.0]), "part.pair must have 2 values, not 1"),
        (dict(count=1, pair=7), "part.pair must be a tuple, not 7"),
        (dict(count=1, pair=[1.0, "b"]), r"part.pair\[1\] must be of type float"),
        (dict(), "part lacks count"),
        (7, "part must be a section with keys, not 7"),
    ],
)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(InputError, match=message.replace("?", r"\?")):
        read_record(Section, values, "part")


class Inner(typing.TypedDict):
    share: typing.Annotated[float, 0.0, 1.0]


class Outer(typing.TypedDict, total=False):
    names: tuple[str, ...]
    inner: Inner
    free: dict


def test_mapping_of_others_is_checked_in_the_keys_that_are_read():
    given = dict(names=["a"], inner=dict(share=1, more=None), free={"x": [1]}, other=7)
    read = dict(names=("a",), inner=dict(share=1.0, more=None), free={"x": [1]}, other=7)
    assert read_mapping(Outer, given, "part") == read
    assert read_mapping(Outer, dict(inner=None, other=None), "part") == dict(other=None)


@pytest.mark.parametrize(
    "mapping, message",
    [
        (7, "part must be a section with keys, not 7"),
        (dict(names="abc"), "part.names must be a tuple, not 'abc'"),
        (dict(free=[]), r"part.free must be of type dict, not \[\]"),
        (dict(inner={}), "part.inner lacks share"),
        (dict(inner=dict(share=None)), "part.inner lacks share"),
        (dict(inner=dict(share=2)), "part.inner.share must be from 0.0 to 1.0, not 2.0"),
        (dict(inner=dict(share=float("nan"))), "part.inner.share must be a finite number, not nan"),
        (dict(inner=dict(share=10**400)), "part.inner.share must be a finite number, not 1000"),
    ],
)
def test_wrong_values_of_others_are_refused_by_name(mapping, message):
    with pytest.raises(InputError, match=message):
        read_mapping(Outer, mapping, "part")


def test_ranges_say_what_is_allowed():
    require_range("x", 1, 0, 2)
    for low, high, allowed in ((2, None, "at least 2"), (None, 0, "at most 0"), (2, 3, "from 2 to 3")):
        with pytest.raises(InputError, match=f"x must be {allowed}, not 1"):
            require_range("x", 1, low, high)
    with pytest.raises(InputError):
        require_range("x", float("nan"), low=0.0)
