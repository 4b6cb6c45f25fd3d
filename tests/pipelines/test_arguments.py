"""The arguments of `Pipeline`'s methods: classes by name or number, and errors."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctf.common.errors import UserError
from ctf.pipelines.arguments import class_numbers, split_class_names
from ctf.pipelines.pipeline import Pipeline
from tests.conftest import CLASSES as NAMES
from tests.pipelines.helpers import ALL_L, CLASSES, CODES_BL, LENGTH, UPPER_L, same


def test_classes_are_given_by_name_or_number(pipe: Pipeline) -> None:
    assert pipe.class_names == NAMES == ("blue", "green", "red")
    assert pipe.class_numbers(["red", 0, "1", np.int64(2)]) == [2, 0, 1, 2]
    assert same(pipe.sample(["red", "blue"], seed=1), pipe.sample([2, 0], seed=1))


def test_a_name_that_is_a_number_takes_precedence(pipe: Pipeline) -> None:
    named = dataclasses.replace(pipe, class_names=("2", "1", "0"))
    assert named.class_numbers(["2", "0", 2]) == [0, 2, 2]


def test_text_is_a_name_first_and_a_number_is_a_position(pipe: Pipeline) -> None:
    twelve = tuple(map(str, range(12)))  # natural order: both are the same
    assert class_numbers(twelve, ["10", 10, "2", 2]) == [10, 10, 2, 2]
    from_1 = tuple(map(str, range(1, 13)))
    assert class_numbers(from_1, ["10", "12", 10, "0", 0]) == [9, 11, 10, 0, 0]
    with pytest.raises(UserError, match=r"class 12 of 12.*; as text, '12' is a name"):
        class_numbers(from_1, [12])


def test_a_number_that_is_another_class_name_is_told(pipe: Pipeline) -> None:
    from_1 = dataclasses.replace(pipe, class_names=("1", "2", "3"))
    with pytest.warns(UserWarning, match="class 1 is the one at position 1, '2'; .* write '1'"):
        first = from_1.sample([1], seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for classes in (["2"], np.array([1]), range(1, 2)):
            assert same(from_1.sample(classes, seed=3), first)  # type: ignore[arg-type]
        from_1.sample([0], seed=3)  # no class has the name 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tench, Tinca tinca", ["tench, Tinca tinca"]),
        ("tench, Tinca tinca,bag", ["tench, Tinca tinca", "bag"]),
        ("bag, tench, Tinca tinca ,0", ["bag", "tench, Tinca tinca", "0"]),
        ("tench", ["tench"]),
        ("a,b", ["a,b"]),
        ("a,a,b,b", ["a", "a,b", "b"]),
        ("b,a", ["b", "a"]),
        (" spaced ,bag", [" spaced ", "bag"]),
        ("", [""]),
        ("bag,,bag", ["bag", "", "bag"]),
    ],
)
def test_classes_are_split_at_commas_but_whole_names_win(text: str, expected: list[str]) -> None:
    names = ("tench, Tinca tinca", "bag", "a,b", "a", "b", " spaced ")
    assert split_class_names(names, text) == expected


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4, unique=True))
def test_any_class_can_be_chosen_by_its_name(names: list[str]) -> None:
    for number, name in enumerate(names):
        assert class_numbers(names, split_class_names(names, name)) == [number]


def test_seeds_are_integers_of_any_kind(pipe: Pipeline) -> None:
    expected = pipe.sample([0, 1], seed=3)
    for seed in (
        np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32),
        np.array([3, 4]), torch.tensor([3, 4]), [np.int32(3), torch.tensor(4)], (3, 4), range(3, 5),
    ):  # fmt: skip
        assert same(pipe.sample([0, 1], seed=seed), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "seed", [True, np.bool_(True), torch.tensor(True), 0.5, np.float32(1), torch.tensor(1.0), "3",
             None, [0.5, 1], [True, 1]],
)  # fmt: skip
def test_other_seeds_are_refused(pipe: Pipeline, seed: Any) -> None:
    with pytest.raises(UserError, match=r"seed: got .*, expected a whole number, or one for each"):
        pipe.sample([0, 1], seed=seed)


@pytest.mark.parametrize("classes", ["red", 0])
def test_a_single_class_is_not_a_list(pipe: Pipeline, classes: Any) -> None:
    with pytest.raises(UserError, match=r"classes: got .*, expected a list"):
        pipe.sample(classes)


def test_a_class_that_is_not_an_integer_is_a_type_error(pipe: Pipeline) -> None:
    with pytest.raises(TypeError):
        pipe.sample([0.5])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        pipe.sample([True])


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        ([3], {}, "class 3 of 3: expected 0 to 2, or a name: blue, green, red"),
        ([-1], {}, "class -1 of 3"),
        (["gren"], {}, "unknown class 'gren': did you mean 'green'?"),
        (["7"], {}, "class 7 of 3"),
        ([], {}, "got 0 images to sample, expected 1 or more"),
        ([0], {"guidence": 2.0}, "unknown setting 'guidence': did you mean 'guidance'?"),
        ([0], {"temperature": 0.0}, "temperature: got 0.0"),
        ([0], {"fine_top_p": 1.5}, "fine_top_p: got 1.5"),
        ([0], {"top_k": -1}, "top_k: got -1"),
        ([0], {"guidance_window": (1, 0)}, "guidance_window: got (1, 0)"),
        ([0], {"guidance_schedule": "lin"}, "got 'lin': did you mean 'linear'?"),
        ([0], {"seed": 2**64}, "seed: got 18446744073709551616"),
        ([0], {"seed": [2**64]}, "seed: got"),
        ([0, 1, 2], {"seed": [3, 4]}, "got 2 seeds, expected 3: one for each image"),
        ([0], {"resize": 0}, "resize: got 0"),
    ],
)
def test_classes_seeds_and_settings(
    pipe: Pipeline, classes: list[Any], settings: dict[str, Any], message: str
) -> None:
    calls: tuple[Callable[[], object], ...] = (
        lambda: pipe.sample(classes, **settings),
        lambda: pipe.stream(classes, **settings),  # raised by the call, not by the first event
        lambda: pipe.refine(classes, torch.zeros(LENGTH, dtype=torch.int64), **settings),
    )
    for call in calls:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": CODES_BL}, "codes and known: got one of them, expected both or neither"),
        ({"known": UPPER_L}, "codes and known: got one of them"),
        (
            {"codes": CODES_BL, "known": UPPER_L.long()},
            "known: got torch.int64, expected torch.bool",
        ),
        (
            {"codes": CODES_BL.float(), "known": UPPER_L},
            "codes: got torch.float32, expected integers",
        ),
        ({"codes": UPPER_L, "known": UPPER_L}, "codes: got torch.bool, expected integers"),
        (
            {"codes": CODES_BL[:2], "known": UPPER_L},
            "codes: got shape (2, 16), expected (4, 16), or (16,) for all images",
        ),
        ({"codes": CODES_BL[:, :15], "known": UPPER_L}, "codes: got shape (4, 15)"),
        ({"codes": CODES_BL.view(4, 4, 4), "known": UPPER_L}, "codes: got shape (4, 4, 4)"),
        (
            {"codes": CODES_BL, "known": UPPER_L[None, :1]},
            "known: got shape (1, 1), expected (4, 16)",
        ),
        ({"codes": CODES_BL + 1, "known": ALL_L}, "codes: got 1 to 64, expected 0 to 63"),
        ({"codes": CODES_BL - 1, "known": ALL_L}, "codes: got -1 to 62, expected 0 to 63"),
    ],
)
def test_known_codes(sharp: Pipeline, arguments: dict[str, Any], message: str) -> None:
    for method in (sharp.sample, sharp.stream):
        with pytest.raises(UserError) as error:
            method(CLASSES, **arguments)
        assert message in str(error.value)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, LENGTH), "coarse: got torch.float32, expected integers"),
        (torch.zeros(3, LENGTH).long(), "coarse: got shape (3, 16), expected (4, 16)"),
        (torch.full((LENGTH,), 8), "coarse: got 8 to 8, expected 0 to 7"),
        (torch.full((LENGTH,), -1), "coarse: got -1 to -1, expected 0 to 7"),
    ],
)
def test_coarse_labels(sharp: Pipeline, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError) as error:
        sharp.refine(CLASSES, labels)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.zeros(LENGTH).long(),
            "coarse: got shape (16,), expected (B, T) with 1 to 16 labels",
        ),
        (torch.zeros(4, 0).long(), "coarse: got shape (4, 0)"),
        (torch.zeros(4, LENGTH), "coarse: got torch.float32, expected integers"),
        (torch.zeros(4, LENGTH).long() + 8, "expected -1 to 7"),
        (torch.zeros(4, LENGTH).long() - 2, "got -2 to -2, expected -1 to 7"),
    ],
)
def test_labels_of_a_preview(sharp: Pipeline, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError) as error:
        sharp.preview(labels)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("class_id", "length", "position", "message"),
    [
        (0, 16, 16, "position: got 16, expected 0 to 15"),
        (0, 16, -1, "position: got -1"),
        (0, 5, 0, "coarse: got shape (5,)"),
        ("violet", 16, 0, "unknown class 'violet'"),
    ],
)
def test_a_token_and_its_members(
    sharp: Pipeline, class_id: int | str, length: int, position: int, message: str
) -> None:
    with pytest.raises(UserError) as error:
        sharp.members(class_id, torch.zeros(length).long(), position)
    assert message in str(error.value)


def test_no_images_to_encode(sharp: Pipeline) -> None:
    with pytest.raises(UserError, match="got 0 images to encode, expected 1 or more"):
        sharp.encode([])
