"""The denoising loop on a GPU against diffusers' Text2Video-Zero: wall time, use of the machine, memory.

python tests/benchmarks/gpu.py [--small]

Stable Diffusion 1.5 and SDXL in their published shapes, with random weights, at 512² in float16 and 1024² in bfloat16;
50 steps with t0 = 44, t1 = 47. Both sides get prompt embeddings and make latents: no text encoder, no VAE. The peer
makes the UNet calls that its pipeline makes, with its attention processor, its scheduler, channels-last weights, and
the best of what diffusers documents: eager, `compile_repeated_blocks`, the whole UNet under torch.compile. Ours is
`engine.lockstep.denoise`, the better of eager and `engine.speed.compile_regions`. Ratios are the peer's over ours. The
last line is one JSON object. --small runs everything on tiny models where there is no GPU, so that it can't rot.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero as peer_pipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from t2vz.engine import schedule
from t2vz.engine.attention import anchor_attention
from t2vz.engine.guidance import classifier_free
from t2vz.engine.lockstep import Denoiser, denoise
from t2vz.engine.speed import compile_regions, shared_beginning

SDXL_ADDED = {"text_embeds": 1280, "time_ids": 6}
SD15 = {"cross_attention_dim": 768}  # the rest are UNet2DConditionModel's defaults, which are SD 1.x
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
_TINY_WIDTHS = {"block_out_channels": (16, 16, 32), "norm_num_groups": 8, "cross_attention_dim": 32}
SMALL = {
    "sd15": {
        **_TINY_WIDTHS,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 2,
    },
    "sdxl": {
        **SDXL,
        **_TINY_WIDTHS,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "transformer_layers_per_block": (1, 1, 2),
    },
}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


@dataclass
class Setting:
    """One model at one size on one device. steps: S; the first `alone` of them for the anchor alone, and the last
    `together` of them for all frames, as t0 = 44 and t1 = 47 have it at 50."""

    config: dict[str, Any]
    px: int
    dtype: torch.dtype
    device: str
    steps: int

    @property
    def alone(self) -> int:
        return self.steps - 1 - round(0.88 * self.steps)

    @property
    def together(self) -> int:
        return round(0.94 * self.steps) + 1

    def unet(self) -> Any:
        torch.manual_seed(0)
        with torch.device(self.device):
            unet = UNet2DConditionModel(**self.config)
        return unet.to(dtype=self.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)

    def inputs(self, device: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings of two branches, and what SDXL wants beside."""
        torch.manual_seed(1)
        text = torch.randn(2, 77, self.config["cross_attention_dim"]).to(device, self.dtype)
        if "addition_embed_type" not in self.config:
            return text, {}
        return text, {name: torch.ones(2, size).to(device, self.dtype) for name, size in SDXL_ADDED.items()}

    def latents(self, frames: int) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(frames, 4, self.px // 8, self.px // 8).to(self.device)


@torch.no_grad()
def ours(setting: Setting, unet: Any, frames: int, chunk: int, together: int | None = None) -> None:
    text, added = setting.inputs(setting.device)
    latents = setting.latents(frames)
    first = setting.steps - (together or setting.together)
    with anchor_attention([unet], branches=2) as state, shared_beginning([unet], state, (0, 0)):
        denoiser = Denoiser(unet, state, text, classifier_free(7.5), setting.steps, added=added)
        for x, steps in ((latents[:1], range(setting.alone)), (latents, range(first, setting.steps))):
            scheduler = schedule.make_scheduler("ddim", SCHEDULE, setting.steps, steps.start)
            denoise(denoiser, x, scheduler, steps, seed=1, chunk_size=chunk, on_step=lambda count: None)


@torch.no_grad()
def peer(setting: Setting, unet: Any, frames: int, chunk: int | None) -> None:
    """The UNet calls of TextToVideoZeroPipeline, unchunked or by the chunk recipe of diffusers' documentation."""
    text, added = setting.inputs(setting.device)
    clips = [frames]
    if chunk is not None:
        starts = list(range(0, frames, chunk - 1))
        clips = [1 + end - start for start, end in zip(starts, [*starts[1:], frames], strict=True)]
    for clip in clips:
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(setting.steps, device=setting.device)
        first = setting.steps - setting.together
        for x, steps in ((1, range(setting.alone)), (clip, range(first, setting.steps))):
            # Its pipelines repeat the prompt for each frame.
            prompt = text.repeat_interleave(x, 0)
            given = {name: value.repeat_interleave(x, 0) for name, value in added.items()}
            latents = setting.latents(x).to(setting.dtype)
            for step in steps:
                t = scheduler.timesteps[step]
                out = unet(
                    torch.cat([latents] * 2),
                    t,
                    encoder_hidden_states=prompt,
                    added_cond_kwargs=given,
                    return_dict=False,
                )[0]
                negative, positive = out.chunk(2)
                guided = negative + 7.5 * (positive - negative)
                latents = scheduler.step(guided, t, latents, return_dict=False)[0]


def our_flops(setting: Setting, frames: int, chunk: int) -> int:
    """FLOPs of `ours`, on tensors without data."""
    nowhere = Setting(setting.config, setting.px, setting.dtype, "meta", setting.steps)
    unet = nowhere.unet()
    text, added = nowhere.inputs("meta")

    def work(denoiser: Denoiser, count: int) -> int:
        x, t = torch.empty(count, 4, setting.px // 8, setting.px // 8, device="meta"), torch.tensor(1, device="meta")
        with FlopCounterMode(display=False) as counter:
            for start in range(0, count, chunk):
                part = slice(start, min(start + chunk, count))
                denoiser(x[part], t, part, 0)
        return counter.get_total_flops()

    with torch.no_grad(), anchor_attention([unet], branches=2) as state, shared_beginning([unet], state, (0, 0)):
        denoiser = Denoiser(unet, state, text, classifier_free(7.5), setting.steps, added=added)
        work(denoiser, 1)  # the prompt's keys and values are there from now on
        return setting.alone * work(denoiser, 1) + setting.together * work(denoiser, frames)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


def matmul_flops_per_s(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b)
    repeats = 20
    return repeats * 2 * size**3 / min(seconds(lambda: [a @ b for _ in range(repeats)]) for _ in range(3))


def peak_bytes(call: Callable[[], object]) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def compare(setting: Setting, rate: float, pairs: int, *, small: bool) -> dict[str, Any]:
    processor = peer_pipeline.CrossFrameAttnProcessor2_0(batch_size=2)
    our_ways, their_ways = {"eager": setting.unet()}, {"eager": setting.unet()}
    their_ways["eager"].set_attn_processor(processor)
    if not small:
        our_ways["regions"] = setting.unet()
        compile_regions(our_ways["regions"])
        their_ways["regions"] = setting.unet()
        their_ways["regions"].set_attn_processor(processor)
        their_ways["regions"].compile_repeated_blocks()
        whole = setting.unet()
        whole.set_attn_processor(processor)
        their_ways["whole"] = torch.compile(whole, mode="max-autotune-no-cudagraphs")
    found: dict[str, Any] = {}
    for name, frames, chunk in (("8_unchunked", 8, None), ("24_chunks_of_2", 4 if small else 24, 2)):
        # Once to warm up and compile, once to choose by.
        sides: list[Callable[[], object]] = []
        best = {}
        for side, ways, run, size in (
            ("peer", their_ways, peer, chunk),
            ("ours", our_ways, ours, chunk or frames),
        ):
            calls = {way: partial(run, setting, unet, frames, size) for way, unet in ways.items()}
            times = {way: min(seconds(call), seconds(call)) for way, call in calls.items()}
            say(f"  {name}: {side} {times}")
            best[side] = min(times, key=lambda way, times=times: times[way])
            sides.append(calls[best[side]])
        taken = [(seconds(sides[0]), seconds(sides[1])) for _ in range(pairs)]
        our_s = statistics.median(mine for _, mine in taken)
        found[name] = {
            "wall_ratio": round(statistics.median(theirs / mine for theirs, mine in taken), 3),
            "ours_s": round(our_s, 3),
            "best": best,
            "flops_utilisation": round(our_flops(setting, frames, chunk or frames) / our_s / rate, 4),
        }
    for frames in (8, 64):
        # A few steps reach the peak.
        peak = peak_bytes(partial(ours, setting, our_ways["eager"], frames, 2, together=2))
        found[f"peak_{frames}_frames_bytes"] = peak
    return found


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models and few steps, on the CPU too")
    parser.add_argument("--pairs", type=int, default=3)
    asked = parser.parse_args()
    figures: dict[str, Any] = {"benchmark": "gpu", "gpu": None}
    if not asked.small and not torch.cuda.is_available():
        say("no GPU here; --small runs this on the CPU, without meaning")
        print(json.dumps(figures))
        return
    diffusers.logging.set_verbosity_error()  # it warns of a list of modules to keep in float32, which is empty
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = (torch.float32, torch.float32) if device == "cpu" else (torch.float16, torch.bfloat16)
    made: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    rates = {dtype: matmul_flops_per_s(device, dtype, 128 if asked.small else 8192) for dtype in set(half)}
    made["matmul_tflops"] = {str(dtype).removeprefix("torch."): round(rate / 1e12, 3) for dtype, rate in rates.items()}
    for name, config in {"sd15": SD15, "sdxl": SDXL}.items():
        for px, dtype in ((32, half[0]),) if asked.small else ((512, half[0]), (1024, half[1])):
            say(f"{name}, {px} px, {dtype}")
            steps = 6 if asked.small else 50
            setting = Setting(SMALL[name] if asked.small else config, px, dtype, device, steps)
            made[f"{name}_{px}"] = compare(setting, rates[dtype], asked.pairs, small=asked.small)
            if device == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps(figures | {"gpu": made, "small": asked.small}))


if __name__ == "__main__":
    main()
