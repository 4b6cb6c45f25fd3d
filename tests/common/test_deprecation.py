"""Keyword arguments under their former names."""

import inspect
import warnings

import pytest

from ctf.common.deprecation import renamed_keywords


@renamed_keywords(keep="known", report="progress")
def example(size: int, *, known: int = 0, progress: str = "", **more: int) -> tuple[object, ...]:
    """An example."""
    return size, known, progress, more


def test_a_former_name_works_and_warns_at_the_call() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"example\(\): 'keep' is deprecated, use 'known'"
    ) as w:
        assert example(1, keep=2, other=3) == (1, 2, "", {"other": 3})
    assert w[0].filename == __file__
    with pytest.warns(DeprecationWarning) as w:
        assert example(1, keep=2, report="x") == (1, 2, "x", {})
    assert len(w) == 2


def test_the_new_name_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert example(1, known=2, progress="x") == (1, 2, "x", {})


def test_both_names_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"example\(\) got both 'known' and 'keep'"):
        example(1, keep=2, known=3)


def test_signature_and_docstring_stay() -> None:
    assert list(inspect.signature(example).parameters) == ["size", "known", "progress", "more"]
    assert example.__doc__ == "An example." and example.__name__ == "example"
