"""Trains the `mini` family: `python -m t2vz.mini.train --out FOLDER`. Each stage can be killed and goes on.

See README.md beside this file for the recipe in words, and what it gave.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click

from t2vz.mini import annotators, family, train_diffusion, train_vae
from t2vz.mini.fit import plot_curves
from t2vz.mini.stages import Run, keep, load_vae


def write_family(run: Run) -> None:
    """All that was trained as float16 in the ordinary layout, in out/family."""
    from diffusers import ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    words, encoder, unet, _ = train_diffusion.trained(run)
    vae = load_vae(run)

    def save(folder: Path) -> None:
        edit = run.out / "edit"
        variants = {
            "base": (encoder, unet),
            "dreambooth": (encoder, UNet2DConditionModel.from_pretrained(run.out / "dreambooth")),
            "edit": (
                CLIPTextModel.from_pretrained(edit / "text_encoder"),
                UNet2DConditionModel.from_pretrained(edit / "unet"),
            ),
        }
        for name, (text, denoiser) in variants.items():
            parts = {"vae": vae.half(), "text_encoder": text.half(), "tokenizer": words, "unet": denoiser.half()}
            family.pipeline(parts).save_pretrained(folder / name)
        for condition in ("edge", "depth", "pose"):
            name = f"controlnet-{condition}"
            ControlNetModel.from_pretrained(run.out / name).half().save_pretrained(folder / name)
        for name, module in (("depth", "DepthAnythingForDepthEstimation"), ("pose", "VitPoseForPoseEstimation"),
                             ("detector", "RTDetrForObjectDetection")):  # fmt: skip
            _halve_annotator(run.out / name, folder / name, module)
        shutil.copytree(run.out / "lora", folder / "lora")
        for file in folder.rglob("config.json"):  # where it was trained is nobody's business
            config = json.loads(file.read_text())
            config.pop("_name_or_path", None)
            file.write_text(json.dumps(config, indent=2) + "\n")

    keep(run, "family", save)


def _halve_annotator(source: Path, target: Path, class_name: str) -> None:
    import transformers

    getattr(transformers, class_name).from_pretrained(source).half().save_pretrained(target)
    transformers.AutoImageProcessor.from_pretrained(source).save_pretrained(target)


# Stage → its function and the stages that it needs.
STAGES: dict[str, tuple[Callable[[Run], None], tuple[str, ...]]] = {
    "vae": (train_vae.train_vae, ()),
    "base": (train_diffusion.train_base, ("vae",)),
    "edit": (train_diffusion.train_edit, ("base",)),
    "controlnet-edge": (train_diffusion.train_controlnet_edge, ("base",)),
    "controlnet-depth": (train_diffusion.train_controlnet_depth, ("base",)),
    "controlnet-pose": (train_diffusion.train_controlnet_pose, ("base",)),
    "dreambooth": (train_diffusion.train_dreambooth, ("base",)),
    "lora": (train_diffusion.train_lora, ("base",)),
    "depth": (annotators.train_depth, ()),
    "detector": (annotators.train_detector, ("vae",)),
    "pose": (annotators.train_pose, ("vae",)),
}
STAGES["family"] = (write_family, tuple(STAGES))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m t2vz.mini.train", description="Train the `mini` family.")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is written; run again to go on")
    parser.add_argument("--stage", action="append", choices=list(STAGES), help="only this one (repeatable)")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="of all steps and pools, for quick trials")
    options = parser.parse_args(arguments)

    import torch
    from accelerate import PartialState

    torch.manual_seed(0)
    run = Run(options.out, options.steps_scale, str(PartialState().device))
    run.out.mkdir(parents=True, exist_ok=True)
    for name in options.stage or STAGES:
        train, needs = STAGES[name]
        if (run.out / name).is_dir():
            continue
        missing = [need for need in needs if not (run.out / need).is_dir()]
        if missing:
            raise SystemExit(f"stage {name} needs {', '.join(missing)} first")
        began = time.monotonic()
        torch.manual_seed(0)
        train(run)
        plot_curves(run.out)
        click.echo(f"{name}: done in {(time.monotonic() - began) / 60:.1f} min")


if __name__ == "__main__":
    main()
