"""What requests and answers of the API are: their fields, ranges, and words for both."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt

MOST_TOKENS = 16_384  # of an image, more than any tokenizer here has
WORD = 2**63

ClassName = Annotated[str, Field(max_length=200)]
ModelName = Annotated[str, Field(max_length=200)]
Code = Annotated[StrictInt, Field(ge=-1, lt=2**31)]
Codes = Annotated[list[Code], Field(min_length=1, max_length=MOST_TOKENS)]
Mask = Annotated[list[StrictBool], Field(min_length=1, max_length=MOST_TOKENS)]
Seed = Annotated[StrictInt, Field(ge=-WORD, lt=WORD)]
Scale = Annotated[FiniteFloat, Field(ge=-100, le=100)]
Temperature = Annotated[FiniteFloat, Field(ge=0.01, le=100)]
TopK = Annotated[StrictInt, Field(ge=0, lt=2**31)]
TopP = Annotated[FiniteFloat, Field(gt=0, le=1)]
Share = Annotated[FiniteFloat, Field(ge=0, le=1)]


class Strict(BaseModel):
    """Unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid")


class SamplingSettings(Strict):
    """How to draw; what is left out is as the pipeline was made with. See `ctf sample --help`."""

    guidance: Scale | None = None
    fine_guidance: Scale | None = None
    temperature: Temperature | None = None
    fine_temperature: Temperature | None = None
    top_k: TopK | None = None
    fine_top_k: TopK | None = None
    top_p: TopP | None = None
    fine_top_p: TopP | None = None
    guidance_schedule: Literal["constant", "linear", "cosine"] | None = None
    guidance_window: tuple[Share, Share] | None = None

    def given(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class Asked(Strict):
    """What requests that draw have in common."""

    model: ModelName | None = Field(None, description="by default the first")
    settings: SamplingSettings = SamplingSettings()


class GenerateRequest(Asked):
    """Images to draw: `count` of each class, image i from seed + i."""

    classes: list[StrictInt | ClassName] = Field(
        min_length=1, max_length=1024, description="numbers or names"
    )
    count: Annotated[StrictInt, Field(ge=1, le=1024)] = 1
    seed: Seed = 0
    codes: list[Codes] | None = Field(
        None, max_length=1024, description="codes that are given: a list for each image, or one"
    )
    keep: list[Mask] | None = Field(
        None, max_length=1024, description="which of them stay; the rest is drawn"
    )
    preview: StrictBool = Field(True, description="previews in the event stream")


class RefineRequest(Asked):
    """Coarse labels to draw details for, image i from seed + i."""

    classes: list[StrictInt | ClassName] = Field(min_length=1, max_length=1024)
    coarse: list[Codes] = Field(
        min_length=1, max_length=1024, description="labels: a list for each class, or one for all"
    )
    seed: Seed = 0


class MembersRequest(Asked):
    """A token of an image to look at."""

    chosen: StrictInt | ClassName = Field(alias="class", description="number or name")
    codes: Codes = Field(description="of the whole image")
    position: Annotated[StrictInt, Field(ge=0, lt=MOST_TOKENS)]


Png = Annotated[str, Field(description="a PNG file in base64")]


class Picture(BaseModel):
    model: str
    class_number: int
    class_name: str
    seed: int
    image: Png
    codes: list[int]
    coarse: list[int]
    settings: dict[str, Any] = Field(
        description="saved as a file, `ctf sample --settings FILE --out a.png` draws the same bytes"
    )


class Pictures(BaseModel):
    pictures: list[Picture]


class Encoded(BaseModel):
    original: Png
    coarse: Png
    picture: Picture


class Member(BaseModel):
    code: int
    probability: float
    image: Png


class ClusterMembers(BaseModel):
    cluster: int
    position: int
    members: list[Member] = Field(description="the likeliest first")


class ModelInfo(BaseModel):
    name: str
    class_names: list[str]
    image_size: int
    grid: int = Field(description="tokens along each side")
    codebook_size: int
    clusters: int
    has_fine_stage: bool
    sampling: dict[str, Any] = Field(description="what settings are by default")
    parameters: dict[str, int]
    license: str | None
    images: int = Field(description="that a request may ask for")


class Models(BaseModel):
    models: list[ModelInfo]
    upload_bytes: int
    upload_pixels: int


class Health(BaseModel):
    status: Literal["ok"]
    version: str
    models: dict[str, dict[str, int]] = Field(description="requests that wait and that run")


class Mistake(BaseModel):
    """The answer to what cannot be done."""

    reason: str
    where: str | None = None
