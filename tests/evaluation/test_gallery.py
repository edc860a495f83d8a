"""The gallery: its files and its page, which nightly tests use in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import Browser, chromium
from markupsafe import escape
from PIL import Image

from spo.evaluation import gallery

NASTY = '<script>document.title = "stolen"</script><img src=x onerror="document.title=\'stolen\'">'
PROMPTS = ["a red circle", "a blue Circle on sand", NASTY, "a green star", "a red star on sand"]
SCORES = {  # HPS of each prompt; SPO's gains are 1, -2, 0.5, 3, -0.25
    "base": [10.0, 12, 11, 9, 10.25],
    "diffusion_dpo": [10.5, 12, 10, 10, 10],
    "spo": [11.0, 10, 11.5, 12, 10],
}
SHOWN = "[...document.querySelectorAll('#prompts li:not([hidden])')]"
ORDER = f"{SHOWN}.map((item) => Number(item.querySelector('.number').textContent))"


def tables() -> dict[str, pd.DataFrame]:
    columns = {"index": range(5), "prompt": PROMPTS, "seed": range(1000, 1005)}
    return {
        v: pd.DataFrame({**columns, "hps": hps, "</script>": [-x for x in hps]}) for v, hps in SCORES.items()
    }


def images(level: int, side: int = 48) -> Iterator[Image.Image]:
    yield from (Image.new("RGB", (side, side), (level, 50 * i, 90)) for i in range(5))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reports #1") / "gallery.html"
    drawn = {v: images(80 * i) for i, v in enumerate(SCORES)}
    gallery.write(path, "scenes", tables(), drawn, ("spo", "base"))
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(tab: Browser, page: Path) -> Browser:
    """The gallery, just opened, on a large screen."""
    tab.size(1280, 900)
    tab.open(page.as_uri())
    tab.errors.clear()
    return tab


def test_thumbnails_are_in_the_page_and_large_images_beside_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    thumbnails = re.findall(r'src="data:image/webp;base64,([^"]+)"', text)
    large = re.findall(r'data-large="([^"]+)"', text)
    assert large[:3] == [
        "gallery/base/00000.webp",
        "gallery/diffusion_dpo/00000.webp",
        "gallery/spo/00000.webp",
    ]
    assert len(thumbnails) == len(large) == 15 == len(list(page.parent.rglob("*.webp")))
    for encoded, file in zip(thumbnails, large, strict=True):
        small = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert list(small.getdata()) == list(Image.open(page.parent / file).getdata())
        variant, number = list(SCORES).index(file.split("/")[1]), int(file[-10:-5])
        assert small.size == (48, 48) and small.getpixel((0, 0)) == (80 * variant, 50 * number, 90)
    assert "http" not in text.replace("http-equiv", "")


def test_thumbnails_of_larger_images_are_smaller(tmp_path: Path) -> None:
    page = tmp_path / "gallery.html"
    for side in (512, 48):  # the second time it replaces what was there
        drawn = {v: images(80, side) for v in ("base", "spo")}
        gallery.write(page, "sd15", {v: tables()[v] for v in drawn}, drawn, ("spo", "base"))
        (encoded, *_) = re.findall(r'src="data:image/webp;base64,([^"]+)"', page.read_text())
        thumbnail = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert thumbnail.size == (min(side, gallery.THUMBNAIL),) * 2
        files = sorted(tmp_path.glob("gallery/*/*"))
        assert len(files) == 10 and {Image.open(f).size for f in files} == {(side, side)}


def test_the_same_run_gives_the_same_page(page: Path, tmp_path: Path) -> None:
    again = tmp_path / "gallery.html"
    gallery.write(
        again, "scenes", tables(), {v: images(80 * i) for i, v in enumerate(SCORES)}, ("spo", "base")
    )
    assert again.read_bytes() == page.read_bytes()


def test_the_page_holds_what_its_script_sorts_by_and_prompts_are_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    data = json.loads(content)
    assert [v["key"] for v in data["variants"]] == list(SCORES) and (data["variant"], data["over"]) == (
        "spo",
        "base",
    )
    assert [m["key"] for m in data["metrics"]] == ["hps", "</script>"]
    by_variant = [[prompt[i][0] for prompt in data["scores"]] for i in range(3)]
    assert by_variant == list(SCORES.values()) and data["seeds"] == list(range(1000, 1005))
    assert [re.sub("<.*?>", "", h).split(" ", 1)[1] for h in re.findall("<h2>(.*?)</h2>", text)] == [
        str(escape(prompt)) for prompt in PROMPTS
    ]
    assert text.count("<script") == 2 and "<img src=x" not in text


@pytest.mark.nightly
@pytest.mark.services
@pytest.mark.parametrize(
    ("choices", "order"),
    [
        ({}, [1, 2, 3, 4, 5]),
        ({"sort": "gain"}, [4, 1, 3, 5, 2]),
        ({"sort": "loss"}, [2, 5, 3, 1, 4]),
        ({"sort": "highest"}, [4, 3, 1, 2, 5]),
        ({"sort": "lowest", "variant": "base"}, [4, 1, 5, 3, 2]),
        ({"sort": "gain", "over": "diffusion_dpo"}, [4, 3, 1, 5, 2]),
        ({"sort": "gain", "variant": "diffusion_dpo"}, [4, 1, 2, 5, 3]),
        ({"sort": "gain", "metric": "</script>"}, [2, 5, 3, 1, 4]),
    ],
)
def test_it_sorts_by_gain_loss_and_every_score(browser: Browser, choices: dict[str, str], order: Any) -> None:
    for name, value in choices.items():
        browser.choose(name, value)
    assert browser.value(ORDER) == order
    browser.open(browser.value("location.href"))
    assert browser.value(ORDER) == order, "the address keeps the view"
    assert browser.errors == []


@pytest.mark.nightly
@pytest.mark.services
def test_images_show_their_score_and_its_difference(browser: Browser) -> None:
    captions = f"{SHOWN}[1].innerText.split('\\n').slice(1)"
    assert browser.becomes(
        captions, ["Base", "12.000", "Diffusion-DPO", "12.000 0.000", "SPO", "10.000 −2.000"]
    )
    browser.choose("over", "spo")
    assert browser.becomes(
        captions, ["Base", "12.000 +2.000", "Diffusion-DPO", "12.000 +2.000", "SPO", "10.000"]
    )


@pytest.mark.nightly
@pytest.mark.services
def test_it_filters_by_words(browser: Browser) -> None:
    browser.press("/")  # goes to the field
    browser.type("SAND circle")
    browser.wait(ORDER, [2])
    assert browser.value("document.querySelector('output').textContent") == "1 of 5"
    browser.value("document.querySelector('input').select()")
    browser.type("star")
    browser.choose("sort", "loss")
    browser.wait(ORDER, [5, 4])
    browser.value("document.querySelector('input').select()")
    browser.type("giraffe")
    browser.wait(ORDER, [])
    assert "No prompt has all" in browser.value("document.body.innerText")


OPEN = "document.querySelector('dialog').open"
LARGE = "document.querySelector('#large-prompt').textContent"
CURRENT = "document.querySelector('dialog .current')?.innerText"


@pytest.mark.nightly
@pytest.mark.services
def test_a_click_enlarges_and_shows_all_scores(browser: Browser) -> None:
    browser.choose("sort", "gain")
    browser.click("#prompts li:nth-child(2) .picture:nth-child(3)")
    browser.wait(OPEN)
    browser.wait(LARGE, PROMPTS[0])
    files = browser.value("[...document.querySelectorAll('dialog img')].map((image) => image.src)")
    assert [f.split("/gallery/")[1] for f in files] == [f"{v}/00000.webp" for v in SCORES]
    browser.wait("[...document.querySelectorAll('dialog img')].every((image) => image.naturalWidth === 48)")
    rows = browser.value("document.querySelector('dialog tbody').innerText").splitlines()
    assert [row.split() for row in rows] == [
        ["HPS", "×100", "10.000", "10.500", "+0.500", "11.000", "+1.000"],
        ["</script>", "−10.000", "−10.500", "−0.500", "−11.000", "−1.000"],
    ]
    assert browser.value("[...document.querySelectorAll('.best')].map((cell) => cell.cellIndex)") == [3, 1]
    assert "seed 1000" in browser.value("document.querySelector('dialog').innerText")
    browser.click("dialog [name=next]")
    browser.wait(LARGE, NASTY)
    browser.click("dialog .picture:nth-child(2)")  # alone
    browser.wait("document.querySelector('dialog .current img')?.getBoundingClientRect().width > 400")
    visible = "[...document.querySelectorAll('dialog .picture')].map((box) => box.offsetWidth > 0)"
    assert browser.value(visible) == [False, True, False]
    browser.click("dialog [name=close]")
    browser.wait(OPEN, False)
    assert browser.errors == []


@pytest.mark.nightly
@pytest.mark.services
def test_the_keyboard_does_it_too(browser: Browser) -> None:
    browser.click("input")
    for _ in range(5):  # four menus, then the first prompt
        browser.press("Tab")
    browser.press("Enter")
    browser.wait(OPEN)
    browser.wait(LARGE, PROMPTS[0])
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    browser.wait(LARGE, NASTY)
    browser.press("ArrowLeft")
    browser.wait(LARGE, PROMPTS[1])
    browser.press("ArrowDown")
    browser.wait(CURRENT, "Base")
    browser.press("ArrowUp")
    browser.wait(CURRENT, "SPO")
    browser.press("Escape")
    browser.wait(OPEN, False)
    browser.wait("document.activeElement.closest('li')?.querySelector('.number').textContent", "2")


@pytest.mark.nightly
@pytest.mark.services
def test_a_prompt_that_is_html_is_text(browser: Browser, page: Path) -> None:
    browser.click("#prompts li:nth-child(3) .picture")
    browser.wait(LARGE, NASTY)
    assert browser.value("document.title") == "scenes: gallery"
    assert browser.value("document.querySelectorAll('main script, dialog script, [onerror]').length") == 0
    assert browser.value(f"{SHOWN}[2].querySelector('h2').innerText") == f"3 {NASTY}"
    assert browser.errors == []


@pytest.mark.nightly
@pytest.mark.services
def test_it_asks_nothing_of_the_network_and_works_without_its_images(
    tab: Browser, page: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "gallery.html"
    alone.write_bytes(page.read_bytes())
    tab.requested.clear()
    tab.open(alone.as_uri())
    tab.click("#prompts li .picture")
    tab.wait("[...document.querySelectorAll('dialog img')].every((image) => image.naturalWidth === 48)")
    assert tab.requested and {url.split(":")[0] for url in tab.requested} <= {"file", "data", "about"}


@pytest.mark.nightly
@pytest.mark.services
def test_a_phone_needs_no_sideways_scrolling(tab: Browser, page: Path) -> None:
    tab.size(390, 844, phone=True)
    tab.open(page.as_uri())
    width = "document.documentElement.scrollWidth"
    assert tab.value(width) == 390
    tab.click("#prompts li .picture:nth-child(3)")
    tab.wait(OPEN)
    assert tab.value(width) == 390
    tab.wait(
        "Math.abs(document.querySelectorAll('dialog .picture')[2].getBoundingClientRect().right - 390) < 80"
    )
    assert tab.value("document.querySelector('dialog').getBoundingClientRect().width") == 390
