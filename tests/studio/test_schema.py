"""The schema of the API's requests."""

import dataclasses
from typing import Any

import pytest
from pydantic import ValidationError

from ctf.models.sampling import Sampling
from ctf.studio import schema


def test_settings_are_the_fields_of_sampling() -> None:
    default = Sampling()
    fields = [field.name for field in dataclasses.fields(Sampling)]
    assert list(schema.SamplingSettings.model_fields) == fields
    complete = schema.SamplingSettings.model_validate(vars(default))
    assert Sampling(**complete.model_dump()) == default
    assert schema.SamplingSettings().model_dump(exclude_none=True) == {}


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 101}, {"fine_guidance": float("nan")}, {"temperature": 0},
        {"top_k": 1.5}, {"top_p": 0}, {"fine_top_p": 2}, {"guidance_window": [0, 1.5]},
        {"guidance_window": [0.5]}, {"guidance_schedule": "lin"}, {"guidence": 1},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        schema.SamplingSettings.model_validate(settings)
