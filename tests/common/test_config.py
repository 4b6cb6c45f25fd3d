"""Configurations: to JSON and back, values replaced by the user, and messages of mistakes."""

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctf.common import config
from ctf.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    count: int
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    name: str = "plain"
    kind: Literal["round", "square"] = "round"
    flag: bool = False
    limit: int | None = None
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


OUTER = Outer(Inner(3))

finite = st.floats(allow_nan=False, allow_infinity=False)
outers = st.builds(
    Outer,
    inner=st.builds(
        Inner, count=st.integers(), rate=finite, sizes=st.lists(st.integers()).map(tuple)
    ),
    name=st.text(),
    kind=st.sampled_from(["round", "square"]),
    flag=st.booleans(),
    limit=st.none() | st.integers(),
    more=st.dictionaries(st.text(), st.integers() | st.text() | st.none()),
)


@given(outers)
def test_json_and_back(outer: Outer) -> None:
    text = json.dumps(config.to_json(outer))
    assert config.from_json(Outer, json.loads(text), "here") == outer


@dataclasses.dataclass(frozen=True)
class Grown:
    """A configuration that got fields later."""

    inner: Inner
    flag: bool = dataclasses.field(default=True, metadata=config.OMIT_DEFAULT)
    sizes: tuple[int, ...] | None = dataclasses.field(default=None, metadata=config.OMIT_DEFAULT)


def test_later_fields_are_left_out_while_they_have_their_defaults() -> None:
    plain = config.to_json(Grown(Inner(3)))
    assert plain == {"inner": config.to_json(Inner(3))}
    assert config.from_json(Grown, plain, "here") == Grown(Inner(3))
    other = Grown(Inner(3), flag=False, sizes=(1, 2))
    assert config.to_json(other) == {**plain, "flag": False, "sizes": [1, 2]}
    assert config.from_json(Grown, config.to_json(other), "here") == other


def test_missing_keys_have_their_defaults() -> None:
    assert config.from_json(Outer, {"inner": {"count": 3}}, "here") == OUTER


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"naem": "x"}, "here: unknown key 'naem': did you mean 'name'?"),
        ({"inner": {"count": 3, "Rate": 1.0}}, "here: inner: unknown key 'Rate'"),
        ({"inner": {"rate": 1.0}}, "here: inner: key 'count' is missing"),
        ({"inner": 3}, "here: inner: got int, expected an object with keys"),
        ({"inner": {"count": 3.5}}, "here: inner: count: got 3.5, expected int"),
        ({"inner": {"count": True}}, "here: inner: count: got True, expected int"),
        ({"inner": {"count": 3, "sizes": [1, "2"]}}, "sizes: got '2', expected int"),
        ({"inner": {"count": 3, "sizes": 1}}, "sizes: got 1, expected"),
        ({"flag": 1}, "here: flag: got 1, expected bool"),
        ({"limit": "1"}, "here: limit: got '1', expected int"),
        ({"kind": "squar"}, "here: kind: unknown value 'squar': did you mean 'square'?"),
        ({"more": []}, "here: more: got [], expected dict"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.from_json(Outer, {"inner": {"count": 3}, **change}, "here")
    assert message in str(caught.value)


def test_values_other_than_objects_are_refused() -> None:
    with pytest.raises(UserError, match="here: got list, expected an object"):
        config.from_json(Outer, [], "here")


def test_whole_numbers_are_numbers_too() -> None:
    rate = config.from_json(Inner, {"count": 1, "rate": 2}, "here").rate
    assert rate == 2.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("inner.count=7", dataclasses.replace(OUTER, inner=Inner(7))),
        ("inner.rate=1", dataclasses.replace(OUTER, inner=Inner(3, rate=1.0))),
        ("inner.sizes=[4]", dataclasses.replace(OUTER, inner=Inner(3, sizes=(4,)))),
        ("name=a=b", dataclasses.replace(OUTER, name="a=b")),
        ("kind=square", dataclasses.replace(OUTER, kind="square")),
        ("flag=true", dataclasses.replace(OUTER, flag=True)),
        ("limit=5", dataclasses.replace(OUTER, limit=5)),
        ("limit=null", OUTER),
    ],
)
def test_override(assignment: str, expected: Outer) -> None:
    assert config.override(OUTER, [assignment]) == expected


def test_later_overrides_win() -> None:
    assert config.override(OUTER, ["inner.count=7", "inner.count=8"]).inner.count == 8


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.count", "--set inner.count: expected KEY=VALUE"),
        ("inner.cuont=7", "--set inner.cuont: unknown key 'cuont': did you mean 'count'?"),
        ("iner.count=7", "--set iner.count: unknown key 'iner': did you mean 'inner'?"),
        ("name.count=7", "--set name.count: 'name' is a single value, without keys"),
        ("inner.count=many", "--set inner.count: got 'many', expected int"),
        ("inner=7", "--set inner: got int, expected an object with keys"),
        ("kind=oval", "--set kind: unknown value 'oval'"),
    ],
)
def test_wrong_overrides(assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.override(OUTER, [assignment])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_did_you_mean() -> None:
    assert config.did_you_mean("tinny", ["tiny", "small"]) == ": did you mean 'tiny'?"
    assert config.did_you_mean("x", ["tiny", "small"]) == ": expected tiny, small"
