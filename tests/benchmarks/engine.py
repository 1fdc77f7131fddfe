"""The engine against diffusers' TextToVideoZeroPipeline on the CPU: FLOPs, wall time, memory, and a profile.

python tests/benchmarks/engine.py [--quick] [--pairs 3] [--profile]

Both sides denoise 50 steps with t0 = 44, t1 = 47 in the same random weights, from the prompt to latents, in one run.
The peer runs unchunked, and in chunks of 8, 4 and 2 by the recipe in diffusers' documentation; ours has the same
chunk size each time. Times are medians over pairs of runs, the side that begins alternating. The last line is
one JSON object; ratios are the peer's over ours. At its top level it has 8 frames of the `tiny` model, further down
the `mid` model and 24 frames. --quick is for the tests: few steps, small pictures, figures without meaning.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import StableDiffusionPipeline, TextToVideoZeroPipeline
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from t2vz.engine import vae
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec, evaluations

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import write_pipeline

PROMPT = "a red ball on the grass"
CHUNKS = (None, 8, 4, 2)
# (UNet settings, px): `tiny` has the shape of the embedded model, `mid` Stable Diffusion's two layers a block and
# eight heads at a fifth of its width, 12 M weights.
SIZES: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (
        {
            "block_out_channels": (32, 64, 64),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 16,
        },
        128,
    ),
    "mid": (
        {
            "block_out_channels": (64, 128, 256),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "norm_num_groups": 32,
        },
        96,
    ),
}
LAYERS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "sample_size": 16,
}
# Working memory: the peak above what the process holds once all is loaded and warm.
MEMORY = """
import sys
from pathlib import Path
from t2vz.engine import vae
from t2vz.models import loading
from t2vz.modes import Request, generate
from t2vz.spec import JobSpec
model, px, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def kib(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
def make(frames):
    spec = JobSpec(prompt="x", model=model, chunk_size=2, num_inference_steps=steps)
    components = loading.load(spec, "cpu")
    made = generate(components, Request(spec, 1, px, px, frames))
    for frames in vae.decode(components.vae, made.latents):
        pass
make(4)
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
make(int(sys.argv[4]))
print(kib("VmHWM") - before, kib("VmHWM"))
"""


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


class Contest:
    """Both sides with the same weights."""

    def __init__(self, folder: Path, size: str, *, steps: int, px: int | None = None) -> None:
        settings, native_px = SIZES[size]
        self.px = px or native_px
        self.model = folder / size
        t0, t1 = (44, 47) if steps == 50 else (steps - 3, steps - 2)
        self.given = {"num_inference_steps": steps, "t0": t0, "t1": t1}
        torch.manual_seed(0)
        write_pipeline(self.model, in_channels=4, **LAYERS, **settings)
        base = StableDiffusionPipeline.from_pretrained(self.model, safety_checker=None)
        parts = (base.vae, base.text_encoder, base.tokenizer, base.unet, base.scheduler)
        self.pipeline = TextToVideoZeroPipeline(*parts, None, None, requires_safety_checker=False)
        self.pipeline.set_progress_bar_config(disable=True)

    def spec(self, chunk_size: int) -> JobSpec:
        return JobSpec(prompt=PROMPT, model=str(self.model), chunk_size=chunk_size, **self.given)

    def ours(self, frames: int, chunk: int | None) -> Any:
        spec = self.spec(chunk or frames)
        return generate(loading.load(spec, "cpu"), Request(spec, 1, self.px, self.px, frames))

    def peer(self, frames: int, chunk: int | None) -> None:
        """Unchunked, or by the recipe of diffusers' documentation for long videos."""
        settings = {"width": self.px, "height": self.px, "output_type": "latent", **self.given}
        if chunk is None:
            self.pipeline(PROMPT, video_length=frames, generator=torch.Generator().manual_seed(1), **settings)
            return
        starts = list(range(0, frames, chunk - 1))
        for start, end in zip(starts, [*starts[1:], frames], strict=True):
            ids = [0, *range(start, end)]
            generator = torch.Generator().manual_seed(1)
            self.pipeline(PROMPT, video_length=len(ids), frame_ids=ids, generator=generator, **settings)

    def compare(self, frames: int, chunks: Iterable[int | None], pairs: int, *, count: bool = True) -> dict[str, Any]:
        """{"wall_ratio": {chunk: …}, "wall_s": {chunk: (peer, ours)}, "flops_ratio": {chunk: …}}, and "cpu_ratio" of
        the CPU time of all threads, which other work on the machine disturbs less."""
        found: dict[str, Any] = {"wall_ratio": {}, "cpu_ratio": {}, "wall_s": {}} | (
            {"flops_ratio": {}} if count else {}
        )
        for chunk in chunks:
            name = "unchunked" if chunk is None else str(chunk)
            sides = [partial(self.peer, frames, chunk), partial(self.ours, frames, chunk)]
            if count:  # a warm-up too
                found["flops_ratio"][name] = round(flops(sides[0]) / flops(sides[1]), 3)
            times = []
            for pair in range(pairs):
                order = (0, 1) if pair % 2 == 0 else (1, 0)
                taken = {side: seconds(sides[side]) for side in order}
                times.append((taken[0], taken[1]))
            walls, cpus = ([peer[kind] / ours[kind] for peer, ours in times] for kind in (0, 1))
            found["wall_ratio"][name] = round(statistics.median(walls), 3)
            found["cpu_ratio"][name] = round(statistics.median(cpus), 3)
            found["wall_s"][name] = [
                round(statistics.median(s for s, _ in side), 2) for side in zip(*times, strict=True)
            ]
            told = {"wall": walls, "CPU": cpus}
            ratios = "; ".join(f"{kind} {[round(ratio, 3) for ratio in each]}" for kind, each in told.items())
            say(f"  {frames} frames, {name}: {ratios}; {found.get('flops_ratio')}")
        return found


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time, and CPU time of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def memory_growth(contest: Contest, frames: tuple[int, int]) -> dict[str, float]:
    """Peak with the more frames over that with the fewer, each in a fresh process: what is added to the loaded
    models, and the whole process."""
    peaks = []
    for count in frames:
        command = [sys.executable, "-c", MEMORY, str(contest.model), str(contest.px), "4", str(count)]
        # One arena: which thread's arena grows is chance.
        out = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"}
        ).stdout
        peaks.append([int(kib) for kib in out.split()])
    (few, few_all), (many, many_all) = peaks
    say(f"  working memory at {frames} frames: {few} and {many} KiB")
    return {"memory_growth": round(many_all / few_all, 3), "memory_growth_above_models": round(many / few, 3)}


KINDS = {
    "convolution": ("conv",),
    "attention": ("scaled_dot_product", "_flash_attention", "_efficient_attention"),
    "linear": ("addmm", "aten::mm", "bmm", "linear"),
    "norm, activation": ("norm", "silu", "gelu", "aten::mul", "aten::add", "aten::div", "sigmoid"),
    "copies": ("copy", "cat", "index", "repeat", "clone", "contiguous", "upsample"),
}


def profiled(models: dict[str, Any], call: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Seconds of self time by part (the models, and the loop outside of them) and kind of work."""
    open_ranges: list[record_function] = []

    def enter(name: str, *_: object) -> None:
        open_ranges.append(record_function(f"part:{name}"))
        open_ranges[-1].__enter__()

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    # The VAE's own forward is never called, its decoder's is.
    hooks = []
    for name, model in models.items():
        hooks += [model.register_forward_pre_hook(partial(enter, name)), model.register_forward_hook(leave)]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
    finally:
        for hook in hooks:
            hook.remove()
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in profiler.events():
        around, part = event, "loop"
        while around is not None:
            if around.name.startswith("part:"):
                part = around.name.removeprefix("part:")
                break
            around = around.cpu_parent
        named = (kind for kind, marks in KINDS.items() if any(mark in event.name for mark in marks))
        kind = "host" if event.name.startswith("part:") else next(named, "other operators")
        table[part][kind] += event.self_cpu_time_total / 1e6
    return table


def print_profile(table: dict[str, dict[str, float]]) -> None:
    total = sum(sum(kinds.values()) for kinds in table.values())
    say(f"\n{'part':<12} {'kind':<18} {'s':>8} {'share':>7}")
    for part, kinds in sorted(table.items(), key=lambda item: -sum(item[1].values())):
        say(f"{part:<12} {'all':<18} {sum(kinds.values()):8.2f} {sum(kinds.values()) / total:7.1%}")
        for kind, taken in sorted(kinds.items(), key=lambda item: -item[1]):
            say(f"{'':<12} {kind:<18} {taken:8.2f} {taken / total:7.1%}")


def text_profile(contest: Contest, frames: int) -> dict[str, dict[str, float]]:
    components = loading.load(contest.spec(frames), "cpu")

    def call() -> None:
        latents = contest.ours(frames, None).latents
        for _ in vae.decode(components.vae, latents):
            pass

    models = {"UNet": components.unet, "text encoder": components.text_encoder, "VAE": components.vae.decoder}
    return profiled(models, call)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="for 8 frames of the tiny model; a third elsewhere")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of the comparison")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer's, in every call
    diffusers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    fewer = max(1, asked.pairs // 3)
    steps, px, frames = (4, 32, (2, 4)) if asked.quick else (50, None, (8, 64))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        tiny, mid = (Contest(Path(scratch), size, steps=steps, px=px) for size in SIZES)
        figures: dict[str, Any] = {"benchmark": "engine", "threads": torch.get_num_threads(), "px": tiny.px}
        if asked.profile:
            for name, contest in (("tiny", tiny), ("mid", mid)):
                table = text_profile(contest, 2 if asked.quick else 8)
                say(f"\n{name}, {contest.px} px, {steps} steps, text mode, VAE included")
                print_profile(table)
                figures[f"profile_{name}_s"] = {
                    part: {kind: round(taken, 3) for kind, taken in kinds.items()} for part, kinds in table.items()
                }
        else:
            say("tiny")
            figures |= {"model": "tiny", "frames": 8, **tiny.compare(8, CHUNKS, asked.pairs)}
            figures |= memory_growth(tiny, frames)
            spec = tiny.spec(8)
            figures["evaluations"] = {"ours": tiny.ours(8, None).evaluations, "minimum": evaluations(spec, 8)}
            if not asked.quick:
                figures["frames_24"] = tiny.compare(24, CHUNKS, fewer, count=False)
                say("mid")
                figures["mid"] = {"px": mid.px, **mid.compare(8, CHUNKS, fewer)}
                figures["mid"]["frames_24"] = mid.compare(24, (None, 2), fewer, count=False)
            figures["gpu"] = None  # see gpu.py
        figures["took_s"] = round(time.perf_counter() - begun)
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
