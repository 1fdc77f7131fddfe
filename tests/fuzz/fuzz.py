"""Damaged media, manifests and models, in numbers, through what a run does with them: `make fuzz`.

Every case must end in frames, a video or an error of ours. What must not be: this process crashes; a case takes longer
than its deadline; a defect of ours (UnexpectedError) in reading media or manifests; a traceback on the terminal; a file
anywhere but in the output folder. The last line is one JSON object; the exit code is 1 if there were such faults.

    python tests/fuzz/fuzz.py [--media 2000] [--manifests 500] [--models 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[1] / "benchmarks"):
    sys.path.insert(0, str(folder))
_CACHE = Path(tempfile.mkdtemp(prefix="t2vz-fuzz-"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_CACHE", str(_CACHE / "hub"))
os.environ.setdefault("T2VZ_CACHE_DIR", str(_CACHE / "t2vz"))

from clips import ffmpeg  # noqa: E402
from mutate import damaged, damaged_json, damaged_table  # noqa: E402
from PIL import Image  # noqa: E402

from t2vz.cli import main  # noqa: E402
from t2vz.errors import T2VZError  # noqa: E402
from t2vz.media import sandbox  # noqa: E402
from t2vz.media.limits import Limits  # noqa: E402
from t2vz.plan import Job, plan  # noqa: E402
from t2vz.render import Render, Settings, opening, peak_memory_bytes, render  # noqa: E402

LIMITS = Limits(max_decode_s=20.0, max_decode_bytes=2**30, max_frames=64, max_pixels=2**22, max_duration_s=600.0)
_OPTIONS = [part for name in ("decode_s", "decode_bytes", "frames", "pixels", "duration_s")
            for part in (f"--max-{name.replace('_', '-')}", str(getattr(LIMITS, f"max_{name}")))]  # fmt: skip
_DEADLINE_S = 120.0  # of a case, in this process; it is ended then

_PATTERN = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=8:d=1"]
_SOUND = ["-f", "lavfi", "-i", "sine=d=1:r=16000"]
_SOURCES: dict[str, list[str]] = {
    "h264.mp4": [*_PATTERN, *_SOUND, "-c:v", "libx264", "-bf", "2", "-pix_fmt", "yuv420p", "-c:a", "aac"],
    "faststart.mp4": [*_PATTERN, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-movflags", "+faststart"],
    "fragments.mp4": [*_PATTERN, *_SOUND, "-c:v", "libx264", "-movflags", "+frag_keyframe+empty_moov", "-c:a", "aac"],
    "hevc.mkv": [*_PATTERN, *_SOUND, "-c:v", "libx265", "-x265-params", "log-level=error", "-c:a", "flac"],
    "vp9.webm": [*_PATTERN, *_SOUND, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-c:a", "libopus"],
    "vp8.webm": [*_PATTERN, *_SOUND, "-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libvorbis"],
    "av1.mkv": [*_PATTERN, "-c:v", "libsvtav1", "-preset", "12"],
    "mpeg4.avi": [*_PATTERN, *_SOUND, "-c:v", "mpeg4", "-c:a", "mp3"],
    "h264.ts": [*_PATTERN, *_SOUND, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"],
    "prores.mov": [*_PATTERN, *_SOUND, "-c:v", "prores_ks", "-c:a", "pcm_s16le"],
    "mjpeg.mov": [*_PATTERN, "-c:v", "mjpeg", "-pix_fmt", "yuvj420p"],
    "flash.flv": [*_PATTERN, "-c:v", "flv1"],
    "mpeg2.mpg": [*_PATTERN, *_SOUND, "-r", "25", "-c:v", "mpeg2video", "-c:a", "mp2"],
    "ffv1.mkv": [*_PATTERN, "-c:v", "ffv1"],
    "animation.gif": [*_PATTERN],
}
_ROW = {"mode": "edit", "prompt": "x", "width": "64", "height": "64", "video_length": "8", "fps": "8", "end_s": "9"}
_PICTURES = ("png", "jpg", "webp", "tiff", "bmp", "avif")


@dataclass
class Figures:
    """cases; outcomes by kind of error ("ok" if none); slowest_s of a case; faults: what must not be, each told.

    defects: errors that are no crash and no hang, but in words of a library and not ours.
    """

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: str = ""
    faults: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)

    @contextmanager
    def case(self, what: str, typed: bool = True) -> Iterator[None]:
        """One try. typed: a defect of ours is a fault."""
        began, kind = time.monotonic(), "ok"
        faulthandler.dump_traceback_later(_DEADLINE_S, exit=True)
        try:
            yield
        except T2VZError as error:
            kind = type(error).__name__
            if kind == "UnexpectedError":
                (self.faults if typed else self.defects).append(f"{what}: {error.message}")
            if len(error.message.splitlines()) != 1:
                self.faults.append(f"{what}: not one line: {error.message!r}")
        except Exception as error:
            kind = "a foreign error"
            self.faults.append(f"{what}: {type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.cases += 1
        self.outcomes[kind] += 1
        took_s = round(time.monotonic() - began, 2)
        if took_s > self.slowest_s:
            self.slowest_s, self.slowest = took_s, what


def media(count: int, seed: int, folder: Path) -> Figures:
    """Damaged videos, animations and pictures, and folders of them: planned by the command, then decoded."""
    seeds = {name: made(folder / "seeds" / name, options) for name, options in _SOURCES.items()}
    for suffix in _PICTURES:
        seeds[f"picture.{suffix}"] = picture(folder / "seeds" / f"picture.{suffix}")
    importlib.import_module("t2vz.models.loading")  # not in the first case's time
    figures = Figures()
    inside, names = folder / "in", list(seeds)
    inside.mkdir(parents=True)
    rows = []
    for number in range(count):
        name = names[number % len(names)]
        file = inside / f"{number:05d}-{name}"
        mutant = damaged(seeds[name], seed * 1_000_003 + number)
        if name.startswith("picture") and number % 3 == 0:  # a folder with a good and a bad picture
            file = file.with_suffix("")
            file.mkdir()
            (file / f"1.{name.split('.')[1]}").write_bytes(seeds[name])
            (file / f"2.{name.split('.')[1]}").write_bytes(mutant)
        else:
            file.write_bytes(mutant)
        rows.append({"id": str(number), "source": file.name, **_ROW})
    manifest = written(inside / "manifest.csv", rows)
    before = files_of(folder)
    command(figures, ["plan", str(manifest), *_OPTIONS])
    settings = Settings(folder / "out", str(manifest), "fuzz", "cpu", LIMITS)
    with opening(settings):
        for item in plan(manifest, None, limits=LIMITS):
            with figures.case(f"{item.row.id if isinstance(item, Job) else item.id}"):
                if not isinstance(item, Job):
                    raise item.error  # type: ignore[union-attr]
                work = Render(item, settings)
                work.run("decode")
                assert work.clip is not None
                if work.clip.audio is not None:
                    track = sandbox.soundtrack(work.clip.audio, "mp4", [], work.workspace, LIMITS)
                    if track is not None:
                        track.close()
    figures.faults += [f"a file outside: {path}" for path in files_of(folder) - before if "out" not in path.parts]
    return figures


def manifests(count: int, seed: int, folder: Path) -> Figures:
    """Damaged CSV and Parquet manifests: planned by the command, and their good rows rendered, with stand-in stages."""
    import stub

    figures, settings = Figures(), Settings(folder / "out", "m", "fuzz", "cpu", LIMITS)
    made(folder / "in" / "clip.mp4", _SOURCES["h264.mp4"])
    rows = [
        {"id": "one", "mode": "text", "prompt": "a boat", "video_length": "4", "seed": "1"},
        {
            "id": "two",
            "mode": "edit",
            "prompt": "snow",
            "source": "clip.mp4",
            "fps": "8",
            "start_s": "0.1",
            "end_s": "0.9",
        },
        {"id": "", "mode": "control", "prompt": "x", "source": "clip.mp4", "condition": "edge+depth", "width": "64"},
        {"id": "four", "prompt": "y", "model": "mini", "scheduler": "ddim", "lora": "mini/lora", "lora_scale": "0.5"},
    ]
    table = written(folder / "in" / "good.csv", rows).read_text("utf-8")
    parquet = as_parquet(folder / "in" / "good.csv", folder / "in" / "good.parquet").read_bytes()
    with opening(settings):
        before = files_of(folder)
        for number in range(count):
            draw = seed * 1_000_003 + number
            path = folder / "in" / "damaged"
            if number % 3 == 0:
                path.write_bytes(damaged(parquet, draw))
            elif number % 3 == 1:
                path.write_bytes(damaged_table(table, draw).encode())
            else:
                path.write_bytes(damaged(table.encode(), draw))
            with figures.case(f"manifest {number}"):
                command(figures, ["plan", str(path), "--out", str(folder / "out"), *_OPTIONS])
                for item in plan(path, None, limits=LIMITS):
                    if isinstance(item, Job):
                        stub.render(item, settings)
                    elif item.error.__class__.__name__ == "UnexpectedError":  # type: ignore[union-attr]
                        raise item.error  # type: ignore[union-attr]
    new = {path for path in files_of(folder) - before if path.parts[0] != "out" and path.name != "damaged"}
    figures.faults += [f"a file outside: {path}" for path in new]
    return figures


def models(count: int, seed: int, folder: Path) -> Figures:
    """Damaged model folders, ControlNets and LoRAs: planned and rendered, whole."""
    import torch
    from tiny import write_controlnet, write_pipeline

    torch.set_num_threads(1)
    torch.manual_seed(0)
    write_pipeline(folder / "seeds" / "model", in_channels=4)
    write_controlnet(folder / "seeds" / "controlnet", base=folder / "seeds" / "model")
    made(folder / "in" / "clip.mp4", _SOURCES["h264.mp4"])
    from t2vz.models.table import MINI_FOLDER

    figures, settings = Figures(), Settings(folder / "out", "m", "fuzz", "cpu", LIMITS)
    small = {"width": "64", "height": "64", "video_length": "2", "num_inference_steps": "3", "guidance_scale": "1"}
    lora = next((MINI_FOLDER / "lora").glob("*.safetensors"))
    with opening(settings):
        before = files_of(folder)
        for number in range(count):
            draw = random.Random(seed * 1_000_003 + number)
            target = folder / "in" / f"{number:05d}"
            row = {"id": str(number), "prompt": "x", **small}
            if number % 5 == 0:
                target = target.with_suffix(".safetensors")
                target.write_bytes(damaged(lora.read_bytes(), draw.randrange(2**32)))
                row |= {"model": "mini", "lora": str(target)}
            elif number % 5 == 1:
                damage_folder(folder / "seeds" / "controlnet", target, draw)
                row |= {"mode": "control", "condition": "edge", "source": str(folder / "in" / "clip.mp4"),
                        "model": str(folder / "seeds" / "model"), "controlnet": str(target)}  # fmt: skip
            else:
                damage_folder(folder / "seeds" / "model", target, draw)
                row |= {"model": str(target)}
            (item,) = plan(written(folder / "in" / "manifest.csv", [row]), None, limits=LIMITS)
            with figures.case(f"model {number}", typed=False):
                if not isinstance(item, Job):
                    raise item.error  # type: ignore[union-attr]
                result = render(item, settings)
                if result is not None and result.status != "ok":
                    raise type(str(result.error_class), (T2VZError,), {})(
                        f"{result.error_stage}: {result.error_message}"
                    )
            remove(target)
    figures.faults += [f"a file outside: {path}" for path in files_of(folder) - before if path.parts[0] == "seeds"]
    return figures


def damage_folder(good: Path, target: Path, draw: random.Random) -> None:
    """A copy of a model's folder, of which one file is damaged, cut off, or gone."""
    shutil.copytree(good, target, copy_function=os.link)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    file = draw.choice(files)
    data = file.read_bytes()
    file.unlink()
    kind = draw.randrange(10)
    if kind == 0:
        return
    if file.suffix == ".json" and kind <= 7:
        file.write_text(damaged_json(data.decode(), draw.randrange(2**32)))
    else:
        file.write_bytes(damaged(data, draw.randrange(2**32)))


def command(figures: Figures, arguments: list[str]) -> None:
    """`t2vz` as a user has it."""
    told, log = io.StringIO(), io.StringIO()
    with redirect_stdout(told), redirect_stderr(log):
        code = main(arguments)
    text = told.getvalue() + log.getvalue()
    if "Traceback" in text or "T2VZ_DEBUG" in text or code not in (0, 1, 2):
        figures.faults.append(f"t2vz {' '.join(arguments[:2])}: {code}: {text[-300:]}")


def made(path: Path, options: list[str]) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    ffmpeg(*options, path)
    return path.read_bytes()


def picture(path: Path) -> bytes:
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    image.save(path, **({"save_all": True, "append_images": [image.rotate(90)] * 3} if path.suffix == ".webp" else {}))
    return path.read_bytes()


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(table: Path, path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with table.open(encoding="utf-8") as file:
        pq.write_table(pa.Table.from_pylist(list(csv.DictReader(file))), path)
    return path


def files_of(folder: Path) -> set[Path]:
    """All files below the folder, and beside this process: what is written relative to it lands there."""
    here = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return here | {path for path in Path.cwd().iterdir() if path.is_file()}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def fuzz(number_of: dict[str, int], seed: int) -> dict[str, Figures]:
    phases = {"media": media, "manifests": manifests, "models": models}
    with tempfile.TemporaryDirectory(prefix="t2vz-fuzz-") as folder:
        return {name: phases[name](count, seed, Path(folder, name)) for name, count in number_of.items() if count}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in (("media", 2000), ("manifests", 500), ("models", 200), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = vars(parser.parse_args())
    seed = given.pop("seed")
    found = fuzz(given, seed)
    for name, figures in found.items():
        for fault in figures.faults + figures.defects:
            print(f"{name}: {fault}")
    shutil.rmtree(_CACHE, ignore_errors=True)
    told: dict[str, object] = {
        name: {**vars(figures), "faults": len(figures.faults), "defects": len(figures.defects)}
        for name, figures in found.items()
    }
    print(json.dumps(told | {"peak_memory_bytes": peak_memory_bytes("cpu")}))
    sys.exit(any(figures.faults for figures in found.values()))
