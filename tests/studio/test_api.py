"""The API: images are those of the pipeline, and any request gets a response or an error."""

import base64
import io
import json
import zlib
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from ctf import Pipeline
from ctf.pipelines import export
from ctf.studio import server
from tests.conftest import CLASSES, Command
from tests.serving import (
    LENGTH,
    LIMITS,
    expect_error,
    image_file,
    open_png,
    post,
    serving,
    stream,
)

CODES, KEEP = [[0] * LENGTH], [[True] * LENGTH]
JSON = {"Content-Type": "application/json"}


def upload(
    client: httpx2.Client, data: bytes, kind: str = "image/png", **query: str
) -> httpx2.Response:
    return client.post("/v1/encode", params=query, content=data, headers={"Content-Type": kind})


# --- Images ---------------------------------------------------------------------------------------


def test_images_are_those_of_the_pipeline(client: httpx2.Client, pipe: Pipeline) -> None:
    chosen = {"guidance": 3.0, "fine_guidance": 2.0, "fine_top_k": 3, "guidance_window": [0.1, 0.9]}
    response = post(client, "/v1/generate", classes=["red", 0], count=2, seed=5, settings=chosen)
    expected = pipe.sample([2, 2, 0, 0], 5, **{**chosen, "guidance_window": (0.1, 0.9)})
    images = response["pictures"]
    assert [image["seed"] for image in images] == [5, 6, 7, 8]
    assert [image["class_name"] for image in images] == ["red", "red", "blue", "blue"]
    assert [image["codes"] for image in images] == expected.codes.tolist()
    assert [image["coarse"] for image in images] == expected.coarse.tolist()
    assert all(1 <= image["passes"] <= len(image["coarse"]) for image in images)
    for image in images:
        sampling = dict(image["settings"]["sampling"])
        sampling["guidance_window"] = tuple(sampling["guidance_window"])
        alone = pipe.sample([image["class_number"]], image["seed"], **sampling)
        assert base64.b64decode(image["image"]) == export.png(alone.images[0])


def test_an_event_follows_each_row_of_coarse_labels(client: httpx2.Client, pipe: Pipeline) -> None:
    events = stream(client, classes=["red", "blue"], seed=3)
    assert [name for name, _ in events] == ["queued", "row", "row", "row", "row", "done"]
    assert set(events[0][1]) == {"ahead"}
    expected = list(pipe.stream(["red", "blue"], 3))
    for (_, data), row in zip(events[1:-1], expected[:-1], strict=True):
        assert (data["rows"], data["total"]) == (row.rows, row.total)
        assert data["labels"] == (row.labels >= 0).sum(1).tolist()
        for got, preview in zip(data["images"], row.images, strict=True):
            assert (np.asarray(open_png(got)) == np.asarray(preview)).all()
    assert events[-1][1] == post(client, "/v1/generate", classes=["red", "blue"], seed=3)
    events = stream(client, classes=["red"], preview=False)
    assert all(data["images"] == [] for name, data in events if name == "row")


def test_known_codes_are_kept_and_the_others_sampled(client: httpx2.Client, pipe: Pipeline) -> None:
    codes = [(5 * i) % 64 for i in range(LENGTH)]
    keep = [i < 6 for i in range(LENGTH)]
    body = {"classes": ["red"], "count": 3, "seed": 9, "codes": [codes], "keep": [keep]}
    images = post(client, "/v1/generate", **body)["pictures"]
    known = {"codes": torch.tensor(codes), "known": torch.tensor(keep)}
    expected = pipe.sample(["red"] * 3, 9, **known)
    assert [image["codes"] for image in images] == expected.codes.tolist()
    assert all(image["codes"][:6] == codes[:6] for image in images)
    rows = [data for name, data in stream(client, **body) if name == "row"]
    previews = next(pipe.stream(["red"] * 3, 9, **known)).images
    assert (np.asarray(open_png(rows[0]["images"][1])) == np.asarray(previews[1])).all()


def test_refine_samples_the_fine_stage_alone(client: httpx2.Client) -> None:
    (first,) = post(client, "/v1/generate", classes=[1], seed=2)["pictures"]
    body = {"classes": [1, 1], "coarse": [first["coarse"]], "seed": 2}
    same, other = post(client, "/v1/refine", **body)["pictures"]
    assert same["image"] == first["image"] and same["codes"] == first["codes"]
    assert other["coarse"] == first["coarse"] and other["codes"] != first["codes"]
    assert "coarse" in same["settings"] and "codes" not in same["settings"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_image_files_are_encoded(client: httpx2.Client, pipe: Pipeline, kind: str) -> None:
    data = image_file(kind=kind)
    response = upload(client, data, f"image/{kind.lower()}", **{"class": "green"})
    assert response.status_code == 200, response.text
    encoded = response.json()
    codes_1L = pipe.encode([Image.open(io.BytesIO(data))])
    assert encoded["picture"]["codes"] == codes_1L[0].tolist()
    labels_1L = pipe.clusters.labels_V[codes_1L]
    assert encoded["picture"]["coarse"] == labels_1L[0].tolist()
    (coarse,) = pipe.preview(labels_1L)
    assert (np.asarray(open_png(encoded["coarse"])) == np.asarray(coarse)).all()
    assert open_png(encoded["original"]).size == (32, 32)
    assert open_png(encoded["picture"]["image"]).size == (32, 32)
    assert encoded["picture"]["class_name"] == "green"


def test_members_are_the_codes_of_the_cluster(client: httpx2.Client, pipe: Pipeline) -> None:
    (image,) = post(client, "/v1/generate", classes=[0], seed=1)["pictures"]
    position = 6
    body = {"class": 0, "codes": image["codes"], "position": position}
    cluster = post(client, "/v1/members", **body)
    assert cluster["cluster"] == image["coarse"][position]
    labels = pipe.clusters.labels_V.tolist()
    assert {member["code"] for member in cluster["members"]} == {
        code for code, label in enumerate(labels) if label == cluster["cluster"]
    }
    probabilities = [member["probability"] for member in cluster["members"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    for member in cluster["members"]:
        same = member["code"] == image["codes"][position]
        assert (member["image"] == image["image"]) == same


def every_kind(client: httpx2.Client) -> list[dict[str, Any]]:
    """Return an image that was sampled, one resampled in part, one refined, and one uploaded."""
    chosen = {"guidance": 2.5, "top_k": 5}
    body: dict[str, Any] = {"classes": ["green"], "seed": 11, "settings": chosen}
    (sampled,) = post(client, "/v1/generate", **body)["pictures"]
    keep = [i % 3 > 0 for i in range(LENGTH)]
    body = {"classes": [1], "seed": 12, "codes": [sampled["codes"]], "keep": [keep]}
    (resampled,) = post(client, "/v1/generate", **body)["pictures"]
    body = {"classes": [1], "seed": 13, "coarse": [resampled["coarse"]]}
    body["settings"] = {"fine_temperature": 1.5}
    (refined,) = post(client, "/v1/refine", **body)["pictures"]
    return [sampled, resampled, refined, upload(client, image_file()).json()["picture"]]


def test_settings_give_the_same_bytes(
    client: httpx2.Client, pipe: Pipeline, tmp_path: Path
) -> None:
    for i, image in enumerate(every_kind(client)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(image["settings"]))
        again = export.sample(pipe, export.load(path), decode_separately=True)
        assert export.png(again.images[0]) == base64.b64decode(image["image"])
        assert again.codes[0].tolist() == image["codes"]


def test_the_command_writes_the_same_bytes(run: Path, tmp_path: Path, ctf: Command) -> None:
    workers = server.start_workers([str(run)], torch.device("cpu"), "auto", LIMITS)
    with serving(workers) as url, httpx2.Client(base_url=url, timeout=60) as client:
        images = every_kind(client)
    for i, image in enumerate(images):
        path, out = tmp_path / f"{i}.json", tmp_path / f"{i}.png"
        path.write_text(json.dumps(image["settings"]))
        result = ctf("sample", run, "--settings", path, "--out", out)
        assert result.code == 0, result.err
        assert out.read_bytes() == base64.b64decode(image["image"])


def test_the_api_is_described(client: httpx2.Client, openapi: dict[str, Any]) -> None:
    assert set(openapi["paths"]) == {
        "/v1/generate", "/v1/refine", "/v1/members", "/v1/encode", "/v1/models", "/health",
    }  # fmt: skip
    (model,) = client.get("/v1/models").json()["models"]
    assert model["name"] == "run" and model["class_names"] == list(CLASSES)
    assert (model["grid"], model["image_size"], model["images"]) == (4, 32, 8)
    assert client.get("/health").json()["status"] == "ok"


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("generate", {}, ["classes"]),
        ("generate", {"classes": []}, ["classes"]),
        ("generate", {"classes": ["rad"]}, ["did you mean 'red'"]),
        ("generate", {"classes": [3]}, ["class 3 of 3"]),
        ("generate", {"classes": [True]}, ["classes"]),
        ("generate", {"classes": [0] * 9}, ["got 9 images, expected 8 or fewer"]),
        ("generate", {"classes": [0], "count": 9}, ["got 9 images"]),
        ("generate", {"classes": [0], "count": 10**30}, ["count"]),
        ("generate", {"classes": [0], "seed": 2**63}, ["seed"]),
        ("generate", {"classes": [0, 0], "seed": 2**63 - 1}, ["64 bits"]),
        ("generate", {"classes": [0], "sed": 1}, ["sed"]),
        ("generate", {"classes": [0], "model": "../run"}, ["no model '../run'", "run"]),
        ("generate", {"classes": [0], "model": "/etc/passwd"}, ["no model"]),
        ("generate", {"classes": [0], "settings": {"temperature": 0}}, ["temperature"]),
        ("generate", {"classes": [0], "settings": {"guidance": 1e300}}, ["guidance"]),
        ("generate", {"classes": [0], "settings": {"guidance_window": [0.5, 0.5]}}, ["window"]),
        ("generate", {"classes": [0], "settings": {"heat": 1}}, ["heat"]),
        ("generate", {"classes": [0], "codes": CODES}, ["expected both or neither"]),
        ("generate", {"classes": [0], "codes": [[0] * 15], "keep": KEEP}, ["of 15 tokens"]),
        ("generate", {"classes": [0], "codes": CODES * 2, "keep": KEEP}, ["got 2 lists"]),
        ("generate", {"classes": [0], "codes": [[64] * LENGTH], "keep": KEEP}, ["0 to 63"]),
        ("generate", {"classes": [0], "codes": [[-1] * LENGTH], "keep": KEEP}, ["0 to 63"]),
        ("refine", {"classes": [0], "coarse": [[8] * LENGTH]}, ["0 to 7"]),
        ("refine", {"classes": [0]}, ["coarse"]),
        ("members", {"class": 0, "codes": [0] * LENGTH, "position": 16}, ["position"]),
        ("members", {"class": 0, "codes": [64] * LENGTH, "position": 0}, ["0 to 63"]),
    ],
)  # fmt: skip
def test_invalid_requests_are_refused(
    client: httpx2.Client, path: str, body: dict[str, Any], words: list[str]
) -> None:
    expect_error(client.post(f"/v1/{path}", json=body), 422, *words)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"classes": [0], "seed": NaN}', 422),
        ('{"classes": [0], "settings": {"guidance": Infinity}}', 422),
        ('{"classes": [0], "settings": {"guidance": -Infinity}}', 422),
        ('{"classes": [0], "settings": {"temperature": 1e999}}', 422),
        ('{"classes": [0], "seed": ' + "9" * 5000 + "}", 400),
        ('{"classes": ["\\ud800"]}', 422),
        ('{"classes": ["' + "x" * 300 + '"]}', 422),
        ("[" * 50_000, 400),
        ('{"classes": [0]', 400),
        ("", 422),
        ("null", 422),
        ("\x00", 400),
    ],
)
def test_invalid_json_is_refused(client: httpx2.Client, text: str, status: int) -> None:
    expect_error(client.post("/v1/generate", content=text.encode(), headers=JSON), status)


def test_unreadable_images_are_refused(client: httpx2.Client) -> None:
    expect_error(upload(client, b""), 422, "empty body")
    expect_error(upload(client, b"<svg/>"), 422, "SVG, which is not supported")
    expect_error(upload(client, b"neither"), 422, "unknown format")
    expect_error(upload(client, image_file()[:500]), 422, "corrupt")
    expect_error(upload(client, image_file((101, 100))), 422, "more than 10,000 pixels")
    expect_error(upload(client, image_file(), "text/plain"), 415, "Content-Type: image/")
    expect_error(upload(client, image_file(), **{"class": "violet"}), 422, "unknown class")
    expect_error(upload(client, image_file(), model="other"), 422, "no model")
    assert upload(client, image_file((100, 100))).status_code == 200


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_decompression_bombs_are_refused_by_their_header(client: httpx2.Client, side: int) -> None:
    """The file has a single line of pixels, so that decoding it would give another error."""
    file = io.BytesIO()
    Image.new("1", (side, 1)).save(file, format="PNG")
    png = file.getvalue()
    header = b"IHDR" + side.to_bytes(4) * 2 + png[24:29]  # width and height
    data = png[:12] + header + zlib.crc32(header).to_bytes(4) + png[33:]
    expect_error(upload(client, data), 422, "more than 10,000 pixels")


# --- Any request ----------------------------------------------------------------------------------


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def values(
    schema: dict[str, Any], known: dict[str, Any], fits: bool, name: str = ""
) -> st.SearchStrategy[Any]:
    """Return values of an OpenAPI schema: nearly always valid ones (`fits`), or often not."""
    if "$ref" in schema:
        return values(known[schema["$ref"].rsplit("/", 1)[-1]], known, fits, name)
    if "anyOf" in schema:
        return st.one_of([values(one, known, fits, name) for one in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    match schema.get("type"):
        case "object":
            required = set(schema.get("required", ()))
            fields = {
                key: values(inner, known, fits, key)
                for key, inner in schema.get("properties", {}).items()
            }
            return st.fixed_dictionaries(
                {key: inner for key, inner in fields.items() if key in required},
                optional={key: inner for key, inner in fields.items() if key not in required},
            )
        case "array" if "prefixItems" in schema:
            pair = [values(item, known, fits, name) for item in schema["prefixItems"]]
            return st.tuples(*pair).map(sorted if fits else list)
        case "array":
            item = values(schema["items"], known, fits, name)
            of_tokens = schema["items"].get("type") in ("integer", "boolean")
            sizes = st.sampled_from([LENGTH if of_tokens else 1] if fits else [1, 2, 3, LENGTH])
            return sizes.flatmap(lambda n: st.lists(item, min_size=n, max_size=n))
        case "integer" if fits:
            return st.integers(max(low or 0, 0), 2)
        case "integer":
            ends = [end + by for end in (low, high) if end is not None for by in (-1, 0, 1)]
            near = st.integers(-2, 70)
            return near | st.sampled_from(ends) if ends else near
        case "number":
            return st.floats(low, high) if fits else st.floats(low, high) | st.floats()
        case "string":
            known_name = st.sampled_from(["run"] if name == "model" else CLASSES)
            return known_name if fits else known_name | st.text(max_size=20)
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case kind:
            raise AssertionError(f"unknown type {kind}")


@pytest.fixture(scope="module")
def openapi(client: httpx2.Client) -> dict[str, Any]:
    return dict(client.get("/openapi.json").json())


@pytest.mark.parametrize("path", ["/v1/generate", "/v1/refine", "/v1/members"])
@settings(
    max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(data=st.data())
def test_any_request_gets_a_response_or_an_error(
    client: httpx2.Client, openapi: dict[str, Any], path: str, data: st.DataObject
) -> None:
    known = openapi["components"]["schemas"]
    operation = openapi["paths"][path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    fits = values(schema, known, True)
    body = data.draw(st.one_of(fits, fits, fits, values(schema, known, False), anything))
    generates = path == "/v1/generate" and isinstance(body, dict)
    if generates and None in (body.get("codes"), body.get("keep")) and data.draw(st.booleans()):
        # One without the other is an error, which most examples would be.
        body = {key: value for key, value in body.items() if key not in ("codes", "keep")}
    if isinstance(body, dict) and body and data.draw(st.integers(0, 4)) == 0:
        body[data.draw(st.sampled_from(sorted(body)))] = data.draw(anything)
    text = json.dumps(body)  # with NaN and Infinity, which are not JSON
    streams = data.draw(st.booleans())
    headers = {**JSON, "Accept": "text/event-stream"} if streams else JSON
    response = client.post(path, content=text.encode(), headers=headers)
    event(f"status {response.status_code}")
    assert response.status_code in (200, 400, 422), response.text
    if response.status_code != 200:
        expect_error(response, response.status_code)
    elif streams:
        assert "\nevent: done\n" in response.text


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200) | st.builds(
        lambda at, byte: image_file()[:at] + bytes([byte]) + image_file()[at + 1 :],
        st.integers(0, len(image_file()) - 1), st.integers(0, 255),
    ),
    query=st.dictionaries(st.sampled_from(["model", "class", "x"]), st.text(max_size=10)),
)  # fmt: skip
def test_any_upload_gets_a_response_or_an_error(
    client: httpx2.Client, data: bytes, query: dict[str, str]
) -> None:
    try:
        response = client.post(
            "/v1/encode", params=query, content=data, headers={"Content-Type": "image/png"}
        )
    except UnicodeEncodeError:
        return  # a lone surrogate, which no URL can have
    assert response.status_code in (200, 422), response.text
    if response.status_code != 200:
        expect_error(response, 422)


@given(path=st.text(max_size=20), method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD"]))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_path_gets_a_response_or_an_error(
    client: httpx2.Client, path: str, method: str
) -> None:
    try:
        response = client.request(method, "/" + path)
    except (UnicodeEncodeError, httpx2.InvalidURL):
        return
    assert response.status_code < 500
