"""The gallery in Chromium: it plays in step, filters, sorts, obeys the keyboard, and takes texts for nothing else."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import PHONE, Browser
from finished import BEGAN, FRAMES, LEVEL, keep, lines_of, row
from PIL import Image

from t2vz import claims
from t2vz.gallery import page, serve
from t2vz.manifest import Row, cells_of, read
from t2vz.media import strip
from t2vz.sheet import strip_key
from t2vz.spec import JobSpec

CARDS = "[...document.querySelectorAll('.card .open')].map(button => button.textContent)"
COUNT = "document.getElementById('count').textContent"
MANY = 5000


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with 60 rows."""
    out = tmp_path_factory.mktemp("sixty")
    keep(out, [row(number) for number in range(1, 61)])
    return written(out)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a page with 5,000 rows."""
    out = tmp_path_factory.mktemp("many")
    keep(out, [row(number) for number in range(1, MANY + 1)])
    return written(out)


def written(out: Path) -> str:
    return Path(page.write(out)[0]).as_uri()


def choose(browser: Browser, name: str, value: str) -> None:
    """As a person does who picks an option or types."""
    browser.js(
        "(field => { field.value = arguments[1]; field.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.querySelector(`[name=${arguments[0]}]`))",
        name,
        value,
    )


def shown(browser: Browser) -> list[str]:
    return browser.js(CARDS)


def loaded(browser: Browser) -> None:
    """Return once the thumbnails that are in sight are there."""
    images = "[...document.querySelectorAll('.view img')]"
    browser.until(f"{images}.length > 3 && {images}.every(image => image.complete && image.naturalWidth)")


def levels(browser: Browser, name: str) -> list[float]:
    """The grey level in the middle of each panel of the first card, as the screen shows them."""
    places = browser.js(
        "[...document.querySelector('.card').querySelectorAll('.view')].map(view => view.getBoundingClientRect())"
        ".map(box => [box.x + box.width / 2, box.y + box.height / 2])"
    )
    with Image.open(browser.picture(name)) as opened:
        picture = np.asarray(opened.convert("RGB")).astype(float)
    return [float(picture[int(y) - 3 : int(y) + 3, int(x) - 3 : int(x) + 3].mean()) for x, y in places]


def test_source_condition_and_result_play_in_step(browser: Browser, gallery: str) -> None:
    browser.open(f"{gallery}#mode=control&status=ok")
    loaded(browser)
    assert browser.js(
        "[...document.querySelector('.card').querySelectorAll('figcaption')].map(n => n.textContent)"
    ) == [
        "source",
        "edge",
        "result",
    ]
    seen = set()
    for look in range(40):
        now = levels(browser, "in-step")
        assert len(now) == 3
        assert max(now) - min(now) < LEVEL / 2, f"out of step at look {look}: {now}"
        seen.add(round(now[0] / LEVEL))
        if len(seen) >= 4:
            break
    assert len(seen) >= 4  # it moves, through more than two frames
    times = browser.js("document.querySelector('.card').getAnimations({subtree: true}).map(a => a.startTime)")
    assert len(times) == 3
    assert len(set(times)) == 1
    assert not (said := browser.complaints()), said


def test_pause_stops_all_and_play_goes_on(browser: Browser, gallery: str) -> None:
    browser.open(f"{gallery}#mode=control&status=ok")
    loaded(browser)
    browser.find("#play").click()
    first = levels(browser, "paused")
    states = "document.getAnimations().filter(a => a.animationName === 'play').map(a => a.playState)"
    assert set(browser.js(states)) == {"paused"}
    assert levels(browser, "paused") == first
    browser.find("#play").click()
    assert set(browser.js(states)) == {"running"}


def test_who_wants_less_motion_gets_stills(browser: Browser, gallery: str) -> None:
    browser.open(gallery, reduced_motion=True)
    loaded(browser)
    assert browser.js("document.getElementById('play').textContent") == "Play"
    assert set(browser.js("document.getAnimations().map(a => a.playState)")) == {"paused"}


def test_filters(browser: Browser, gallery: str) -> None:
    browser.open(gallery)
    assert browser.until(COUNT) == "60 rows, 6 failed"
    choose(browser, "status", "failed")
    assert browser.js(COUNT).startswith("6 of 60 rows")
    assert set(shown(browser)) == {f"row-00{n}0" for n in range(1, 7)}
    assert "ends after 3 of 8 frames" in browser.js("document.querySelector('.card.failed .reason').textContent")
    choose(browser, "status", "")
    choose(browser, "mode", "edit")
    assert browser.js(COUNT).startswith("20 of 60 rows")
    choose(browser, "mode", "")
    choose(browser, "words", "NIGHT cat")
    assert browser.js(COUNT).startswith("15 of 60 rows")
    choose(browser, "model", "/models/dreambooth")
    assert browser.js(COUNT).startswith("0 of 60 rows")
    assert "No row is like that" in browser.js("document.getElementById('rows').textContent")
    browser.find("#clear").click()
    browser.until(f"{COUNT} === '60 rows, 6 failed'")
    choose(browser, "model", "/models/dreambooth")
    assert browser.js(COUNT).startswith("15 of 60 rows")
    browser.find("#clear").click()
    browser.until(f"{COUNT} === '60 rows, 6 failed'")
    choose(browser, "measure", "flicker")
    choose(browser, "from", "0.5")
    wanted = {n for n in range(1, 61) if n % 10 and round(0.1 + n % 50 / 100, 3) >= 0.5}
    assert browser.js(COUNT) == f"{len(wanted)} of 60 rows"
    assert not (said := browser.complaints()), said


def test_flagged_rows_are_marked_and_found(browser: Browser, tmp_path: Path) -> None:
    told = {"content": "flagged", "content_frames": 3, "warnings": ("the safety checker flags 3 of its frames",)}
    withheld = {"error_stage": "content", "error_class": "ContentWithheld", "error_message": "withheld"}
    keep(
        tmp_path,
        [row(1, content="clear", content_frames=0), row(2, **told), row(3, status="failed", **told | withheld)],
    )
    browser.open(written(tmp_path))
    flagged = "[...document.querySelectorAll('.card')].filter(c => c.querySelector('.flagged')).map(c => c.place)"
    assert browser.js(flagged) == [0, 1]
    choose(browser, "content", "flagged")
    assert shown(browser) == ["row-0003", "row-0002"]
    choose(browser, "content", "")
    choose(browser, "words", "checker flags")
    assert shown(browser) == ["row-0003", "row-0002"]
    browser.find(".open").click()
    assert "withheld" in browser.find("#row").text


def test_order(browser: Browser, gallery: str) -> None:
    browser.open(gallery)
    assert shown(browser)[:2] == ["row-0060", "row-0059"]
    choose(browser, "order", "manifest")
    assert shown(browser)[:2] == ["row-0001", "row-0002"]
    choose(browser, "order", "worst flicker")
    assert shown(browser)[0] == "row-0049"
    choose(browser, "order", "best warp_error")
    assert shown(browser)[0] == "row-0007"
    assert browser.js("location.hash") == "#order=best+warp_error"
    browser.driver.refresh()  # the address keeps what was asked for
    assert browser.until(CARDS)[0] == "row-0007"


def test_the_keyboard_does_it_all(browser: Browser, gallery: str) -> None:
    from selenium.webdriver import Keys

    browser.open(f"{gallery}#status=ok")
    focus = "document.activeElement.textContent"
    for _ in range(30):
        browser.keys(Keys.TAB)
        if browser.js("document.activeElement.className") == "open":
            break
    assert browser.js(focus) == "row-0059"
    browser.keys(Keys.ARROW_RIGHT)
    assert browser.js(focus) == "row-0058"
    browser.keys(Keys.ARROW_DOWN)  # three columns at 1280 px
    assert browser.js(focus) == "row-0055"
    browser.keys(Keys.END)
    assert browser.js(focus) == "row-0001"
    box = browser.js("document.activeElement.closest('.card').getBoundingClientRect()")
    assert box["top"] >= 0
    assert box["bottom"] <= 900
    browser.keys(Keys.ENTER)
    assert browser.js("document.getElementById('row').open")
    assert browser.js("document.getElementById('row-title').textContent") == "row-0001"
    browser.keys(Keys.ARROW_LEFT)
    assert browser.js("document.getElementById('row-title').textContent") == "row-0002"
    browser.keys(Keys.ESCAPE)
    assert not browser.js("document.getElementById('row').open")
    assert browser.js(focus) == "row-0002"
    browser.keys(Keys.HOME)
    assert browser.js(focus) == "row-0059"


def test_a_window_that_changes_leaves_the_keyboard_where_it_was(browser: Browser, gallery: str) -> None:
    from selenium.webdriver import Keys

    browser.open(gallery)
    browser.js("document.querySelector('.card .open').focus()")
    browser.keys(*[Keys.ARROW_RIGHT] * 4)
    name = browser.js("document.activeElement.textContent")
    before = browser.js("document.querySelector('.card').style.width")
    size = {"width": 700, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.until("document.querySelector('.card').style.width !== arguments[0]", before)
    assert browser.js("document.activeElement.textContent") == name


def test_five_thousand_rows_cost_a_screenful(browser: Browser, many: str) -> None:
    browser.open(many)
    assert browser.until(COUNT).startswith("5,000 rows")
    loaded(browser)
    height = browser.js("document.documentElement.scrollHeight")
    most, last = 0, set()
    for part in range(21):
        browser.js("scrollTo({top: arguments[0], behavior: 'instant'})", height * part / 20)
        browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        most = max(most, browser.js("document.querySelectorAll('#rows > *').length"))
        last = set(shown(browser))
        assert browser.js(
            "[...document.querySelectorAll('.card')].some(card => card.getBoundingClientRect().top < 450)"
        )
    assert most <= 40
    assert "row-0001" in last
    assert len(browser.requested()) < 1500  # lazy: of some 5,000 pictures
    choose(browser, "words", "night")
    assert browser.js(COUNT).startswith("1,250 of 5,000 rows")
    assert not (said := browser.complaints()), said


@pytest.mark.parametrize("kind", ["file", "server"])
def test_nothing_is_asked_from_elsewhere(kind: str, browser: Browser, gallery: str, serving: Any) -> None:
    browser.requested()
    if kind == "file":
        browser.open(gallery)
    else:
        browser.open(serving(Path(gallery.removeprefix("file://")).parent))
    browser.until(f"{CARDS}.length")
    loaded(browser)
    browser.find(".card .open").click()
    assert browser.requested_outside() == []
    assert not (said := browser.complaints()), said


def test_a_phones_width(browser: Browser, gallery: str) -> None:
    browser.open(gallery, **PHONE)
    loaded(browser)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert browser.js(fits)
    lefts = browser.js("[...document.querySelectorAll('.card')].map(card => card.getBoundingClientRect().left)")
    assert len(set(lefts)) == 1  # one column
    assert not browser.find("#choices").is_displayed()
    browser.find("#more").click()
    assert browser.find("#choices").is_displayed()
    assert browser.js(fits)
    browser.picture("gallery-phone-filters")
    browser.find("#more").click()
    browser.picture("gallery-phone")
    browser.find(".card .open").click()
    assert browser.js("document.getElementById('row').getBoundingClientRect().width") == 360
    assert browser.js("document.getElementById('row').scrollWidth <= 360")
    browser.picture("gallery-phone-row")


def test_dark_mode(browser: Browser, gallery: str) -> None:
    paper = "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).map(Number)"
    browser.open(gallery)
    assert min(browser.js(paper)) > 200
    browser.open(gallery, dark=True)
    assert max(browser.js(paper)) < 60
    loaded(browser)
    browser.picture("gallery-dark")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [{}, PHONE])
def test_no_barriers(size: dict[str, int], dark: bool, browser: Browser, gallery: str) -> None:
    browser.open(gallery, dark=dark, **size)
    loaded(browser)
    browser.js("document.getElementById('plots').open = true")
    assert browser.barriers() == []
    browser.find(".card .open").click()
    assert browser.barriers(within="dialog") == []
    browser.find("#row .row-head button:last-child").click()
    choose(browser, "status", "failed")
    assert browser.barriers() == []
    browser.find(".card .open").click()
    assert browser.barriers(within="dialog") == []


EVIL = (
    '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 2">'
    '<svg/onload="window.hit = 3"> {{ 7*7 }} javascript:hit=4'
)


def test_prompts_that_are_programs_stay_prompts(browser: Browser, tmp_path: Path) -> None:
    parameters = json.dumps({EVIL: EVIL, "cells": {"prompt": EVIL, "id": EVIL}})
    quality = json.dumps({EVIL: 1.5})
    texts = {"prompt": EVIL, "negative_prompt": EVIL, "model": EVIL, "parameters": parameters, "quality": quality}
    failed = {"status": "failed", "error_message": EVIL, "error_stage": "<b>decode</b>", "error_class": EVIL}
    keep(tmp_path, [row(1, id=f"x{EVIL}", **texts), row(2, id="two", warnings=(EVIL,), **texts | failed)])
    browser.open(written(tmp_path))
    loaded_or_not = "document.querySelectorAll('.card').length === 2"
    browser.until(loaded_or_not)
    assert EVIL in browser.js("document.querySelector('.card.ok .prompt').textContent")
    assert EVIL in browser.js("document.querySelector('.card.failed .reason').textContent")
    for place in range(2):
        browser.js("document.querySelectorAll('.card .open')[arguments[0]].click()", place)
        assert browser.js("document.getElementById('row').textContent").count(EVIL) >= 4
        browser.find("#row .row-head button:last-child").click()
    assert browser.js("window.hit ?? null") is None
    assert browser.js("document.querySelectorAll('script').length") == 2
    assert browser.js("document.querySelectorAll('#row svg, .card svg, b').length") == 0
    browser.until("document.querySelector('#plots img')?.complete")


def test_a_row_opens_to_all_that_is_known_of_it(browser: Browser, tmp_path: Path) -> None:
    known = row(1, device="cuda:0", warnings=("its sound was left out",), negative_prompt="blur", peak_memory_bytes=5)
    keep(tmp_path, [known])
    browser.open(written(tmp_path))
    browser.until(f"{CARDS}.length")
    browser.find(".card .open").click()
    told = browser.js("document.getElementById('row').textContent")
    for value in ("blur", "cuda:0", "its sound was left out", f"{1:064x}", "guidance scale", "7.5", "run-1", "0.1.0"):
        assert value in told, value
    browser.js("document.querySelector('.row-body .panels img') && 1")
    browser.picture("gallery-row")


def test_the_line_to_render_a_row_again_means_the_row(browser: Browser, tmp_path: Path) -> None:
    asked = JobSpec(
        id="one", prompt='a "boat", at sea; and\nmore', mode="control", source="/clips/a.mp4",
        condition=("edge", "depth"), controlnet_conditioning_scale=(0.5, 1.0), num_inference_steps=20,
    )  # fmt: skip
    keep(tmp_path, [row(1, id="one", seed=2**63 - 25, parameters=json.dumps({"cells": cells_of(asked)}))])
    browser.open(written(tmp_path))
    browser.until(f"{CARDS}.length")
    browser.find(".card .open").click()

    def line() -> JobSpec:
        manifest = tmp_path / "again.csv"
        manifest.write_text(browser.js("document.querySelector('#row textarea').value"), encoding="utf-8", newline="")
        (found,) = read(manifest)
        assert isinstance(found, Row), found
        return found.spec

    assert line() == asked.model_copy(update={"seed": 2**63 - 25})
    browser.js("[...document.querySelectorAll('#row button')].find(b => b.textContent === 'With another seed').click()")
    other = line()
    assert other.seed != 2**63 - 25
    assert other.model_copy(update={"seed": None, "id": "one"}) == asked


def test_rows_without_thumbnails_are_shown_all_the_same(browser: Browser, tmp_path: Path) -> None:
    old, older = row(1), row(2)
    keep(tmp_path, [old, older], pictures=False)
    strip.write(tmp_path, strip_key(old.output_uri or ""), lines_of(old), tmp_path)
    browser.open(written(tmp_path))
    browser.until("document.querySelectorAll('.view img').length === 3")
    assert browser.js("getComputedStyle(document.querySelector('.view img')).getPropertyValue('--frames')") == "8"
    assert "no thumbnails" in browser.js("document.getElementById('rows').textContent")
    assert not (said := browser.complaints()), said


def test_the_video_plays(browser: Browser, tmp_path: Path) -> None:
    from fractions import Fraction

    from t2vz.media.encode import Encoding, encode

    one = row(1)
    keep(tmp_path, [one])
    (tmp_path / "videos").mkdir()
    frames = np.zeros((FRAMES, 64, 64, 3), np.uint8)
    encoded = encode(
        [frames],
        tmp_path / "work" / "video",
        width=64,
        height=64,
        rate_fps=Fraction(8),
        encoding=Encoding(),
        metadata={},
    )
    encoded.path.rename(tmp_path / (one.output_uri or ""))
    browser.open(written(tmp_path))
    browser.until(f"{CARDS}.length")
    browser.find(".card .open").click()
    browser.until("document.querySelector('#row video').readyState >= 2")
    assert browser.js("document.querySelector('#row video').duration") == pytest.approx(2.0, abs=0.01)
    browser.js("document.querySelector('#row video').play() && 1")
    browser.until("document.querySelector('#row video').currentTime > 0.1")
    assert not (said := browser.complaints()), said


@pytest.fixture
def serving() -> Iterator[Callable[[Path], str]]:
    """Serves the gallery of an output folder in a thread; its address."""
    import socket

    import uvicorn

    started: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(out: Path) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(serve.application(out), log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join(20)


def test_rows_appear_as_they_are_finished(browser: Browser, tmp_path: Path, serving: Callable[[Path], str]) -> None:
    out = tmp_path / "out"
    address = serving(out)
    browser.open(address)
    browser.until("document.getElementById('rows').textContent.includes('No results yet')")
    with claims.living(out, "run-1"):
        claims.take(out, "job", "run-1", "row-0003")
        keep(out, [row(1), row(2)])
        browser.until(f"{COUNT} === '2 rows'")
        browser.until("document.getElementById('live').textContent === '1 row under way: row-0003'")
        keep(out, [row(number) for number in range(3, 31)])
        browser.until(f"{COUNT} === '30 rows, 3 failed'")
        assert shown(browser)[0] == "row-0030"
        # Who reads further down is not moved.
        browser.js("scrollTo({top: 900, behavior: 'instant'})")
        before = browser.until("scrollY >= 900 && document.querySelectorAll('.card').length") and shown(browser)
        keep(out, [row(31, finished_at=BEGAN + timedelta(hours=1))])
        browser.until("!document.getElementById('fresh').hidden")
        assert browser.js("document.getElementById('fresh').textContent") == "Show 1 new row"
        assert shown(browser) == before
        browser.find("#fresh").click()
        browser.until(f"{CARDS}[0] === 'row-0031'")
    browser.until("document.getElementById('live').textContent.includes('no run at work')")
    assert not (said := browser.complaints()), said
