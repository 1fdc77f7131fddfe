"""Columns that reach beyond the engine: pictures, masks and scenes, from the manifest to the results row."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from t2vz.errors import SourceError, SourceMissing
from t2vz.plan import Job, Unready, plan
from t2vz.render import Render, Settings, opening, render

SIZE, FRAMES = 64, 5


def pictures(folder, arrays):
    folder.mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:03}.png")
    return folder.name


def planned(tmp_path, model, **columns):
    """The row of a one-row manifest: a Job, or the Unready that says what is wrong."""
    cells = {"id": "one", "prompt": "a red ball", "model": model, "width": SIZE, "height": SIZE, "seed": 3}
    cells |= {"num_inference_steps": 6, "video_length": FRAMES, "format": "png"} | columns
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(",".join(cells) + "\n" + ",".join(map(str, cells.values())) + "\n")
    (item,) = plan(manifest, None)
    return item


def rendered(tmp_path, model, **columns):
    job = planned(tmp_path, model, **columns)
    assert isinstance(job, Job), job.error
    settings = Settings(tmp_path / "out", "m", "run")
    with opening(settings):
        row = render(job, settings)
    assert row is not None
    assert row.status == "ok", row.error_message
    files = sorted((settings.out / row.output_uri).glob("*.png"))
    return row, np.stack([cv2.imread(str(file)) for file in files])


def test_a_mask_video_spares_the_foreground(tiny_model, tmp_path):
    half = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    half[:, :, : SIZE // 2] = 255
    name = pictures(tmp_path / "masks", half)
    columns = {"background_smoothing": 0.1, "foreground_mask": name}
    row, frames = rendered(tmp_path, tiny_model, **columns)
    assert row.source_uri == str(tmp_path / name)
    assert row.unet_evaluations == planned(tmp_path, tiny_model).unet_evaluations
    full = pictures(tmp_path / "full", np.full_like(half, 255))
    _, untouched = rendered(tmp_path, tiny_model, background_smoothing=0.1, foreground_mask=full)
    _, plain = rendered(tmp_path, tiny_model)
    assert np.array_equal(untouched, plain)  # all foreground: nothing to smooth
    assert (frames != plain).any()


def test_another_mask_is_another_job(tiny_model, tmp_path):
    masks = np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8)
    columns = {"background_smoothing": 0.4, "foreground_mask": pictures(tmp_path / "masks", masks)}
    before = planned(tmp_path, tiny_model, **columns)
    Image.fromarray(masks[0] + 255).save(tmp_path / "masks" / "000.png")
    assert planned(tmp_path, tiny_model, **columns).job_id != before.job_id


@pytest.mark.parametrize("column", ["foreground_mask", "ip_adapter_image"])
def test_a_file_that_is_not_there_is_named(tiny_model, tmp_path, column):
    weights, encoder = tmp_path / "ip.safetensors", tmp_path / "image_encoder"
    encoder.mkdir()
    for file in (weights, encoder / "config.json"):
        file.write_bytes(b"")
    beside = {"background_smoothing": 0.4} if column == "foreground_mask" else {"ip_adapter": weights.name}
    item = planned(tmp_path, tiny_model, **beside, **{column: "nowhere.png"})
    assert isinstance(item, Unready)
    assert type(item.error) is SourceMissing
    assert item.error.message.startswith(f"{column}: ")
    assert "nowhere.png" in item.error.message


def test_a_misspelt_kind_of_mask_is_told(tiny_model, tmp_path):
    item = planned(tmp_path, tiny_model, background_smoothing=0.4, foreground_mask="Atention")
    assert "did you mean 'attention'?" in item.error.message


@pytest.mark.parametrize("what", ["folder", "text", "changed"])
def test_what_is_no_picture_is_told_by_its_column(tiny_model, tmp_path, what):
    """Before anything is rendered, if it isn't changed meanwhile."""
    (tmp_path / "image_encoder").mkdir()
    for file in (tmp_path / "ip.safetensors", tmp_path / "image_encoder" / "config.json"):
        file.write_bytes(b"")
    picture, array = tmp_path / "picture", np.zeros((SIZE, SIZE, 3), np.uint8)
    if what == "folder":
        pictures(picture, [array])
    elif what == "text":
        picture.write_text("no picture")
    else:
        Image.fromarray(array).save(picture, "png")
    item = planned(tmp_path, tiny_model, ip_adapter="ip.safetensors", ip_adapter_image="picture")
    if what == "changed":
        assert isinstance(item, Job)
        picture.unlink()
        pictures(picture, [array])
        with pytest.raises(SourceError, match=r"^ip_adapter_image: .*picture: can't be read \(Is a directory\)"):
            Render(item, Settings(tmp_path / "out", "m", "run"))._picture()
        return
    assert isinstance(item, Unready)
    assert isinstance(item.error, SourceError)
    assert item.error.message.startswith(f"ip_adapter_image: {picture}: ")


@pytest.mark.parametrize("still", [False, True])
def test_a_mask_that_is_too_short_is_told_as_one(tiny_model, tmp_path, still):
    mask = np.zeros((SIZE, SIZE, 3), np.uint8)
    name = pictures(tmp_path / "masks", [mask] * (FRAMES - 1))
    if still:
        name = f"{name}/000.png"
    item = planned(tmp_path, tiny_model, background_smoothing=0.4, foreground_mask=name)
    assert isinstance(item, Unready)
    count = "1 frame" if still else f"{FRAMES - 1} frames"
    assert f"foreground_mask: the mask video has {count}, but {FRAMES} are asked for" in item.error.message


def test_scenes_of_the_source_have_anchors_of_their_own(tiny_model, tiny_controlnets, tmp_path):
    """The second scene is as it is in a clip of its own."""
    rng = np.random.default_rng(0)
    dark, bright = (rng.integers(low, low + 60, (SIZE, SIZE, 3), dtype=np.uint8) for low in (0, 190))
    dark[:, :, 0], bright[:, :, 2] = 200, 30
    columns = {
        "mode": "control",
        "condition": "edge",
        "controlnet": tiny_controlnets[0],
        "fps": 8,
        "controlnet_conditioning_scale": 8,
    }
    columns |= {"attention_anchor": "scene", "scheduler": "ddim"}
    both = pictures(tmp_path / "both", [dark] * 3 + [bright] * 2)
    alone = pictures(tmp_path / "alone", [bright] * 2)
    _, frames = rendered(tmp_path, tiny_model, source=both, **columns)
    _, second = rendered(tmp_path, tiny_model, source=alone, **columns | {"id": "two"})
    assert (frames[3:] != second).mean() <= 1e-3  # batches of another size round differently
    _, anchored = rendered(tmp_path, tiny_model, source=both, **columns | {"attention_anchor": "first", "id": "three"})
    assert (anchored[3:] != second).mean() > 0.02


def test_fit_says_how_a_source_of_another_aspect_is_brought_to_size(tmp_path):
    wide = np.full((FRAMES, SIZE, 2 * SIZE, 3), 200, np.uint8)
    wide[:, :, :8] = 90
    columns = {"mode": "edit", "source": pictures(tmp_path / "wide", wide), "fps": 8}
    settings = Settings(tmp_path / "out", "m", "run")
    clips, ids = {}, set()
    for fit in ("", "crop", "pad"):
        job = planned(tmp_path, "mini", **columns, fit=fit)
        assert isinstance(job, Job), job.error
        ids.add(job.job_id)
        with opening(settings):
            work = Render(job, settings)
            work.run("decode")
        assert work.clip is not None
        clips[fit] = work.clip.frames[0, :, :, 0]
    assert np.array_equal(clips[""], clips["crop"])
    assert len(ids) == 2
    assert (clips["crop"] == 200).all()
    assert (clips["pad"][SIZE // 4 : -SIZE // 4, 6:] == 200).all()
    assert (clips["pad"][SIZE // 4 : -SIZE // 4, :3] == 90).all()
    assert not clips["pad"][: SIZE // 4].any()
    assert not clips["pad"][-SIZE // 4 :].any()
