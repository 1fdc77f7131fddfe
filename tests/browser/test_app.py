"""The playground in a real browser: `t2vz app`, one render a mode, what goes wrong, and what is appended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PHONE, Browser

from t2vz.manifest import BadRow, read
from t2vz.mini.clips import CLIPS
from t2vz.results import read as results

pytest.importorskip("gradio", reason="pip install 't2vz[app]'")

QUICK = {"num_inference_steps": "3", "guidance_scale": "1", "video_length (frames)": "2", "width (px)": "64",
         "height (px)": "64"}  # fmt: skip
# The control of a label, in the tab that is shown: of a slider its number, else what one types in.
FIELD = """[...document.querySelectorAll('[role=tabpanel]')].filter(p => p.offsetParent)
    .flatMap(p => [p.querySelector(`input[aria-label="number input for ${arguments[0]}"]`),
                   p.querySelector(`input[role=combobox][aria-label="${arguments[0]}"]`),
                   ...[...p.querySelectorAll('label')]
                       .filter(l => l.querySelector('[data-testid=block-info]')?.innerText.trim() == arguments[0])
                       .map(l => l.querySelector('input, textarea'))]).find(e => e)"""
BUTTON = """[...document.querySelectorAll('[role=tabpanel]')].filter(p => p.offsetParent)
    .flatMap(p => [...p.querySelectorAll('button')]).find(b => b.innerText.trim() == arguments[0])"""
STATUS = """[...document.querySelectorAll('.prose.t2vz-status')].filter(e => e.offsetParent)[0]?.innerText"""


class App:
    """A running `t2vz app`."""

    def __init__(self, out: Path) -> None:
        self.out, self.cache = out, out.parent / "cache"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "t2vz.cli", "app", "--out", str(out), "--port", "0", "--device", "cpu",
             "--max-upload-mb", "1"],
            stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(self.cache)},
        )  # fmt: skip
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.url = said.split()[2].rstrip(";")
        assert self.url.startswith("http://127.0.0.1:"), said


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    started = App(tmp_path_factory.mktemp("app") / "out")
    yield started
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(120) == 0
    assert not list(started.out.glob("claims/*"))
    assert started.cache.exists()
    left = {path.name for path in started.cache.rglob("*") if path.is_file()}
    assert left <= {f"{name}.mp4" for name in CLIPS}, "copies of what was shown"


@pytest.fixture
def page(app: App, browser: Browser) -> Browser:
    browser.open(app.url, height=1000)
    browser.until(BUTTON, "Render", timeout_s=60)
    return browser


def tab(page: Browser, name: str) -> None:
    page.js(f"[...document.querySelectorAll('button[role=tab]')].find(b => b.innerText.trim() == '{name}').click()")
    page.until(f"document.querySelector('button[role=tab][aria-selected=true]')?.innerText.trim() == '{name}'")


def fill(page: Browser, **values: str) -> None:
    from selenium.webdriver import Keys

    for label, value in values.items():
        field = page.until(FIELD, label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE)
        field.send_keys(value)
        field.send_keys(Keys.TAB)


def press(page: Browser, name: str) -> None:
    page.js(f"({BUTTON}).click()", name)


def ended(page: Browser) -> str:
    """What the page says once a run is over."""
    return str(page.until(f"(said => /^(Rendered|Failed|Not rendered|Stopped)/.test(said) && said)({STATUS})",
                          timeout_s=120))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "mode"),
    [
        ("Text to video", {"t0": "", "t1": ""}, "text"),
        ("Edges", {}, "control"),
        ("Edit", {}, "edit"),
    ],
)
def test_a_mode_renders_and_its_row_is_appended(
    page: Browser, app: App, name: str, values: dict[str, str], mode: str
) -> None:
    tab(page, name)
    fill(page, **QUICK, **values)
    press(page, "Render")
    said = ended(page)
    assert said.startswith("Rendered in "), said
    assert "2 frames of 64×64" in said
    video = "[...document.querySelectorAll('video')].filter(v => v.offsetParent && v.videoWidth == 64)[0]"
    page.until(f"{video}?.readyState >= 2")
    page.until("[...document.querySelectorAll('img')].some(i => i.offsetParent && i.naturalWidth == 128)")
    page.picture(f"app-{mode}")

    press(page, "Append to the manifest")
    page.until("[...document.querySelectorAll('.prose')].some(e => /^Appended to/.test(e.innerText))")
    *_, row = read(app.out / "playground.csv")
    assert not isinstance(row, BadRow)
    made = [one for one in results(app.out) if one.mode == mode]
    assert len(made) == 1
    assert (row.spec.mode, row.spec.prompt, row.spec.seed) == (mode, made[0].prompt, made[0].seed)
    assert row.spec.num_inference_steps == 3
    if mode != "text":
        assert row.cells["source"].startswith("sources/")
        assert row.cells["source"].endswith(".mp4")
    assert page.complaints() == []
    assert page.requested_outside() == []


def test_what_is_wrong_is_a_message(page: Browser) -> None:
    tab(page, "Text to video")
    fill(page, **{**QUICK, "width (px)": "65", "t0": "2", "t1": "1"})
    press(page, "Render")
    said = ended(page)
    assert said.startswith("Not rendered.")
    assert "width must be a multiple of 8 (it is '65')" in said
    assert "t0 must be below t1" in said
    page.picture("app-problems")


def test_the_result_stays_in_sight(page: Browser) -> None:
    tab(page, "Text to video")
    page.js("scrollTo(0, document.documentElement.scrollHeight)")
    page.until("scrollY > 200")
    top, bottom = page.js(f"(box => [box.top, box.bottom])(({BUTTON}).getBoundingClientRect())", "Render")
    assert 0 <= top < bottom < 1000


def test_presets_fill_the_controls(page: Browser) -> None:
    tab(page, "Edit")
    assert page.until(f"({FIELD}).value", "prompt") == "make it night"
    preset = page.until(FIELD, "Preset")
    preset.click()
    option = "[...document.querySelectorAll('[role=option]')].find(o => o.innerText.includes('Make the ball blue'))"
    page.until(option)
    page.js(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")
    page.until(f"({FIELD}).value == 'make the ball blue'", "prompt")
    assert page.js(f"({FIELD}).value", "seed") == "9"


def test_a_phone_and_the_dark(app: App, browser: Browser) -> None:
    browser.open(app.url, **PHONE, dark=True)
    browser.until(BUTTON, "Render", timeout_s=60)
    browser.until("document.body.classList.contains('dark') || getComputedStyle(document.body).colorScheme")
    assert browser.js("document.documentElement.scrollWidth") <= PHONE["width"]
    browser.picture("app-phone")


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_stands_in_the_way(app: App, browser: Browser, dark: bool) -> None:
    browser.open(app.url, dark=dark)
    browser.until(BUTTON, "Render", timeout_s=60)
    found = browser.barriers()
    assert not found, "\n".join(found)


def test_only_this_machine_is_let_in(app: App) -> None:
    request = urllib.request.Request(app.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 400
    with urllib.request.urlopen(app.url) as answer:
        assert "connect-src 'self'" in answer.headers["Content-Security-Policy"]
        text = answer.read().decode()
    assert "fonts.googleapis" not in text
    assert "cdnjs" not in text


def test_a_page_elsewhere_can_send_nothing_here(app: App, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "elsewhere.html"
    page.write_text("<!doctype html><title>elsewhere</title>")
    browser.open(page.as_uri())
    code = """(fetch(arguments[0] + '/gradio_api/upload', {method: 'POST', mode: 'no-cors', body: (form => {
        form.append('files', new Blob(['x']), 'planted-from-elsewhere.mp4'); return form; })(new FormData())})
        .then(answer => answer.type))"""
    assert browser.js(code, app.url) == "opaque"  # it was sent
    assert not list(Path(tempfile.gettempdir(), "gradio").glob("*/planted-from-elsewhere.mp4"))
    browser.open(f"{app.url}")  # a link from there is followed all the same
    browser.until(BUTTON, "Render", timeout_s=60)


def test_files_beside_the_videos_are_not_shown(app: App) -> None:
    (app.out / "secret.txt").write_text("secret")
    for path in (app.out / "secret.txt", Path("/etc/passwd"), app.out / "videos" / ".." / "secret.txt"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{app.url}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


def test_large_uploads_are_refused(app: App) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n' + bytes(2 * 10**6)
    request = urllib.request.Request(
        f"{app.url}/gradio_api/upload",
        body + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
