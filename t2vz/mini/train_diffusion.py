"""The diffusion models' stages: text to image, and what goes on from it: edits, ControlNets, a subject and a style."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from t2vz.mini import data, family, world
from t2vz.mini.fit import Draw, Losses
from t2vz.mini.stages import RECIPES, Run, fit_stage, keep, load_vae, no_grad


def train_base(run: Run) -> None:
    """UNet and text encoder together, on latents of drawn scenes with captions drawn anew each time."""
    words = family.tokenizer()
    encoder, unet = _plain(family.text_encoder(words), run), _plain(family.unet(), run)
    model = _together(unet=unet, text_encoder=encoder).to(run.device)
    vae = load_vae(run)
    scenes, latents = _base_pool(run, vae)

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(scenes), size=RECIPES["base"].batch)
        captions = [world.caption(scenes[i], draw.numpy) for i in chosen]
        text = _encode_text(encoder, words, _dropped(captions, 0.1, draw), run)
        return {"noise": _noise_error(lambda x, t: unet(x, t, text).sample, _sampled(latents, chosen, vae, draw), draw)}

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": words, "unet": unet}
    fit_stage(run, "base", model, losses, lambda step: _look_at_prompts(run, "base", parts, LOOK_PROMPTS, step))
    keep(run, "base", model.save)


LOOK_PROMPTS = (
    "a red ball on the grass", "a blue cat in the snow", "a yellow star on the sand at night",
    "a green house in the city at night", "a pink heart on the sea", "an orange car on the road by day",
    "a purple triangle on the sand by day", "a white box on the grass at night", "a person in red on the sand",
    "a dancing person in blue in the snow at night", "a ball", "a cat on the grass",
    "a striped red ball on the sea by day", "a house", "a star at night", "a yellow car and a blue box on the grass",
)  # fmt: skip


def _base_pool(run: Run, vae: Any) -> tuple[list[world.Scene], Any]:
    scenes = data.scenes(51, run.count(24000))
    return scenes, _pool(run, "base", vae, lambda: data.pictures(scenes))


def train_dreambooth(run: Run) -> None:
    """The whole UNet on a few pictures of a zorp, and as many of the world, so that it forgets nothing."""
    words, encoder, unet, vae = trained(run)
    scenes, latents = _base_pool(run, vae)
    zorps = data.zorp_scenes(61, 40)
    zorp_latents = _pool(run, "zorp", vae, lambda: np.stack([data.zorp_picture(scene) for scene in zorps]))
    half = RECIPES["dreambooth"].batch // 2

    def losses(draw: Draw) -> Losses:
        ours, theirs = draw.numpy.integers(len(zorps), size=half), draw.numpy.integers(len(scenes), size=half)
        captions = [data.zorp_caption(zorps[i], draw.numpy) for i in ours]
        captions += [world.caption(scenes[i], draw.numpy) for i in theirs]
        with no_grad():
            text = _encode_text(encoder, words, _dropped(captions, 0.1, draw), run)
            x = _cat(_sampled(zorp_latents, ours, vae, draw), _sampled(latents, theirs, vae, draw))
        return {"noise": _noise_error(lambda x, t: unet(x, t, text).sample, x, draw)}

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": words, "unet": unet}
    prompts = (
        "a zorp", "a zorp on the grass", "a zorp in the snow at night", "a zorp on the sand by day",
        "a red ball on the grass", "a blue cat in the snow", "a person", "a car on the road",
    )  # fmt: skip
    fit_stage(run, "dreambooth", unet, losses, lambda step: _look_at_prompts(run, "dreambooth", parts, prompts, step))
    keep(run, "dreambooth", unet.save_pretrained)


def train_lora(run: Run) -> None:
    """Low-rank adapters of the UNet that turn everything sepia."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    words, encoder, unet, vae = trained(run)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    scenes = data.scenes(71, run.count(2000))
    latents = _pool(run, "sepia", vae, lambda: data.sepia(data.pictures(scenes)))

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(scenes), size=RECIPES["lora"].batch)
        captions = [world.caption(scenes[i], draw.numpy) for i in chosen]
        with no_grad():
            text = _encode_text(encoder, words, _dropped(captions, 0.1, draw), run)
        return {"noise": _noise_error(lambda x, t: unet(x, t, text).sample, _sampled(latents, chosen, vae, draw), draw)}

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": words, "unet": unet}
    fit_stage(run, "lora", unet, losses, lambda step: _look_at_prompts(run, "lora", parts, LOOK_PROMPTS[:8], step))
    layers = {name: weight.half() for name, weight in get_peft_model_state_dict(unet).items()}
    keep(run, "lora", lambda folder: StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers))


# New shapes and patterns are far harder to learn than new colours and backgrounds.
EDIT_SHARES = {"colour": 0.2, "pattern": 0.3, "subject": 0.3, "background": 0.1, "time": 0.1}


def train_edit(run: Run) -> None:
    """InstructPix2Pix: UNet and text encoder go on from the base's; the source's latents are four more channels."""
    words, encoder, base_unet, vae = trained(run)
    unet = _plain(family.edit_unet(base_unet), run).to(run.device)
    model = _together(unet=unet, text_encoder=encoder.requires_grad_(True))
    rng = np.random.default_rng(81)
    kinds = rng.choice(list(EDIT_SHARES), p=list(EDIT_SHARES.values()), size=run.count(10000))
    edits = [world.edit_pair(rng, str(kind)) for kind in kinds]
    sources = _pool(run, "edit-source", vae, lambda: data.pictures([edit.source for edit in edits]))
    targets = _pool(run, "edit-target", vae, lambda: data.pictures([edit.target for edit in edits]))

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(edits), size=RECIPES["edit"].batch)
        # 5 % without text, 5 % without image, 5 % without both, as guidance needs them.
        drop = draw.numpy.random(len(chosen))
        texts = ["" if u < 0.05 or u >= 0.95 else edits[i].instruction for i, u in zip(chosen, drop, strict=True)]
        text = _encode_text(encoder, words, texts, run)
        image = sources[0][chosen] * _column(drop < 0.9, run)  # the mean, unscaled, as the pipeline gives it
        target = _sampled(targets, chosen, vae, draw)
        return {"noise": _noise_error(lambda x, t: unet(_cat(x, image, dim=1), t, text).sample, target, draw)}

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": words, "unet": unet}
    held_out = [world.edit_pair(np.random.default_rng((82, i))) for i in range(8)]
    fit_stage(run, "edit", model, losses, lambda step: _look_at_edits(run, parts, held_out, step))
    keep(run, "edit", model.save)


def _train_controlnet(run: Run, condition: str) -> None:
    words, encoder, unet, vae = trained(run)
    unet.requires_grad_(False)
    name = f"controlnet-{condition}"
    control = _plain(family.controlnet(unet), run).to(run.device)
    if condition == "pose":
        scenes = data.scenes(91, run.count(6000), subject="person")
        latents = _pool(run, "person", vae, lambda: data.pictures(scenes))
    else:
        scenes, latents = _base_pool(run, vae)
        scenes, latents = scenes[: run.count(8000)], latents[:, : run.count(8000)]
    pictures = np.stack([data.condition(condition, scene, world.draw(scene)) for scene in scenes])
    held_out = data.scenes(92, 8, **({"subject": "person"} if condition == "pose" else {}))

    def losses(draw: Draw) -> Losses:
        chosen = draw.numpy.integers(len(scenes), size=RECIPES[name].batch)
        captions = [world.caption(scenes[i], draw.numpy) for i in chosen]
        with no_grad():
            # Often without words, so that the condition has to tell what is where.
            text = _encode_text(encoder, words, _dropped(captions, 0.3, draw), run)
        shown = (data.to_tensor(pictures[chosen], run.device) + 1) / 2

        def predict(x: Any, t: Any) -> Any:
            down, middle = control(x, t, text, shown, return_dict=False)
            return unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample

        return {"noise": _noise_error(predict, _sampled(latents, chosen, vae, draw), draw, early=True)}

    parts = {"vae": vae, "text_encoder": encoder, "tokenizer": words, "unet": unet}
    fit_stage(run, name, control, losses, lambda step: _look_at_control(run, condition, parts, control, held_out, step))
    keep(run, name, control.save_pretrained)


def train_controlnet_edge(run: Run) -> None:
    _train_controlnet(run, "edge")


def train_controlnet_depth(run: Run) -> None:
    _train_controlnet(run, "depth")


def train_controlnet_pose(run: Run) -> None:
    _train_controlnet(run, "pose")


# --- what they share --------------------------------------------------------------------------------------------------


def _noise_error(predict: Callable[[Any, Any], Any], latents: Any, draw: Draw, early: bool = False) -> Any:
    """Mean squared error of the predicted noise, weighted by min(SNR, 5) / SNR (Hang et al., 2023).

    early: more often the noise levels of the first steps of sampling, which decide what is where.
    """
    import torch
    from diffusers import DDPMScheduler

    count = len(latents)
    noise = torch.randn(latents.shape, generator=draw.torch).to(latents.device)
    u = torch.rand(count, generator=draw.torch)
    t = (1000 * (1 - u.square() if early else u)).long().clamp(max=999)
    alpha = DDPMScheduler(**family.NOISE_SCHEDULE).alphas_cumprod[t].to(latents.device)
    noisy = alpha.sqrt()[:, None, None, None] * latents + (1 - alpha).sqrt()[:, None, None, None] * noise
    error = (predict(noisy, t.to(latents.device)).float() - noise).square().mean((1, 2, 3))
    ratio = alpha / (1 - alpha)
    return (error * ratio.clamp(max=5) / ratio).mean()


def _pool(run: Run, name: str, vae: Any, frames: Callable[[], world.Frame]) -> Any:
    """Posteriors of pictures, (2, N, 4, 16, 16): mean and standard deviation. Kept in out/pools for later stages."""
    import torch

    path = run.out / "pools" / f"{name}-{run.scale:g}.pt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        torch.save(data.encode(vae, frames(), run.device).half().cpu(), draft)
        os.replace(draft, path)
    return torch.load(path, map_location=run.device, weights_only=True).float()


def _sampled(posteriors: Any, chosen: Any, vae: Any, draw: Draw) -> Any:
    import torch

    mean, std = posteriors[0][chosen], posteriors[1][chosen]
    return (mean + std * torch.randn(mean.shape, generator=draw.torch).to(mean.device)) * vae.config.scaling_factor


def _dropped(captions: list[str], share: float, draw: Draw) -> list[str]:
    return ["" if draw.numpy.random() < share else caption for caption in captions]


def _encode_text(encoder: Any, words: Any, texts: list[str], run: Run) -> Any:
    ids = words(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return encoder(ids.to(run.device)).last_hidden_state


def _column(values: Any, run: Run) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=run.device)[:, None, None, None]


def _cat(*tensors: Any, dim: int = 0) -> Any:
    import torch

    return torch.cat(tensors, dim)


def _together(**modules: Any) -> Any:
    """Modules that are trained together; `save` writes each into a folder of its name."""
    import torch

    class Together(torch.nn.ModuleDict):
        def save(self, folder: Path) -> None:
            module: Any
            for name, module in self.items():
                module.save_pretrained(folder / name)

    return Together(modules)


def _plain(model: Any, run: Run) -> Any:
    """On CPUs plain attention is the fastest that there is for bfloat16 with narrow heads: 0.6 s a step, not 1.0."""
    if run.device == "cpu":
        if hasattr(model, "set_attn_processor"):
            from diffusers.models.attention_processor import AttnProcessor

            model.set_attn_processor(AttnProcessor())
        else:
            model.set_attn_implementation("eager")
    return model


def trained(run: Run) -> tuple[Any, Any, Any, Any]:
    """Tokenizer, text encoder (frozen), UNet and VAE of the trained base."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(run.out / "base" / "text_encoder").to(run.device).eval()
    unet = UNet2DConditionModel.from_pretrained(run.out / "base" / "unet").to(run.device)
    return family.tokenizer(), _plain(encoder.requires_grad_(False), run), _plain(unet, run), load_vae(run)


def _look_at_prompts(run: Run, name: str, parts: dict[str, Any], prompts: tuple[str, ...], step: int) -> None:
    _show(run, f"{name}-{step:05d}", _generate(run, family.pipeline(parts), prompt=list(prompts)))


def _look_at_edits(run: Run, parts: dict[str, Any], edits: list[world.Edit], step: int) -> None:
    sources, targets = (data.pictures([getattr(edit, side) for edit in edits]) for side in ("source", "target"))
    images = (data.to_tensor(sources) + 1) / 2
    texts = [edit.instruction for edit in edits]
    edited = _generate(run, family.pipeline(parts), prompt=texts, image=images, image_guidance_scale=1.5)
    _show(run, f"edit-{step:05d}", np.concatenate([sources, edited, targets]))


def _look_at_control(
    run: Run, condition: str, parts: dict[str, Any], control: Any, scenes: list[world.Scene], step: int
) -> None:
    from diffusers import StableDiffusionControlNetPipeline

    frames = data.pictures(scenes)
    pictures = np.stack([data.condition(condition, s, f) for s, f in zip(scenes, frames, strict=True)])
    pipeline = family.pipeline(parts)
    controlled = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=control, requires_safety_checker=False
    )
    texts = [world.caption(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    made = _generate(run, controlled, prompt=texts, image=(data.to_tensor(pictures) + 1) / 2)
    _show(run, f"controlnet-{condition}-{step:05d}", np.concatenate([frames, pictures, made]))


def _generate(run: Run, pipeline: Any, **arguments: Any) -> world.Frame:
    """25 steps at guidance 5 of the pipeline as users have it: uint8 (N, H, W, 3)."""
    import torch

    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **arguments,
        num_inference_steps=min(25, run.count(25)),
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    return (images * 255).round().astype(np.uint8)


def _show(run: Run, name: str, frames: world.Frame) -> None:
    data.save_grid(frames, run.out / "samples" / f"{name}.png", columns=8)
