"""The page in a real browser. Screenshots of its states are written to build/screenshots."""

import dataclasses
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctf.studio import server
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.conftest import Command, disc_image
from tests.serving import hold_steps, serving, wait_until
from tests.studio.test_proxy import NGINX, nginx

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
GRID = 8
TIMEOUT = 60_000  # milliseconds
expect.set_options(timeout=TIMEOUT)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser is installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def worker() -> Worker:
    (worker,) = server.start_workers(["fashion-mnist"], torch.device("cpu"), "auto", Limits())
    return worker


@pytest.fixture(scope="module")
def url(worker: Worker) -> Iterator[str]:
    with serving([worker], Limits()) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield browser
        browser.close()


@contextmanager
def new_page(browser: Any, viewport: dict[str, int], theme: str = "light") -> Iterator[Any]:
    """Open a window of its own; any error in the page fails the test."""
    context = browser.new_context(viewport=viewport, color_scheme=theme, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        # The browser itself reports requests with an error status, which the page handles.
        lambda message: (
            errors.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    yield page
    context.close()
    assert errors == []


def open_studio(page: Any, url: str) -> None:
    page.goto(url)
    expect(page.locator("body[data-ready]")).to_be_visible()


@pytest.fixture
def empty_page(browser: Any) -> Iterator[Any]:
    with new_page(browser, WIDE) as page:
        yield page


@pytest.fixture
def page(empty_page: Any, url: str) -> Any:
    open_studio(empty_page, url)
    return empty_page


@contextmanager
def slow_steps(worker: Worker, seconds: float) -> Iterator[None]:
    """Delay each step of the coarse model, so that its previews can be seen."""
    head = worker.model.pipe.coarse.head
    hook = head.register_forward_hook(lambda *_: time.sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


def expect_done(page: Any) -> None:
    expect(page.locator("#status")).to_have_text("Done")


def generate(page: Any, *classes: str, count: int = 1, seed: int = 0) -> None:
    page.get_by_label("t-shirt", exact=True).uncheck(force=True)
    for name in classes:
        page.get_by_label(name, exact=True).check(force=True)
    page.get_by_label("Per class").fill(str(count))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    expect_done(page)


def shown_image(page: Any) -> str:
    return str(page.locator("#image").get_attribute("src"))


def thumbnails(page: Any) -> list[str]:
    return [image.get_attribute("src") for image in page.locator(".thumbnail img").all()]


def take_screenshot(page: Any, name: str, full_page: bool = False) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)
    assert_fits(page)


def assert_fits(page: Any) -> None:
    """Check that nothing is wider than the window."""
    width = page.locator("html").evaluate("e => e.scrollWidth")
    assert width <= page.viewport_size["width"]


def download_and_sample(page: Any, tmp_path: Path, ctf: Command) -> dict[str, Any]:
    """Save the image and its settings; check that `ctf sample` makes the same file from these."""
    saved = []
    for button in ("#save-png", "#save-settings"):
        with page.expect_download() as download:
            page.click(button)
        saved.append(tmp_path / download.value.suggested_filename)
        download.value.save_as(saved[-1])
    png, settings = saved
    assert (png.suffix, settings.suffix) == (".png", ".json")
    out = tmp_path / "again.png"
    result = ctf("sample", "--settings", settings, "--out", out)
    assert result.code == 0, result.err
    assert out.read_bytes() == png.read_bytes()
    return dict(json.loads(settings.read_text()))


# --- Behaviour ------------------------------------------------------------------------------------


def test_previews_are_shown_row_by_row(page: Any, worker: Worker) -> None:
    expect(page.get_by_role("heading", name="Watch images being generated")).to_be_visible()
    with slow_steps(worker, 0.03):
        page.get_by_role("button", name="Start with these settings").click()
        seen: set[str] = set()
        while page.locator("#tokens").count() == 0:
            image = page.locator("#image")
            if image.count() and (src := image.get_attribute("src")):
                seen.add(src)
            time.sleep(0.02)
    expect_done(page)
    final = shown_image(page)
    assert len(seen - {final}) >= 4
    # The slider goes back to the first.
    assert page.locator(".filmstrip button").count() == GRID + 1
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert shown_image(page) in seen
    expect(page.locator("#step-text")).to_contain_text("Row 1 of 8")
    page.keyboard.press("End")
    assert shown_image(page) == final
    expect(page.locator("#start-page")).to_be_hidden()


def cell_brightness(page: Any, position: int) -> float:
    """The mean brightness of a token's cell in the large frame, on the screen."""
    box = page.locator(".frame").last.bounding_box()
    side = box["width"] / GRID
    x, y = position % GRID, position // GRID
    clip = {"x": box["x"] + (x + 0.3) * side, "y": box["y"] + (y + 0.3) * side}
    png = page.screenshot(clip={**clip, "width": 0.4 * side, "height": 0.4 * side})
    return float(np.asarray(Image.open(io.BytesIO(png)).convert("L")).mean())


def test_what_is_not_sampled_yet_is_hatched(page: Any, worker: Worker) -> None:
    """In the light theme, hatching is bright; the corners of these images are black."""
    corners = [GRID - 1, GRID * (GRID - 1)]  # in the first and in the last row
    generate(page, "bag", seed=1)
    assert max(cell_brightness(page, corner) for corner in corners) < 30
    with hold_steps(worker.model.pipe, again_after=GRID) as (gate, steps):
        page.get_by_role("button", name="Generate").click()
        wait_until(lambda: steps)
        gate.set()  # for the first row
        expect(page.locator(".frame")).to_have_class(re.compile("incomplete"))
        first, last = (cell_brightness(page, corner) for corner in corners)
        assert first < 30 and last > 150
        gate.set()
        expect_done(page)
    page.locator(".filmstrip button").nth(3).click()  # back to the fourth row
    assert cell_brightness(page, 4 * GRID - 1) < 30 and cell_brightness(page, 5 * GRID - 1) > 150
    page.locator(".filmstrip button").last.click()
    # Tokens that are kept are shown from the start.
    page.get_by_label("Inpaint").check(force=True)
    page.locator(f"[data-token='{corners[1]}']").click()
    page.get_by_role("button", name="Resample mask").click()
    expect_done(page)
    page.locator(".filmstrip button").first.click()
    assert cell_brightness(page, corners[1]) > 150
    assert cell_brightness(page, corners[1] - GRID) < 30


def test_downloads_can_be_sampled_by_the_command(page: Any, tmp_path: Path, ctf: Command) -> None:
    generate(page, "bag", "sneaker", seed=7)
    page.locator(".thumbnail").nth(1).click()
    expect(page.locator("#title")).to_have_text("bag")
    settings = download_and_sample(page, tmp_path, ctf)
    assert (settings["seed"], settings["classes"], settings["model"]) == (8, [8], "fashion-mnist")


def test_the_fine_stage_is_resampled(page: Any, tmp_path: Path, ctf: Command) -> None:
    generate(page, "coat", seed=3)
    first = shown_image(page)
    page.get_by_role("button", name="Resample fine stage").click()
    expect_done(page)
    assert shown_image(page) != first
    figures = page.locator("#figures figure")
    expect(figures).to_have_count(2)
    assert figures.first.locator("img").get_attribute("src") == first
    settings = download_and_sample(page, tmp_path, ctf)
    assert len(settings["coarse"]) == GRID**2
    page.locator(".version").first.click()
    assert shown_image(page) == first


def test_an_image_is_resampled_from_a_token_on(page: Any, tmp_path: Path, ctf: Command) -> None:
    generate(page, "bag", seed=1)
    page.get_by_label("Resample from here").check(force=True)
    page.locator("[data-token='32']").click()
    expect_done(page)
    expect(page.locator("#subtitle")).to_contain_text("from row 5, column 1")
    settings = download_and_sample(page, tmp_path, ctf)
    assert settings["keep"] == [i < 32 for i in range(GRID**2)]
    assert page.locator(".filmstrip button").count() == GRID + 1


def test_a_masked_region_is_inpainted(page: Any, tmp_path: Path, ctf: Command) -> None:
    generate(page, "bag", seed=1)
    page.get_by_label("Inpaint").check(force=True)
    expect(page.get_by_role("button", name="Resample mask")).to_be_disabled()
    start, end = (page.locator(f"[data-token='{token}']").bounding_box() for token in (18, 21))
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=20)
    page.mouse.up()
    expect(page.locator(".masked")).to_have_count(4)
    page.locator("[data-token='45']").focus()  # and one more by the keyboard
    page.keyboard.press("Space")
    expect(page.locator(".masked")).to_have_count(5)
    page.get_by_role("button", name="Resample mask").click()
    expect_done(page)
    settings = download_and_sample(page, tmp_path, ctf)
    assert [i for i, known in enumerate(settings["keep"]) if not known] == [18, 19, 20, 21, 45]


def test_a_cluster_is_inspected_and_a_code_replaced(
    page: Any, worker: Worker, tmp_path: Path, ctf: Command
) -> None:
    generate(page, "dress", seed=2)
    page.locator("[data-token='0']").focus()
    for key in ["ArrowDown"] * 3 + ["ArrowRight"] * 3 + ["Enter"]:
        page.keyboard.press(key)
    heading = page.locator("#cluster h3")
    expect(heading).to_have_text(re.compile(r"Cluster \d+ · \d+ codes?"))
    cluster, count = map(int, re.findall(r"\d+", heading.inner_text()))
    members = page.locator(".members button")
    assert members.count() == count == int(worker.model.pipe.clusters.sizes_K[cluster])
    assert page.locator(".members [aria-pressed=true]").count() == 1
    first = shown_image(page)
    other = page.locator(".members [aria-pressed=false]").first
    other.hover()
    preview = shown_image(page)
    assert preview != first
    other.click()
    expect(page.locator("#subtitle")).to_have_text(re.compile(r"code \d+ used"))
    assert shown_image(page) == preview
    download_and_sample(page, tmp_path, ctf)


def test_an_uploaded_image_is_encoded_and_resampled(
    page: Any, tmp_path: Path, ctf: Command
) -> None:
    file = tmp_path / "mine.png"
    disc_image(0.3, 1).save(file)
    page.get_by_label("Its class").select_option("bag")
    page.set_input_files("#file", file)
    expect_done(page)
    captions = ["reconstruction", "fine stage resampled"]
    expect(page.locator("#figures figcaption")).to_have_text(captions)
    page.get_by_text("Codes and coarse labels").click()
    expect(page.locator("#codes td")).to_have_count(2 * GRID**2)
    page.locator(".version").first.click()
    expect(page.locator(".filmstrip button")).to_have_count(3)
    download_and_sample(page, tmp_path, ctf)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    page.set_input_files("#file", broken)
    expect(page.get_by_role("alert")).to_contain_text("unknown format")


def test_a_link_has_the_settings(page: Any) -> None:
    page.get_by_label("Temperature", exact=True).first.fill("0.7")
    generate(page, "sandal", count=2, seed=99)
    page.get_by_role("button", name="Copy link").click()
    other = page.context.new_page()
    other.goto(page.url)
    expect_done(other)
    assert thumbnails(other) == thumbnails(page)
    expect(other.get_by_label("sandal", exact=True)).to_be_checked()
    expect(other.get_by_label("Temperature", exact=True).first).to_have_value("0.7")


def test_two_models_are_compared_on_the_same_seeds(empty_page: Any, worker: Worker) -> None:
    page, other = empty_page, Worker(dataclasses.replace(worker.model, name="other"), Limits())
    with serving([worker, other], Limits()) as url:
        open_studio(page, url)
        page.get_by_label("Both").check(force=True)
        generate(page, "bag", count=2, seed=5)
        expect(page.locator(".group")).to_have_count(2)
        expect(page.locator("#figures figure")).to_have_count(2)
        images = thumbnails(page)
        assert images[0] == images[1] != images[2] == images[3]  # the same weights
        expect(page.locator("#subtitle")).to_contain_text("fashion-mnist · sample · seed 5")
        take_screenshot(page, "1280-light-compared", full_page=True)


def test_invalid_input_is_explained(page: Any) -> None:
    box = page.get_by_label("t-shirt", exact=True)
    box.uncheck(force=True)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose a class first")
    take_screenshot(page, "1280-light-error")
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(box).to_be_focused()
    box.check(force=True)
    page.get_by_label("Seed", exact=True).fill("0.5")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_label("Seed", exact=True)).to_be_focused()


def test_a_lost_connection_is_reported_and_the_request_can_be_repeated(page: Any) -> None:
    alert, endpoint = page.get_by_role("alert"), "**/v1/generate"
    queued = 'event: queued\ndata: {"ahead": 0}\n\n'
    page.route(endpoint, lambda route: route.fulfill(status=200, body=queued))
    page.get_by_role("button", name="Generate").click()
    expect(alert).to_contain_text("The connection to the studio was lost")
    page.unroute(endpoint)
    page.route(endpoint, lambda route: route.abort())
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The studio does not respond")
    page.unroute(endpoint)
    page.get_by_role("button", name="Try again").click()
    expect_done(page)
    expect(alert).to_be_hidden()


def test_stop_cancels_the_request(page: Any, worker: Worker) -> None:
    with hold_steps(worker.model.pipe, again_after=5 * GRID) as (gate, steps):
        page.get_by_role("button", name="Generate").click()
        wait_until(lambda: steps)
        gate.set()  # for five rows
        expect(page.locator(".filmstrip button").nth(4)).to_be_visible()
        take_screenshot(page, "1280-light-sampling")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped")
        expect(page.locator("#start-page")).to_be_visible()
        gate.set()
        wait_until(lambda: not worker.state()["running"])


def test_a_file_that_is_too_large_is_not_sent(empty_page: Any, worker: Worker) -> None:
    page = empty_page
    with serving([worker], Limits(upload_bytes=1000)) as url:
        open_studio(page, url)
        large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(1001)}
        page.set_input_files("#file", large)
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("large.png: got 1001 bytes, expected 1000 or fewer")
        page.get_by_role("button", name="Close").click()
        expect(alert).to_be_hidden()


def test_the_page_works_without_storage(empty_page: Any, worker: Worker) -> None:
    """As in a frame on another site, in browsers that block storage there."""
    for name in ("localStorage", "sessionStorage"):
        blocked = "{ get() { throw new DOMException('denied', 'SecurityError'); } }"
        empty_page.add_init_script(f"Object.defineProperty(window, '{name}', {blocked});")
    with serving([worker], Limits(), token="open") as url:
        empty_page.goto(url)
        empty_page.get_by_role("textbox", name="Token").fill("open")
        empty_page.get_by_role("button", name="Continue").click()
        generate(empty_page, "bag")
        empty_page.get_by_role("button", name="Colours: auto").click()
        expect(empty_page.locator("html")).to_have_attribute("data-theme", "light")


def test_class_names_of_any_kind_fit_and_can_be_chosen(browser: Any, worker: Worker) -> None:
    names = ["a" * 150, "<img src=x>", "[bold]", "tench, Tinca tinca", "\u7fbd", "x/../y"]
    pipe = dataclasses.replace(
        worker.model.pipe, class_names=(*names, *worker.model.pipe.class_names[6:])
    )
    model = dataclasses.replace(worker.model, pipe=pipe, name="m [x] " + "n" * 60)
    odd = Worker(model, Limits())
    with serving([odd], Limits()) as url, new_page(browser, NARROW) as page:
        open_studio(page, url)
        page.locator(".chip").first.get_by_role("checkbox").uncheck()
        for name in names:
            page.get_by_label(name, exact=True).check(force=True)
        page.get_by_label("Per class").fill("1")
        page.get_by_role("button", name="Generate").click()
        expect_done(page)
        expect(page.locator(".thumbnail-name")).to_have_text(names)
        for thumbnail in page.locator(".thumbnail").all():
            thumbnail.click()
            assert_fits(page)


def test_the_page_asks_for_the_token(empty_page: Any, worker: Worker) -> None:
    with serving([worker], Limits(), token="open") as url:
        empty_page.goto(url)
        empty_page.get_by_role("textbox", name="Token").fill("open")
        empty_page.get_by_role("button", name="Continue").click()
        expect(empty_page.locator("body[data-ready]")).to_be_visible()


@pytest.mark.skipif(NGINX is None, reason="nginx is missing: apt-get install nginx")
def test_the_page_works_under_a_path_of_a_proxy(
    browser: Any, worker: Worker, tmp_path: Path
) -> None:
    with (
        serving([worker], Limits(), root_path="/raw", token="w\u00f6rd") as url,
        nginx(tmp_path, url) as (documented, careless),
        new_page(browser, WIDE) as page,
    ):
        page.goto(f"{documented}/ctf")  # nginx adds a slash
        page.get_by_role("textbox", name="Token").fill("w\u00f6rd")
        page.get_by_role("button", name="Continue").click()
        for address in (f"{documented}/ctf/", f"{careless}/short", f"{careless}/raw/"):
            if address.startswith(careless):  # another origin, which has not stored the token
                page.goto(f"{careless}/short")
                page.evaluate("sessionStorage.setItem('ctf-studio token', 'w\u00f6rd')")
            open_studio(page, address)
            generate(page, "bag")
            page.locator("[data-token='20']").click()
            expect(page.locator(".members")).to_be_visible()
            page.get_by_role("button", name="Copy link").click()
            assert page.url.startswith(f"{address.rstrip('/')}/#classes=8")
            page.get_by_role("link", name="API").click()
            expect(page.get_by_role("heading", name="POST /v1/generate")).to_be_visible()
            page.get_by_role("link", name="Studio", exact=True).click()
            expect(page.locator("body[data-ready]")).to_be_visible()


def test_a_refusal_by_a_proxy_is_reported(page: Any) -> None:
    page.route("**/v1/generate", lambda route: route.fulfill(status=502, body="<html>"))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("A proxy in front of the studio")
    expect(page.get_by_role("alert")).to_contain_text("502")
    page.unroute("**/v1/generate")
    login = {"status": 200, "content_type": "text/html", "body": "<form>"}
    page.route("**/v1/generate", lambda route: route.fulfill(**login))
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("Reload to log in again")


def test_the_api_is_documented(empty_page: Any, url: str) -> None:
    empty_page.goto(f"{url}/docs")
    expect(empty_page.get_by_role("heading", name="POST /v1/generate")).to_be_visible()
    assert empty_page.locator("section").count() > 8
    take_screenshot(empty_page, "1280-light-api", full_page=True)


# --- Looks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "390"])
def test_nothing_is_wider_than_the_window(
    browser: Any, url: str, viewport: dict[str, int], theme: str
) -> None:
    name = f"{viewport['width']}-{theme}"
    with new_page(browser, viewport, theme) as page:
        open_studio(page, url)
        take_screenshot(page, f"{name}-start", full_page=True)
        generate(page, "bag", "ankle-boot", count=4, seed=0)
        page.locator(".thumbnail").nth(2).click()
        take_screenshot(page, f"{name}-samples", full_page=True)
        page.get_by_role("button", name="Resample fine stage").click()
        expect_done(page)
        page.locator("[data-token='20']").click()
        expect(page.locator(".members")).to_be_visible()
        take_screenshot(page, f"{name}-cluster", full_page=True)
        page.get_by_label("Inpaint").check(force=True)
        for token in (18, 19, 26, 27):
            page.locator(f"[data-token='{token}']").click()
        take_screenshot(page, f"{name}-mask", full_page=True)
        for width in (320, 1000, 1920):
            page.set_viewport_size({"width": width, "height": 900})
            assert_fits(page)
