"""What the README shows is run: its commands on the demo manifest, its Python, its manifest's columns."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from t2vz import cli
from t2vz.manifest import BadRow, read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MANIFESTS = (ROOT / "manifests" / "README.md").read_text()


def block(language: str, containing: str, page: str = README) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
    return next(text for text in blocks if containing in text)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a manifest of one quick row, to be in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manifest.csv").write_text(
        "id,prompt,width,height,video_length,num_inference_steps\none,a red ball,64,64,2,3\n"
    )
    return tmp_path


def test_the_python_example_renders(small, capsys):
    exec(compile(block("python", "opening(settings)"), "README.md", "exec"), {})
    assert "ok" in capsys.readouterr().out
    assert len(list((small / "out" / "videos").iterdir())) == 1


def test_the_example_in_diffusers_manner_makes_a_picture(small):
    example = block("python", "TextToVideoZero")
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open(small / "first.png").size == (128, 128)


@pytest.mark.parametrize(
    ("page", "containing", "modes"),
    [
        (README, "panda", ["text", "control", "control", "edit"]),
        (MANIFESTS, "surf", ["text", "control", "edit"]),
        (MANIFESTS, "lora", ["text", "control"]),
    ],
)
def test_the_example_manifests_are_manifests(tmp_path, page, containing, modes):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(block("csv", containing, page))
    rows = list(read(manifest))
    assert not [row for row in rows if isinstance(row, BadRow)]
    assert [row.spec.mode for row in rows] == modes


def test_the_commands_are_there(capsys):
    lines = [line.split("#")[0] for line in block("sh", "t2vz plan").splitlines()]
    for line in lines:
        command = shlex.split(line)[1]
        assert command in cli.cli.commands
    assert cli.main(["plan", str(ROOT / "manifests" / "demo.csv")]) == 0
    assert "9 jobs" in capsys.readouterr().out


def test_every_command_of_the_makefile_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_demo_has_every_mode_and_condition_of_the_embedded_model():
    demo = pd.read_csv(Path(__file__).parents[1] / "manifests" / "demo.csv", keep_default_na=False)
    assert set(demo["mode"]) == {"text", "control", "edit"}
    assert {"edge", "depth", "pose"} <= set("+".join(demo["condition"]).split("+"))
