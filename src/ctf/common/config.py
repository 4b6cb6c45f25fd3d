"""Frozen dataclasses <-> JSON. An unknown key is an error that says which one was meant."""

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


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`: did you mean 'x'?` or the list of what there is; to be put behind "unknown ... 'got'"."""
    names = list(known)
    close = difflib.get_close_matches(got, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]!r}?" if close else f": there is {', '.join(names)}"


def to_json(config: Any) -> dict[str, Any]:
    """A dataclass as plain dictionaries and lists, as `json.dumps` and `from_json` take it."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_json(kind: type[T], plain: Any, where: str) -> T:
    """The inverse of `to_json`. `where` names the source in errors, e.g. the file.

    Raises:
        UserError: an unknown key, a missing one, or a value of another type.
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
    """`config` with values replaced, e.g. `["coarse.width=128", "tokenizer.codebook_size=1024"]`.

    Raises:
        UserError: not `key=value`, an unknown key, or a value of another type.
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
            raise UserError(f"{where}: {path[0]!r} is a value and has no keys")
        return dataclasses.replace(config, **{path[0]: _replace(inner, path[1:], value, where)})
    hint = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: _parse(hint, value, where)})


def _parse(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{where}: unknown value {value!r}{did_you_mean(str(value), args)}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _parse(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_parse(args[0], v, where) for v in value)
    if origin is dict and isinstance(value, dict):
        if args[1] is Any:
            return value
        return {key: _parse(args[1], v, f"{where}: {key}") for key, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    is_bool = isinstance(value, bool)  # which is an int to isinstance
    if isinstance(hint, type) and isinstance(value, hint) and is_bool == (hint is bool):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}: got {value!r}, expected {name}")
