"""Content: what the model's own safety checker flags is told in the row, or withheld; what it was not asked, too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from clips import make_clip
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from t2vz import storage
from t2vz.cli import main
from t2vz.errors import ContentWithheld, GenerationError, WorkerDied
from t2vz.library import Cutting, Joined, Source, joining, scan
from t2vz.media.encode import Encoding, encode, publish
from t2vz.models import safety
from t2vz.plan import Done, Job, Unready, plan
from t2vz.render import Render, Settings, file_name, opening, record_lost, render
from t2vz.results import ResultRow, read

SHOWN = ("videos", "strips", "thumbnails", "joined")
ALWAYS, NEVER = -2.0, 2.0  # thresholds of a cosine
FRAMES = 4


def with_checker(model: Path, folder: Path, threshold: float) -> Path:
    """A copy of the model with a tiny checker of random weights, which flags what is nearer to a concept."""
    shutil.copytree(model, folder)
    torch.manual_seed(4)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config)
    for weights in (checker.concept_embeds, checker.special_care_embeds):
        weights.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(NEVER)
    checker.save_pretrained(folder / "safety_checker")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def flags_all(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_checker(tiny_model, tmp_path_factory.mktemp("models") / "flags-all", ALWAYS)


@pytest.fixture(scope="module")
def flags_none(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_checker(tiny_model, tmp_path_factory.mktemp("models") / "flags-none", NEVER)


@pytest.fixture
def manifest(write_manifest: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def write(model: Path | str, **columns: Any) -> Path:
        row = {"id": "one", "model": model, "seed": 1, "video_length": FRAMES, "format": "png"}
        return write_manifest(tmp_path / "m.csv", row | columns)

    return write


def rendered(manifest: Path, out: Path, policy: str, run_id: str = "run") -> ResultRow:
    (job,) = plan(manifest, out, content=policy)
    assert isinstance(job, Job), job
    settings = Settings(out, str(manifest), run_id, "cpu", content=policy, snapshot_s=0)
    with opening(settings):
        row = render(job, settings)
    assert row is not None
    return row


def frames_of(out: Path, row: ResultRow) -> np.ndarray:
    return np.stack([cv2.imread(str(file))[..., ::-1] for file in sorted((out / row.output_uri).glob("*.png"))])


def test_it_judges_frames_as_diffusers_own_pipeline_does(tiny_model, flags_none, manifest, tmp_path):
    """Some of the frames: the threshold lies between their cosines."""
    row = rendered(manifest(flags_none), tmp_path / "out", "flag")
    frames = frames_of(tmp_path / "out", row)

    pipeline = StableDiffusionPipeline.from_pretrained(flags_none)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline.image_processor.numpy_to_pil(frames / 255)
    pixels = pipeline.feature_extractor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = pipeline.safety_checker.visual_projection(pipeline.safety_checker.vision_model(pixels)[1])
    cosines = torch.cosine_similarity(seen[:, None], pipeline.safety_checker.concept_embeds[None], dim=-1).amax(1)
    low, high = cosines.sort().values[1:3].tolist()
    assert high - low > 1e-4, "no threshold lies between these frames"

    model = with_checker(tiny_model, tmp_path / "some", (low + high) / 2)
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    _, expected = pipeline.run_safety_checker(frames / 255, "cpu", torch.float32)
    again = rendered(manifest(model), tmp_path / "again", "flag")
    assert np.array_equal(frames_of(tmp_path / "again", again), frames), "the checker changed the frames"
    assert again.content == "flagged"
    assert again.content_frames == sum(expected) == 2


def test_flagged_frames_are_told_and_kept_by_default(flags_all, manifest, tmp_path):
    assert Settings(tmp_path, "m", "run").content == "flag"
    row = rendered(manifest(flags_all), tmp_path / "out", "flag")
    assert (row.status, row.content, row.content_frames) == ("ok", "flagged", FRAMES)
    assert row.warnings == (f"the model's safety checker flags {FRAMES} of its frames",)


@pytest.mark.parametrize(
    ("model", "policy", "content", "count"),
    [
        ("flags_none", "flag", "clear", 0),
        ("flags_none", "withhold", "clear", 0),
        ("tiny_model", "flag", "no checker", None),
        ("tiny_model", "withhold", "no checker", None),
        ("flags_all", "off", "unchecked", None),
    ],
)
def test_the_row_says_what_was_found_and_what_was_not_asked(
    model, policy, content, count, manifest, tmp_path, request: pytest.FixtureRequest
):
    row = rendered(manifest(request.getfixturevalue(model)), tmp_path / "out", policy)
    assert (row.status, row.content, row.content_frames, row.warnings) == ("ok", content, count, ())
    (kept,) = read(tmp_path / "out")
    assert (kept.content, kept.content_frames) == (content, count)


def test_what_is_withheld_leaves_nothing_to_see_and_is_not_tried_again(flags_all, manifest, tmp_path):
    path, out = manifest(flags_all), tmp_path / "out"
    row = rendered(path, out, "withhold")
    assert (row.status, row.error_stage, row.error_class) == ("failed", "content", "ContentWithheld")
    assert (row.retryable, row.attempts, row.output_uri) == (False, 1, None)
    assert row.content == "flagged"
    assert "safety checker" in (row.error_message or "")
    assert shown(out) == []

    (item,) = plan(path, out, content="withhold")
    assert isinstance(item, Unready)
    assert type(item.error).__name__ == "ContentWithheld"
    assert isinstance(next(plan(path, out)), Job), "another policy may show it"


def shown(out: Path) -> list[str]:
    """Everything that pictures could be in: videos, strips, thumbnails, snapshots and drafts."""
    found = [path for name in (*SHOWN, ".work") for path in (out / name).rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(out)) for path in found if path.name != "sweep.lock")


@pytest.mark.parametrize("format", ["png", "mp4"])
@pytest.mark.parametrize("before", ["off", "flag"])
def test_a_stricter_policy_takes_back_what_a_laxer_one_has_shown(flags_all, manifest, tmp_path, before, format):
    path, out = manifest(flags_all, format=format), tmp_path / "out"
    assert rendered(path, out, before, "first").status == "ok"
    assert shown(out)
    assert isinstance(next(plan(path, out, content=before)), Done)
    assert rendered(path, out, "withhold", "second").error_class == "ContentWithheld"
    assert shown(out) == []
    (row,) = read(out)
    assert (row.status, row.output_uri) == ("failed", None)
    assert rendered(path, out, "off", "third").status == "ok"


class Failing(Render):
    """A row that comes to no frames."""

    def _generate(self) -> None:
        raise GenerationError("no frames today")


@pytest.mark.parametrize("way", ["fails", "lost"])
def test_what_a_laxer_policy_has_shown_is_taken_back_with_the_row_that_names_it(flags_all, manifest, tmp_path, way):
    """Else the file would stay where no result tells of it, and no later run would find it."""
    path, out = manifest(flags_all), tmp_path / "out"
    assert rendered(path, out, "flag", "first").content == "flagged"
    (job,) = plan(path, out, content="withhold")
    settings = Settings(out, str(path), "second", "cpu", content="withhold")
    with opening(settings):
        if way == "fails":
            row = render(job, settings, kind=Failing)
        else:
            row = record_lost(job, settings, WorkerDied("killed"), 3, datetime.now(UTC))
    assert row is not None
    assert row.status == "failed"
    assert [row.status for row in read(out)] == ["failed"]
    assert shown(out) == []


def test_what_another_run_has_shown_meanwhile_is_taken_back_too(flags_all, manifest, tmp_path):
    path, out = manifest(flags_all), tmp_path / "out"
    (planned_before,) = plan(path, out, content="withhold")
    assert rendered(path, out, "flag", "other").content == "flagged"
    settings = Settings(out, str(path), "strict", "cpu", content="withhold")
    with opening(settings):
        row = render(planned_before, settings)
    assert row is not None
    assert row.error_class == "ContentWithheld"
    assert shown(out) == []


class Flagged(Render):
    """Frames as they came, which a checker flags."""

    def _generate(self) -> None:
        self.seconds["model"] = 0.0

    def _encode(self) -> None:
        assert self.clip is not None
        self.content, self.content_frames = "flagged", len(self.clip)
        if self.settings.content == "withhold":
            raise ContentWithheld("flagged")
        size = {"width": self.clip.width, "height": self.clip.height}
        made = encode(
            [self.clip.frames], self.workspace / "video", rate_fps=self._rate_fps(), encoding=Encoding(), **size
        )
        self.output_uri = f"videos/{file_name(self.job.row.id)}-{made.sha256[:12]}.mp4"
        self.encoded = publish(made, self.settings.out, self.output_uri)


def test_what_was_joined_of_withheld_parts_is_taken_back(tmp_path):
    out = tmp_path / "out"
    source = make_clip(tmp_path / "long.mp4", 1, sound=False)
    style = {"mode": "edit", "prompt": "x", "fps": "6"}
    found = scan([Source("long.mp4", str(source))], out, style, cutting=Cutting(max_frames=3))

    def run(policy: str) -> Joined:
        settings = Settings(out, str(found.manifest), policy, "cpu", content=policy)
        with opening(settings):
            for job in plan(found.manifest, out, content=policy):
                assert isinstance(job, Job), job
                render(job, settings, kind=Flagged)
            ((_, what),) = joining(found, settings)
            return what() if callable(what) else what

    assert run("flag").status == "joined"
    assert shown(out)
    waits = run("withhold")
    assert waits.status == "waiting"
    assert shown(out) == []


def test_the_model_is_asked_by_one_row_at_a_time(monkeypatch):
    """One that has no memory left moves it to another device."""
    checker = safety.Checker(None, None)
    monkeypatch.setattr(safety.Checker, "_flagged", lambda self, frames: [safety._asking.locked()])
    assert checker.flagged(np.zeros((1, 8, 8, 3), np.uint8)) == [True]
    assert not safety._asking.locked()


def test_what_was_clear_or_could_not_be_checked_stands_under_a_stricter_policy(
    flags_none, tiny_model, manifest, tmp_path
):
    for model, name in ((flags_none, "clear"), (tiny_model, "none")):
        path = manifest(model)
        rendered(path, tmp_path / name, "flag")
        assert isinstance(next(plan(path, tmp_path / name, content="withhold")), Done)


def test_on_s3_it_is_taken_back_too(flags_all, manifest, s3, tmp_path):
    path, out = manifest(flags_all), f"{s3.bucket()}/out"
    (job,) = plan(path, out)
    settings = Settings(out, str(path), "first", "cpu")
    with opening(settings):
        assert render(job, settings).status == "ok"
    assert [folder for folder in SHOWN[:3] if not list(storage.entries(out, folder, deep=True))] == []
    (job,) = plan(path, out, content="withhold")
    settings = replace(settings, run_id="second", content="withhold")
    with opening(settings):
        assert render(job, settings).error_class == "ContentWithheld"
    assert [entry.key for folder in SHOWN for entry in storage.entries(out, folder, deep=True)] == []


@pytest.mark.parametrize("policy", ["flag", "withhold"])
def test_a_checker_that_is_named_and_not_whole(flags_none, manifest, tmp_path, policy):
    """Nobody is to believe that it looked."""
    model = Path(shutil.copytree(flags_none, tmp_path / "model"))
    (model / "safety_checker" / "model.safetensors").unlink()
    row = rendered(manifest(model), tmp_path / "out", policy)
    if policy == "withhold":
        assert (row.status, row.error_class) == ("failed", "ModelError")
        assert "safety_checker" in row.error_message
    else:
        assert (row.status, row.content) == ("ok", "unchecked")
        assert row.warnings[0].startswith("the content is not checked: ")
        assert isinstance(next(plan(tmp_path / "m.csv", tmp_path / "out", content="withhold")), Job), "it never looked"


def test_the_command_withholds_and_lets_go(prefect_api, flags_all, manifest, tmp_path, capsys):
    path, out = str(manifest(flags_all)), tmp_path / "out"
    command = ["run", path, "--out", str(out), "--device", "cpu", "--content"]
    for said in ("1 failed", "1 failed"):  # the second time without rendering it
        assert main([*command, "withhold"]) == 1
        told, log = capsys.readouterr()
        assert said in told.splitlines()
        assert "withheld as the run asks" in log
        assert shown(out) == []
    (row,) = read(out)
    assert row.attempts == 1
    assert row.content == "flagged", "the row of its rendering stands"
    assert main(["plan", path, "--out", str(out), "--content", "withhold"]) == 1
    assert "withheld" in capsys.readouterr().out
    assert main([*command, "off"]) == 0
    assert [row.content for row in read(out)] == ["unchecked"]
