"""Requests and responses of the API: their fields and ranges, as pydantic models.

The names of classes and fields are those of the OpenAPI schema; like all names in the API, they do
not change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, create_model

from ctf.models.sampling import Sampling

MAX_TOKENS = 16_384  # per image, more than any tokenizer has

Name = Annotated[str, Field(max_length=200)]
Code = Annotated[StrictInt, Field(ge=-1, lt=2**31)]
Codes = Annotated[list[Code], Field(min_length=1, max_length=MAX_TOKENS)]
Mask = Annotated[list[StrictBool], Field(min_length=1, max_length=MAX_TOKENS)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Png = Annotated[str, Field(description="a PNG file in base64")]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]

# What the API accepts for the fields of `Sampling`, those that begin with `fine_` too.
RANGES: dict[str, Any] = {
    "guidance": Annotated[FiniteFloat, Field(ge=-100, le=100)],
    "temperature": Annotated[FiniteFloat, Field(ge=0.01, le=100)],
    "top_k": Annotated[StrictInt, Field(ge=0, lt=2**31)],
    "top_p": Annotated[FiniteFloat, Field(gt=0, le=1)],
    "guidance_window": tuple[Fraction, Fraction],
}


class Strict(BaseModel):
    """A request without unknown fields."""

    model_config = ConfigDict(extra="forbid")


if TYPE_CHECKING:
    SamplingSettings = Strict
else:
    SamplingSettings = create_model(
        "SamplingSettings",
        __base__=Strict,
        __doc__="Sampling settings, see `ctf sample --help`; the model's own by default.",
        **{
            name: (RANGES.get(name.removeprefix("fine_"), kind) | None, None)
            for name, kind in get_type_hints(Sampling).items()
        },
    )


class SamplingRequest(Strict):
    """The fields of all requests that sample."""

    model: Name | None = Field(None, description="name; by default the first model")
    settings: SamplingSettings = SamplingSettings()


class GenerateRequest(SamplingRequest):
    """Images to sample: `count` of each class, image i from seed + i."""

    classes: list[StrictInt | Name] = Field(
        min_length=1, max_length=1024, description="numbers or names"
    )
    count: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    seed: Seed = 0
    codes: list[Codes] | None = Field(
        None, max_length=1024, description="known codes: a list for each image, or one for all"
    )
    keep: list[Mask] | None = Field(
        None, max_length=1024, description="which of the codes are known; the others are sampled"
    )
    preview: StrictBool = Field(True, description="send previews in the event stream")


class RefineRequest(SamplingRequest):
    """Coarse labels to sample the fine stage for, image i from seed + i."""

    classes: list[StrictInt | Name] = Field(min_length=1, max_length=1024)
    coarse: list[Codes] = Field(
        min_length=1, max_length=1024, description="labels: a list for each class, or one for all"
    )
    seed: Seed = 0


class MembersRequest(SamplingRequest):
    """A token of an image, whose cluster is requested."""

    class_name: StrictInt | Name = Field(alias="class", description="number or name")
    codes: Codes = Field(description="all codes of the image")
    position: Annotated[StrictInt, Field(ge=0, lt=MAX_TOKENS)]


class Picture(BaseModel):
    """An image, and all that it was generated from."""

    model: str
    class_number: int
    class_name: str
    seed: int
    image: Png
    codes: list[int]
    coarse: list[int]
    passes: int | None = Field(
        None, description="of the coarse model; as many as labels, or fewer where it guessed right"
    )
    settings: dict[str, Any] = Field(
        description="as a file, `ctf sample --settings FILE --out a.png` writes the same bytes"
    )


class Pictures(BaseModel):
    """Images, class by class."""

    pictures: list[Picture]


class Encoded(BaseModel):
    """An uploaded image: cropped, decoded from its coarse labels, decoded from its codes."""

    original: Png
    coarse: Png
    picture: Picture


class Member(BaseModel):
    """A code, its probability under the fine model, and the image with it."""

    code: int
    probability: float
    image: Png


class ClusterMembers(BaseModel):
    """The cluster of a token."""

    cluster: int
    position: int
    members: list[Member] = Field(description="most likely first")


class ModelInfo(BaseModel):
    """A model that the studio serves."""

    name: str
    class_names: list[str]
    image_size: int
    grid: int = Field(description="tokens per side")
    codebook_size: int
    clusters: int
    has_fine_stage: bool
    sampling: dict[str, Any] = Field(description="default settings")
    parameters: dict[str, int]
    license: str | None
    images: int = Field(description="maximum per request")


class Models(BaseModel):
    """All models, and the limits on uploads."""

    models: list[ModelInfo]
    upload_bytes: int
    upload_pixels: int


class Health(BaseModel):
    """The state of the studio."""

    status: Literal["ok"]
    version: str
    models: dict[str, dict[str, int]] = Field(description="waiting and running requests")


class Mistake(BaseModel):
    """An error: its reason, and the field of the request at fault."""

    reason: str
    where: str | None = None
