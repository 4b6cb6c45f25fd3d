"""How dataclasses declare options of commands."""

from __future__ import annotations

from typing import Annotated, TypeVar

from tyro.conf import arg

T = TypeVar("T")
Maybe = Annotated[T | None, arg(help_behavior_hint="")]  # its help says what the default is
