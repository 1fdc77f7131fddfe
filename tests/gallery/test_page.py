"""The page as a file: whole, by itself, and with no text of a row taken for markup. `tests/browser` looks at it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished import keep, row
from s3 import S3

from t2vz import storage
from t2vz.cli import main
from t2vz.errors import OutputError
from t2vz.gallery.page import write

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} &lt; \"' \u2028 <!--"


class Page(HTMLParser):
    """The elements of a page, with the text of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))

    def data(self) -> dict:
        (text,) = (text for tag, text in self.texts if tag == "script" and text.lstrip().startswith("{"))
        return json.loads(text)


def test_the_page_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    keep(tmp_path, [row(number) for number in range(1, 4)])
    where, count = write(tmp_path)
    assert (where, count) == (str(tmp_path / "gallery.html"), 3)
    html = Path(where).read_text("utf-8")
    page = Page(html)
    addresses = [value for _, names in page.elements for name, value in names.items() if name in ("src", "href")]
    assert sorted(filter(None, addresses)) == ["#rows", "data:,"]
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    assert page.data()["base"] == ""
    assert all((tmp_path / one["picture"]).is_file() for one in page.data()["rows"])


def test_what_rows_say_stays_text(tmp_path: Path) -> None:
    keep(tmp_path, [row(1, id="one", prompt=EVIL), row(2, id=EVIL[:50], status="failed", error_message=EVIL)])
    where, _ = write(tmp_path)
    page = Page(Path(where).read_text("utf-8"))
    assert [tag for tag, _ in page.elements if tag in ("script", "img")] == ["script", "script"]
    assert {one.get("prompt") for one in page.data()["rows"]} >= {EVIL}
    assert {one.get("error_message") for one in page.data()["rows"]} >= {EVIL}


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    keep(tmp_path, [row(1)])
    where, _ = write(tmp_path)
    page = Page(Path(where).read_text("utf-8"))
    (policy,) = (names["content"] or "" for tag, names in page.elements if names.get("http-equiv"))
    (script,) = (text for tag, text in page.texts if tag == "script" and "use strict" in text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_a_page_elsewhere_finds_the_way_back(tmp_path: Path) -> None:
    out, pages = tmp_path / "out put", tmp_path / "pages"
    pages.mkdir()
    keep(out, [row(1)])
    where, _ = write(out, pages / "one.html")
    data = Page(Path(where).read_text("utf-8")).data()
    assert data["base"] == "../out%20put/"
    assert (pages / "../out put" / data["rows"][0]["picture"]).is_file()


def test_an_embedding_page_needs_no_other_file(tmp_path: Path) -> None:
    keep(tmp_path / "out", [row(1), row(2, output_uri="videos/gone.mp4")])
    (tmp_path / "out" / "thumbnails" / "gone.mp4.webp").unlink()
    (tmp_path / "out" / "strips" / "gone.mp4.webp").unlink(missing_ok=True)
    write(tmp_path / "out", tmp_path / "one.html", embed=True)
    first, second = Page((tmp_path / "one.html").read_text("utf-8")).data()["rows"]
    kind, _, body = first["picture"].partition(",")
    assert kind == "data:image/webp;base64"
    assert base64.b64decode(body) == (tmp_path / "out/thumbnails/row-0001-000000000001.mp4.webp").read_bytes()
    assert "picture" not in second
    assert "video" not in first


def test_on_s3_the_page_lies_beside_the_videos(s3: S3, tmp_path: Path) -> None:
    out = f"{s3.bucket()}/out"
    local = tmp_path / "local"
    keep(local, [row(1)])
    for file in (path for path in local.rglob("*") if path.is_file()):
        storage.upload(file, out, file.relative_to(local).as_posix())
    where, count = write(out)
    assert (where, count) == (f"{out}/gallery.html", 1)
    page = Page((storage.get(out, "gallery.html") or b"").decode())
    assert page.data()["rows"][0]["picture"].startswith("thumbnails/")
    with pytest.raises(OutputError, match="embed the pictures"):
        write(out, tmp_path / "here.html")
    write(out, tmp_path / "here.html", embed=True)
    assert Page((tmp_path / "here.html").read_text("utf-8")).data()["rows"][0]["picture"].startswith("data:image/webp")


def test_the_command_says_where_the_page_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(tmp_path / "out", [row(1), row(2)], pictures=False)
    assert main(["gallery", str(tmp_path / "out"), "--limit", "1"]) == 0
    assert capsys.readouterr().out == f"1 row shown in {tmp_path / 'out' / 'gallery.html'}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{out}/none"], "there are no results here"),
        (["{out}", "--file", "{out}/none/page.html"], "there is no such folder to write to"),
        (["{out}", "--file", "{out}"], "can't be written"),
        (["{out}", "--serve", "--embed"], "--serve writes no page"),
        (["{out}", "--port", "80"], "--port is for --serve"),
    ],
)
def test_what_can_not_be_done_is_said(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(tmp_path, [row(1)], pictures=False)
    assert main(["gallery", *(text.format(out=tmp_path) for text in arguments)]) == 2
    assert said in capsys.readouterr().err
