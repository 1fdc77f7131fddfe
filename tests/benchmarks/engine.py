"""The engine against diffusers' TextToVideoZeroPipeline: FLOPs, wall time, memory. Side by side in one run.

python tests/benchmarks/engine.py [--size tiny|mid] [--frames 8] [--pairs 3] [--px 128]

The peer runs unchunked, and in chunks of 8, 4 and 2 by the recipe in diffusers' documentation. Both sides denoise
50 steps with t0 = 44, t1 = 47 in the same random-weight model and stop at latents. Wall times are medians over pairs
of runs that alternate. The last line is one JSON object; ratios are the peer's over ours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, TextToVideoZeroPipeline
from torch.utils.flop_counter import FlopCounterMode

from t2vz.models import loading
from t2vz.models.mini import write_pipeline
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, evaluations

SIZES = {
    "tiny": {},
    "mid": {
        "block_out_channels": (64, 128, 256, 256),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    },
}
PROMPT = "a red ball on the grass"
MEMORY = """
import resource, sys, torch
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec
model, frames, px = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
spec = JobSpec(prompt="x", model=model, chunk_size=2, num_inference_steps=4)
generate(loading.load(spec, "cpu"), Request(spec, 1, px, px, frames))
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def ours(components, spec, frames, px):
    return generate(components, Request(spec, 1, px, px, frames))


def peer(pipeline, frames, px, chunk=None):
    """Unchunked, or by the recipe of diffusers' documentation for long videos."""
    settings = {"width": px, "height": px, "output_type": "latent", "num_inference_steps": 50, "t0": 44, "t1": 47}
    if chunk is None:
        pipeline(PROMPT, video_length=frames, generator=torch.Generator().manual_seed(1), **settings)
        return
    starts = list(range(0, frames, chunk - 1))
    for start, end in zip(starts, [*starts[1:], frames], strict=True):
        ids = [0, *range(start, end)]
        generator = torch.Generator().manual_seed(1)
        pipeline(PROMPT, video_length=len(ids), frame_ids=ids, generator=generator, **settings)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--px", type=int, default=128)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer's, in every call
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        torch.manual_seed(0)
        write_pipeline(model, in_channels=4, **SIZES[asked.size])
        base = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
        parts = (base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler)
        pipeline = TextToVideoZeroPipeline(*parts, None, None, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)

        wall, work = {}, {}
        for chunk in (None, 8, 4, 2):
            spec = JobSpec(prompt=PROMPT, model=str(model), chunk_size=chunk or asked.frames)
            components = loading.load(spec, "cpu")

            def our_side(components=components, spec=spec):
                return ours(components, spec, asked.frames, asked.px)

            def their_side(chunk=chunk):
                return peer(pipeline, asked.frames, asked.px, chunk)

            name = "unchunked" if chunk is None else str(chunk)
            work[name] = round(flops(their_side) / flops(our_side), 3)
            pairs = [seconds(their_side) / seconds(our_side) for _ in range(asked.pairs)]
            wall[name] = round(statistics.median(pairs), 3)
            print(f"{name}: flops {work[name]}, wall {[round(pair, 3) for pair in pairs]}", flush=True)
        made = ours(components, spec, asked.frames, asked.px).evaluations

        peaks = []
        for frames in (8, 64):
            command = [sys.executable, "-c", MEMORY, str(model), str(frames), str(asked.px)]
            peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]))
    print(
        json.dumps(
            {
                "benchmark": "engine",
                "model": asked.size,
                "frames": asked.frames,
                "px": asked.px,
                "wall_ratio": wall,
                "flops_ratio": work,
                "memory_growth": round(peaks[1] / peaks[0], 3),
                "evaluations": {"ours": made, "minimum": evaluations(spec, asked.frames)},
                "gpu": None,
            }
        )
    )


if __name__ == "__main__":
    main()
