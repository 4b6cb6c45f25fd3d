"""Frozen dataclasses to JSON and back; unknown keys are errors that suggest the closest one."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from ctf.common.errors import UserError

T = TypeVar("T")

# Metadata of a field that `to_json` leaves out while it has its default: fields added later, so
# that the files of all that does not need them stay as they were, and older versions read them.
OMIT_DEFAULT = {"omit_default": True}


MOST_NAMES = 20  # listed in a message


def closest(got: str, known: Iterable[str]) -> str | None:
    """Return the known name that is closest to a misspelt one; None if none is close."""
    return next(iter(difflib.get_close_matches(got, list(known), n=1, cutoff=0.5)), None)


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """Return the end of a message "unknown name 'got'": the closest known name, or all of them."""
    names = list(known)
    if close := closest(got, names):
        return f": did you mean {close!r}?"
    return f": expected {list_names(names)}"


def list_names(names: Sequence[str]) -> str:
    """Return names separated by commas, at most MOST_NAMES of them."""
    return ", ".join([*names[:MOST_NAMES], *(["..."] if len(names) > MOST_NAMES else [])])


def to_json(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain dictionaries and lists, for `json.dumps` and `from_json`."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    _omit_defaults(config, plain)
    return plain


def _omit_defaults(config: Any, plain: dict[str, Any]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _omit_defaults(value, plain[field.name])
        elif field.metadata.get("omit_default") and value == field.default:
            del plain[field.name]


def from_json(kind: type[T], plain: Any, where: str) -> T:
    """Build a dataclass from what `to_json` returned.

    Args:
        kind: The dataclass.
        plain: Plain JSON values.
        where: Their source, e.g. a file, for error messages.

    Raises:
        UserError: A key is unknown or missing, or a value is of another type.
    """
    if not isinstance(plain, dict):
        raise UserError(f"{where}: got {type(plain).__name__}, expected an object with keys")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in plain:
        if key not in fields:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, fields)}")
    for name, field in fields.items():
        no_default = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if name not in plain and no_default:
            raise UserError(f"{where}: key {name!r} is missing")
    return kind(**{k: _parse(hints[k], v, f"{where}: {k}") for k, v in plain.items()})


def override(config: T, assignments: Sequence[str]) -> T:
    """Return `config` with values replaced, e.g. by ["coarse.width=128", "tokens.views=plain"].

    Raises:
        UserError: An assignment is not KEY=VALUE, a key is unknown, or a value of another type.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: expected KEY=VALUE, e.g. coarse.width=128")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        config = _replace(config, path.split("."), value, f"--set {path}")
    return config


def _replace(config: Any, path: list[str], value: Any, where: str) -> Any:
    names = [f.name for f in dataclasses.fields(config)]
    if path[0] not in names:
        raise UserError(f"{where}: unknown key {path[0]!r}{did_you_mean(path[0], names)}")
    if len(path) > 1:
        inner = getattr(config, path[0])
        if not dataclasses.is_dataclass(inner):
            raise UserError(f"{where}: {path[0]!r} is a single value, without keys")
        return dataclasses.replace(config, **{path[0]: _replace(inner, path[1:], value, where)})
    hint = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: _parse(hint, value, where)})


def _parse(hint: Any, value: Any, where: str) -> Any:
    """Return a JSON value as the type of a field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{where}: unknown value {value!r}{did_you_mean(str(value), args)}")
    if origin in (typing.Union, types.UnionType):  # of one type and None
        one = next(arg for arg in args if arg is not type(None))
        return None if value is None else _parse(one, value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(args[0], v, where) for v in value)
    if origin is dict and isinstance(value, dict):
        return {key: _parse(args[1], v, f"{where}: {key}") for key, v in value.items()}
    if hint is Any or _is_a(hint, value):
        return float(value) if hint is float else value
    raise UserError(f"{where}: got {value!r}, expected {getattr(hint, '__name__', str(hint))}")


def _is_a(hint: Any, value: Any) -> bool:
    """Return whether a plain value is of a plain type; an int is a float, a bool is no int."""
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(hint, type) and isinstance(value, hint)
