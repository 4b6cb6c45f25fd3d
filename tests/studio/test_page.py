"""The studio's page in a real browser, and what it looks like: build/screenshots."""

import dataclasses
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctf.studio import server
from ctf.studio.tasks import Limits
from ctf.studio.worker import Worker
from tests.conftest import Command, picture
from tests.serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
GRID = 8
TIMEOUT = 60_000  # milliseconds; on a busy machine everything takes its time
expect.set_options(timeout=TIMEOUT)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser is installed: apt-get install chromium"
)


@pytest.fixture(scope="module")
def worker() -> Worker:
    (loaded,) = server.start_workers(["fashion-mnist"], torch.device("cpu"), "auto", Limits())
    return loaded


@pytest.fixture(scope="module")
def address(worker: Worker) -> Iterator[str]:
    with serving([worker], Limits()) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


class Tab:
    """A new window of its own at the studio; whatever goes wrong in the page fails the test."""

    def __init__(self, browser: Any, viewport: dict[str, int], theme: str = "light") -> None:
        self.context = browser.new_context(
            viewport=viewport, color_scheme=theme, accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console",
            # The browser itself says where a request was refused; that is no mistake of the page.
            lambda said: (
                self.wrong.append(said.text)
                if said.type == "error" and "Failed to load resource" not in said.text
                else None
            ),
        )

    def open(self, address: str) -> Any:
        self.page.goto(address)
        expect(self.page.locator("body[data-ready]")).to_be_visible()
        return self.page


@pytest.fixture
def tab(browser: Any) -> Iterator[Tab]:
    opened = Tab(browser, WIDE)
    yield opened
    opened.context.close()
    assert opened.wrong == []


@pytest.fixture
def page(tab: Tab, address: str) -> Any:
    return tab.open(address)


def folder() -> Path:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    return SCREENSHOTS


def done(page: Any) -> None:
    expect(page.locator("#status")).to_have_text("Done")


def draw(page: Any, *classes: str, count: int = 1, seed: int = 0) -> None:
    page.get_by_label("t-shirt", exact=True).uncheck(force=True)
    for name in classes:
        page.get_by_label(name, exact=True).check(force=True)
    page.get_by_label("Of each").fill(str(count))
    page.get_by_label("Seed", exact=True).fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    done(page)


def source(page: Any) -> str:
    return str(page.locator("#picture").get_attribute("src"))


def same_from_the_command_line(page: Any, tmp_path: Path, ctf: Command) -> dict[str, Any]:
    """Saves the picture on the stage and its settings, and draws it again from those."""
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


# --- what it does ---------------------------------------------------------------------------------


def test_a_picture_grows_before_it_is_done(page: Any, worker: Worker) -> None:
    expect(page.get_by_role("heading", name="Watch a picture being made")).to_be_visible()
    # So slowly that no row is missed.
    hook = worker.model.pipe.coarse.head.register_forward_hook(lambda *_: time.sleep(0.03))
    try:
        page.get_by_role("button", name="Draw the first ones").click()
        seen: dict[str, str] = {}
        while page.locator("#tokens").count() == 0:
            if page.locator("#picture").count() and (
                now := page.locator("#picture").get_attribute("src")
            ):
                seen.setdefault(now, page.locator("#status").inner_text())
            time.sleep(0.02)
    finally:
        hook.remove()
    done(page)
    assert len(seen.keys() - {source(page)}) >= 4
    # And the slider goes back over them, to the first.
    assert page.locator(".film button").count() == GRID + 1
    final = source(page)
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert source(page) in seen
    expect(page.locator("#step-text")).to_contain_text("Row 1 of 8")
    page.keyboard.press("End")
    assert source(page) == final
    expect(page.locator("#empty")).to_be_hidden()


def test_downloads_are_drawn_again_by_the_command(page: Any, tmp_path: Path, ctf: Command) -> None:
    draw(page, "bag", "sneaker", seed=7)
    page.locator(".tile").nth(1).click()
    expect(page.locator("#title")).to_have_text("bag")
    settings = same_from_the_command_line(page, tmp_path, ctf)
    assert (settings["seed"], settings["classes"], settings["model"]) == (8, [8], "fashion-mnist")


def test_new_details_stand_beside_the_first(page: Any, tmp_path: Path, ctf: Command) -> None:
    draw(page, "coat", seed=3)
    first = source(page)
    page.get_by_role("button", name="Same coarse, new details").click()
    done(page)
    assert source(page) != first
    figures = page.locator("#frames figure")
    expect(figures).to_have_count(2)
    assert figures.first.locator("img").get_attribute("src") == first
    settings = same_from_the_command_line(page, tmp_path, ctf)
    assert len(settings["coarse"]) == GRID**2
    page.locator(".take").first.click()
    assert source(page) == first


def test_redrawn_from_a_token(page: Any, tmp_path: Path, ctf: Command) -> None:
    draw(page, "bag", seed=1)
    page.get_by_label("Redraw from").check(force=True)
    page.locator("[data-token='32']").click()
    done(page)
    expect(page.locator("#subtitle")).to_contain_text("from row 5, column 1")
    settings = same_from_the_command_line(page, tmp_path, ctf)
    assert settings["keep"] == [i < 32 for i in range(GRID**2)]
    assert page.locator(".film button").count() == GRID + 1


def test_a_painted_region_is_redrawn(page: Any, tmp_path: Path, ctf: Command) -> None:
    draw(page, "bag", seed=1)
    page.get_by_label("Paint").check(force=True)
    expect(page.get_by_role("button", name="Redraw painted")).to_be_disabled()
    start, end = (page.locator(f"[data-token='{token}']").bounding_box() for token in (18, 21))
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=20)
    page.mouse.up()
    expect(page.locator(".painted")).to_have_count(4)
    page.locator("[data-token='45']").focus()  # and one more by the keyboard
    page.keyboard.press("Space")
    expect(page.locator(".painted")).to_have_count(5)
    page.get_by_role("button", name="Redraw painted").click()
    done(page)
    settings = same_from_the_command_line(page, tmp_path, ctf)
    assert [i for i, kept in enumerate(settings["keep"]) if not kept] == [18, 19, 20, 21, 45]


def test_a_cluster_is_looked_into(page: Any, worker: Worker, tmp_path: Path, ctf: Command) -> None:
    draw(page, "dress", seed=2)
    page.locator("[data-token='0']").focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    page.keyboard.press("Enter")
    heading = page.locator("#cluster h3")
    expect(heading).to_have_text(re.compile(r"Cluster \d+ · \d+ codes?"))
    cluster, count = map(int, re.findall(r"\d+", heading.inner_text()))
    members = page.locator(".members button")
    assert members.count() == count == int(worker.model.pipe.clusters.sizes_K[cluster])
    assert page.locator(".members [aria-pressed=true]").count() == 1
    first = source(page)
    other = page.locator(".members [aria-pressed=false]").first
    other.hover()
    shown = source(page)
    assert shown != first
    other.click()
    expect(page.locator("#subtitle")).to_contain_text("put in")
    assert source(page) == shown
    same_from_the_command_line(page, tmp_path, ctf)


def test_a_picture_is_brought(page: Any, tmp_path: Path, ctf: Command) -> None:
    file = tmp_path / "mine.png"
    picture(0.3, 1).save(file)
    page.get_by_label("Drawn as").select_option("bag")
    page.set_input_files("#file", file)
    done(page)
    expect(page.locator("#frames figcaption")).to_have_text(["reconstruction", "details redrawn"])
    page.get_by_text("Codes and labels").click()
    expect(page.locator("#codes td")).to_have_count(2 * GRID**2)
    page.locator(".take").first.click()
    expect(page.locator(".film button")).to_have_count(3)
    same_from_the_command_line(page, tmp_path, ctf)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.set_input_files("#file", broken)
    expect(page.get_by_role("alert")).to_contain_text("unknown format")


def test_a_link_carries_the_settings(tab: Tab, page: Any, address: str) -> None:
    page.get_by_label("Temperature", exact=True).first.fill("0.7")
    draw(page, "sandal", count=2, seed=99)
    link = page.url
    drawn = [tile.get_attribute("src") for tile in page.locator(".tile img").all()]
    page.get_by_role("button", name="Copy link").click()
    other = tab.context.new_page()
    other.goto(link)
    done(other)
    assert [tile.get_attribute("src") for tile in other.locator(".tile img").all()] == drawn
    expect(other.get_by_label("sandal", exact=True)).to_be_checked()
    expect(other.get_by_label("Temperature", exact=True).first).to_have_value("0.7")


def test_two_pipelines_on_the_same_seeds(tab: Tab, worker: Worker) -> None:
    twin = Worker(dataclasses.replace(worker.model, name="other"), Limits())
    with serving([worker, twin], Limits()) as address:
        page = tab.open(address)
        page.get_by_label("Both").check(force=True)
        draw(page, "bag", count=2, seed=5)
        expect(page.locator(".group")).to_have_count(2)
        expect(page.locator("#frames figure")).to_have_count(2)
        images = [tile.get_attribute("src") for tile in page.locator(".tile img").all()]
        assert images[0] == images[1] != images[2] == images[3]  # the same weights
        expect(page.locator("#subtitle")).to_contain_text("fashion-mnist · first · seed 5")
        page.screenshot(path=folder() / "1280-light-compared.png", full_page=True)


def test_mistakes_are_told(page: Any) -> None:
    page.get_by_label("t-shirt", exact=True).uncheck(force=True)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("Choose a class first")
    page.screenshot(path=folder() / "1280-light-mistake.png")
    page.get_by_role("button", name="Mend it").click()
    expect(page.get_by_role("alert")).to_be_hidden()


def test_stop(page: Any, worker: Worker) -> None:
    hook = worker.model.pipe.coarse.head.register_forward_hook(lambda *_: time.sleep(0.05))
    try:
        page.get_by_role("button", name="Generate").click()
        expect(page.locator(".film button").nth(4)).to_be_visible()
        page.screenshot(path=folder() / "1280-light-growing.png")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped")
        expect(page.locator("#empty")).to_be_visible()
        deadline = time.monotonic() + 5
        while worker.state()["running"]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        hook.remove()


def test_a_token_is_asked_for(browser: Any, worker: Worker) -> None:
    with serving([worker], Limits(), token="open") as address:
        tab = Tab(browser, WIDE)
        tab.page.goto(address)
        tab.page.get_by_role("textbox", name="Token").fill("open")
        tab.page.get_by_role("button", name="Open").click()
        expect(tab.page.locator("body[data-ready]")).to_be_visible()
        tab.context.close()


def test_the_api_has_a_page(tab: Tab, address: str) -> None:
    tab.page.goto(f"{address}/docs")
    expect(tab.page.get_by_role("heading", name="POST /v1/generate")).to_be_visible()
    assert tab.page.locator("section").count() > 8


# --- how it looks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["1280", "390"])
def test_screenshots(browser: Any, address: str, viewport: dict[str, int], theme: str) -> None:
    tab = Tab(browser, viewport, theme)
    page = tab.open(address)

    def shoot(name: str) -> None:
        path = folder() / f"{viewport['width']}-{theme}-{name}.png"
        page.screenshot(path=path, full_page=True)
        # Nothing is wider than the window.
        assert page.locator("html").evaluate("e => e.scrollWidth") <= viewport["width"]

    shoot("empty")
    draw(page, "bag", "ankle-boot", count=4, seed=0)
    page.locator(".tile").nth(2).click()
    shoot("drawn")
    page.get_by_role("button", name="Same coarse, new details").click()
    done(page)
    page.locator("[data-token='20']").click()
    expect(page.locator(".members")).to_be_visible()
    shoot("cluster")
    page.get_by_label("Paint").check(force=True)
    for token in (18, 19, 26, 27):
        page.locator(f"[data-token='{token}']").click()
    shoot("paint")
    tab.context.close()
    assert tab.wrong == []
