"""Options: optional values, former names, and settings that are not given."""

import dataclasses
from pathlib import Path

import pytest

from ctf.cli.common import app
from ctf.cli.options import ExecutionOptions, ImageOptions, registry
from ctf.models.sampling import Sampling
from tests.conftest import Command


def parse(*arguments: str) -> dict[str, object]:
    """The keyword arguments of the function that the command line calls."""
    keywords: dict[str, object] = app.cli(args=arguments, registry=registry).keywords
    return keywords


def test_optional_values_are_parsed_as_their_type() -> None:
    fit = ("fit", "discs", "--out", "run")
    assert parse(*fit)["steps"] is None and parse(*fit)["views"] is None
    options = parse(*fit, "--steps", "3", "--minutes", "2.5", "--views", "ten-crop")
    assert (options["steps"], options["minutes"], options["views"]) == (3, 2.5, "ten-crop")
    options = parse(*fit, "--steps", "None", "--views", "None")
    assert options["steps"] is None and options["views"] is None


def test_groups_of_options_are_dataclasses() -> None:
    options = parse(
        "fit", "discs", "--out", "run", "--skip-bad", "--background", "red", "--compile"
    )
    assert options["image_options"] == ImageOptions(background="red", skip_bad=True)
    assert options["execution"] == ExecutionOptions(compile=True)
    assert options["out"] == Path("run")


def test_sampling_options_are_those_that_are_given() -> None:
    assert parse("sample", "run")["sampling"] == {}
    expected = {"guidance": 3.0, "top_k": 5, "guidance_window": (0.2, 0.8), "fine_top_p": 0.5}
    arguments = ["--guidance", "3", "--top-k", "5", "--guidance-window", "0.2", "0.8"]
    options = parse("sample", "run", *arguments, "--fine-top-p", "0.5")
    assert options["sampling"] == expected
    Sampling(**expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "former", "name", "value"),
    [
        (["cost", "tiny"], "--pictures", "images", 5),
        (["bench", "tokens"], "--pictures", "encoded", 5),
        (["push", "run", "--to", "me/discs"], "--no-picture", "sheet", False),
    ],
)
def test_former_names_of_options_still_work(
    command: list[str], former: str, name: str, value: object
) -> None:
    arguments = [former] if value is False else [former, str(value)]
    assert parse(*command, *arguments)[name] == value
    present = f"--no-{name}" if value is False else f"--{name}"
    assert parse(*command, present, *arguments[1:])[name] == value


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_sampling_options_are_the_fields_of_sampling(ctf: Command, command: str) -> None:
    shown = ctf(command, "--help").out
    for field in dataclasses.fields(Sampling):
        assert f"--{field.name.replace('_', '-')} " in shown


@pytest.mark.parametrize(
    ("command", "present", "former"),
    [
        (["cost"], "--images INT", "--pictures INT"),
        (["bench", "tokens"], "--encoded INT", "--pictures INT"),
        (["push"], "--sheet, --no-sheet", "--picture"),
    ],
)
def test_help_shows_present_names_before_former_ones(
    ctf: Command, command: list[str], present: str, former: str
) -> None:
    shown = ctf(*command, "--help").out
    assert 0 < shown.index(present) < shown.index(former)


@pytest.mark.parametrize("window", ["0", "fast"])
def test_windows_that_are_none_are_refused(ctf: Command, tmp_path: Path, window: str) -> None:
    result = ctf("sample", "fashion-mnist", "--window", window, "--out", tmp_path / "out")
    assert result.code == 2 and f"window: got '{window}', expected auto, or 1 or more" in result.err
    assert not (tmp_path / "out").exists()


def test_any_window_samples_the_same_files(ctf: Command, tmp_path: Path) -> None:
    command = ("sample", "fashion-mnist", "--classes", "bag", "--count", 1, "--window")
    for window in (1, 16, "auto"):
        assert ctf(*command, window, "--out", tmp_path / str(window)).code == 0
    first, *others = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / str(w)).iterdir())}
        for w in (1, 16, "auto")
    )
    assert all(other == first for other in others)
