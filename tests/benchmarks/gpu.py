"""The denoising loop on a GPU against diffusers' Text2Video-Zero: wall time, use of the machine, memory.

python tests/benchmarks/gpu.py [--small] [--settings sd15_512 sdxl_1024] [--warm-up-s 600]

Stable Diffusion 1.5 and SDXL in their published shapes, with random weights, at 512² in float16 and 1024² in bfloat16;
50 steps with t0 = 44, t1 = 47. Both sides get prompt embeddings and make latents: no text encoder, no VAE. The peer
makes the UNet calls that its pipeline makes, with its attention processor, its scheduler, channels-last weights, and
the best of what diffusers documents: eager, `compile_repeated_blocks`, the whole UNet under torch.compile. Ours is
`engine.lockstep.denoise` with recorded batches (`engine.graphs`): eager, `compile_regions`, the whole UNet compiled.

Every way is a process of its own, so that all compile at once; the timing that follows is one process at a time. Timed
are steps of the anchor alone and steps of all frames, the sides alternating, and a clip's time is the sum of its steps
(the peer's chunk recipe repeats the anchor's for every chunk). Ratios are the peer's best over ours, medians of pairs.
Beside them stands the time of whole clips of ours, with all that is done once a clip. A way that is not warm in time
is left out, and named. The last line is one JSON object. --small runs everything on tiny models where there is no GPU,
so that it can't rot.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import diffusers
import torch
import torch._dynamo
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.deprecated.text_to_video_synthesis import pipeline_text_to_video_zero as peer_pipeline
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from t2vz.engine import schedule
from t2vz.engine.attention import anchor_attention
from t2vz.engine.graphs import Graphs, eager
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
SHAPES = {"sd15": SD15, "sdxl": SDXL}
PRECISION = {512: torch.float16, 1024: torch.bfloat16}
WAYS = {"peer": ("eager", "regions", "whole"), "ours": ("eager", "regions", "whole")}
KINDS = {  # of CUDA kernels, by parts of their names; the first that fits
    "compiled elementwise and norms": ("triton",),
    "attention": ("sdpa", "flash", "fmha", "attention"),
    "convolution": ("fprop", "conv", "cudnn", "nchw", "nhwc"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas"),
    "elementwise": ("elementwise", "vectorized", "reduce", "norm", "Norm", "copy", "Memcpy", "Memset", "cat", "Cat"),
}
CASES = {"8_unchunked": (8, None), "24_chunks_of_2": (24, 2)}
MEMORY_TRIES = 20
WARM_STEPS, TIMED_STEPS = 4, 3  # the third call of a batch is recorded, the fourth is the first of its kind


@dataclass(frozen=True)
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

    def inputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Embeddings of two branches, and what SDXL wants beside."""
        torch.manual_seed(1)
        text = torch.randn(2, 77, self.config["cross_attention_dim"]).to(self.device, self.dtype)
        if "addition_embed_type" not in self.config:
            return text, {}
        return text, {name: torch.ones(2, size).to(self.device, self.dtype) for name, size in SDXL_ADDED.items()}

    def latents(self, frames: int) -> Tensor:
        torch.manual_seed(2)
        return torch.randn(frames, 4, self.px // 8, self.px // 8).to(self.device)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - start


class Ours:
    def __init__(self, setting: Setting, way: str) -> None:
        self.setting, self.unet = setting, setting.unet()
        self.recorded = setting.device == "cuda"
        if way == "regions":
            compile_regions(self.unet)
        elif way == "whole":
            self.unet.compile(dynamic=False)

    def denoise(self, parts: list[tuple[Tensor, range]], chunk: int) -> list[float]:
        """Latents through steps, one after another as a clip's; the times at which each step ended."""
        text, added = self.setting.inputs()
        ends: list[float] = []

        def ended(take: object) -> None:
            synchronise()
            ends.append(time.perf_counter())

        with (
            torch.no_grad(),
            anchor_attention([self.unet], branches=2, in_place=self.recorded) as state,
            shared_beginning([self.unet], state, (0, 0)),
        ):
            run = Graphs() if self.recorded else eager
            denoiser = Denoiser(self.unet, state, text, classifier_free(7.5), self.setting.steps, added=added, run=run)
            for x, steps in parts:
                scheduler = schedule.make_scheduler("ddim", SCHEDULE, self.setting.steps, steps.start)
                denoise(
                    denoiser, x, scheduler, steps, seed=1, chunk_size=chunk, on_step=lambda count: None,
                    on_snapshot=ended,
                )  # fmt: skip
            if isinstance(run, Graphs) and not run.possible:
                raise RuntimeError("the batches could not be recorded")
        return ends

    def steps_s(self, frames: int, chunk: int) -> float:
        ends = self.denoise([(self.setting.latents(frames), range(WARM_STEPS + TIMED_STEPS))], chunk)
        return statistics.median(b - a for a, b in zip(ends[WARM_STEPS - 1 :], ends[WARM_STEPS:], strict=False))

    def clip_s(self, frames: int, chunk: int | None) -> float:
        """A clip by its steps."""
        alone, all_of_them = self.steps_s(1, 1), self.steps_s(frames, chunk or frames)
        return self.setting.alone * alone + self.setting.together * all_of_them

    def whole_clip_s(self, frames: int, chunk: int | None) -> float:
        """A clip, measured, with all that is done once."""
        steps, x = self.setting.steps, self.setting.latents(frames)
        parts = [(x[:1], range(self.setting.alone)), (x, range(steps - self.setting.together, steps))]
        return seconds(partial(self.denoise, parts, chunk or frames))

    def profile_ms(self, frames: int, chunk: int | None) -> dict[str, dict[str, float]]:
        """Kernel time of a step in ms, by kind, and of the kernels that take the most."""
        if not torch.cuda.is_available():
            return {}
        self.steps_s(frames, chunk or frames)
        recorded, self.recorded = self.recorded, False
        self.denoise([(self.setting.latents(frames), range(2))], chunk or frames)  # compiled for this, too
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.denoise([(self.setting.latents(frames), range(1))], chunk or frames)
        self.recorded = recorded
        kernels: Counter[str] = Counter()
        for event in profiler.key_averages():
            kernels[event.key] += event.self_device_time_total / 1e3
        kinds: Counter[str] = Counter()
        for name, ms in kernels.items():
            named = (kind for kind, marks in KINDS.items() if any(mark in name for mark in marks))
            kinds[next(named, "other")] += ms
        return {
            "kinds": {kind: round(ms, 2) for kind, ms in kinds.most_common()},
            "kernels": {name[:100]: round(ms, 2) for name, ms in kernels.most_common(25)},
        }

    def peak_bytes(self, frames: int, chunk: int | None) -> dict[str, int]:
        if not torch.cuda.is_available():
            return {}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.steps_s(frames, chunk or frames)
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


class Peer:
    """The UNet calls of TextToVideoZeroPipeline, unchunked or by the chunk recipe of diffusers' documentation."""

    def __init__(self, setting: Setting, way: str) -> None:
        self.setting, self.unet = setting, setting.unet()
        self.unet.set_attn_processor(peer_pipeline.CrossFrameAttnProcessor2_0(batch_size=2))
        if way == "regions":
            self.unet.compile_repeated_blocks(dynamic=False)
        elif way == "whole":
            self.unet.compile(dynamic=False)

    @torch.no_grad()
    def steps_s(self, frames: int) -> float:
        # Its pipelines repeat the prompt for each frame.
        text, added = self.setting.inputs()
        prompt = text.repeat_interleave(frames, 0)
        given = {name: value.repeat_interleave(frames, 0) for name, value in added.items()}
        scheduler = DDIMScheduler(**SCHEDULE)
        scheduler.set_timesteps(self.setting.steps, device=self.setting.device)
        latents = self.setting.latents(frames).to(self.setting.dtype)
        ends = []
        for t in scheduler.timesteps[: WARM_STEPS + TIMED_STEPS]:
            sample = torch.cat([latents] * 2)
            out = self.unet(sample, t, encoder_hidden_states=prompt, added_cond_kwargs=given, return_dict=False)[0]
            negative, positive = out.chunk(2)
            latents = scheduler.step(negative + 7.5 * (positive - negative), t, latents, return_dict=False)[0]
            synchronise()
            ends.append(time.perf_counter())
        return statistics.median(b - a for a, b in zip(ends[WARM_STEPS - 1 :], ends[WARM_STEPS:], strict=False))

    def clip_s(self, frames: int, chunk: int | None) -> float:
        """A clip by its steps."""
        clips = [frames]
        if chunk is not None:
            starts = list(range(0, frames, chunk - 1))
            clips = [1 + end - start for start, end in zip(starts, [*starts[1:], frames], strict=True)]
        taken = {size: self.steps_s(size) for size in {1, *clips}}
        return sum(self.setting.alone * taken[1] + self.setting.together * taken[clip] for clip in clips)


Ask = Callable[..., Any]


def serve(connection: Any, side: str, setting: Setting, way: str) -> None:
    """A process that has one way of one side warm, and answers what it is asked."""
    diffusers.logging.set_verbosity_error()
    if setting.device == "cpu":
        torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 512  # as `compile_regions` sets it, for the peer too
    made = {"peer": Peer, "ours": Ours}[side](setting, way)
    while True:
        question, *about = connection.recv()
        for left in range(MEMORY_TRIES, 0, -1):
            try:
                answer = getattr(made, question)(*about)
            except torch.cuda.OutOfMemoryError as error:  # others warm up beside; they give theirs back
                answer = error
                if left > 1:
                    gc.collect()
                    torch.cuda.empty_cache()
                    time.sleep(3)
                    continue
            except Exception as error:
                answer = error
            break
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        connection.send(answer)


def asking(connection: Any) -> Ask:
    def ask(*question: Any) -> Any:
        connection.send(question)
        answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    return ask


Warm = dict[tuple[str, str, str], Ask]  # (setting, side, way) → how to ask it


@contextmanager
def warmed(
    settings: dict[str, Setting],
    ways: dict[str, tuple[str, ...]],
    cases: dict[str, Any],
    warm_up_s: float,
    without: Sequence[str],
) -> Iterator[tuple[Warm, list[str]]]:
    """All ways of all settings, each in its process, and which of them were not ready in time or failed."""
    keys = [(name, side, way) for name in settings for side in ways for way in ways[side]]
    keys = [key for key in keys if "/".join(key) not in without]
    # All compile at the same time.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(keys)))
    context = multiprocessing.get_context("spawn")
    processes, waiting, ready, failed = [], {}, {}, list(without)
    for key in keys:
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, key[1], settings[key[0]], key[2]), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        waiting[here] = (key, process, iter(cases.values()))
        here.send(("clip_s", *next(waiting[here][2])))
    deadline = time.monotonic() + warm_up_s
    try:
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                key, process, more = waiting[connection]
                try:
                    answer = connection.recv()
                except EOFError:
                    answer = RuntimeError("its process ended")
                if isinstance(answer, Exception):
                    say(f"  {key} failed: {answer}")
                    failed.append("/".join(key))
                elif (case := next(more, None)) is not None:
                    connection.send(("clip_s", *case))
                    continue
                else:
                    say(f"  {key} is warm")
                    ready[key] = asking(connection)
                del waiting[connection]
        for key, process, _ in waiting.values():
            process.kill()
            failed.append(f"{'/'.join(key)} (not warm in {warm_up_s:g} s)")
        yield ready, failed
    finally:
        for process in processes:
            process.kill()


def our_flops(setting: Setting, frames: int, chunk: int | None) -> int:
    """FLOPs of a clip of ours, on tensors without data."""
    nowhere = replace(setting, device="meta")
    unet = nowhere.unet()
    text, added = nowhere.inputs()

    def work(denoiser: Denoiser, count: int) -> int:
        x, t = torch.empty(count, 4, setting.px // 8, setting.px // 8, device="meta"), torch.tensor(1, device="meta")
        size = chunk or count
        with FlopCounterMode(display=False) as counter:
            for start in range(0, count, size):
                part = slice(start, min(start + size, count))
                denoiser(x[part], t, part, 0)
        return counter.get_total_flops()

    with torch.no_grad(), anchor_attention([unet], branches=2) as state, shared_beginning([unet], state, (0, 0)):
        denoiser = Denoiser(unet, state, text, classifier_free(7.5), setting.steps, added=added)
        work(denoiser, 1)  # the prompt's keys and values are there from now on
        return setting.alone * work(denoiser, 1) + setting.together * work(denoiser, frames)


def matmul_flops_per_s(device: str, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b)
    repeats = 20
    return repeats * 2 * size**3 / min(seconds(lambda: [a @ b for _ in range(repeats)]) for _ in range(3))


def compare(setting: Setting, sides: dict[str, dict[str, Ask]], case: tuple[int, int | None], pairs: int) -> Any:
    """Every way once, to choose the best of each side by, then the two best in turn."""
    found: dict[str, Any] = {"ways_s": {}}
    best: dict[str, str] = {}
    for side, ways in sides.items():
        taken = {way: ask("clip_s", *case) for way, ask in ways.items()}
        found["ways_s"][side] = {way: round(s, 3) for way, s in taken.items()}
        best[side] = min(taken, key=lambda way, taken=taken: taken[way])
    both = [sides[side][best[side]] for side in ("peer", "ours")]
    times = [(both[0]("clip_s", *case), both[1]("clip_s", *case)) for _ in range(pairs)]
    our_s = statistics.median(mine for _, mine in times)
    return found | {
        "best": best,
        "wall_ratio": round(statistics.median(theirs / mine for theirs, mine in times), 3),
        "pairs": [round(theirs / mine, 3) for theirs, mine in times],
        "ours_s": round(our_s, 3),
        "ours_flops": our_flops(setting, *case),
    }


def say(*what: object) -> None:
    print(*what, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models and few steps, on the CPU too")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=["sd15_512", "sd15_1024", "sdxl_512", "sdxl_1024"])
    parser.add_argument("--warm-up-s", type=float, default=900)
    parser.add_argument("--without", nargs="+", default=[], metavar="SETTING/SIDE/WAY", help="ways to leave out")
    asked = parser.parse_args()
    figures: dict[str, Any] = {"benchmark": "gpu", "gpu": None}
    if not asked.small and not torch.cuda.is_available():
        say("no GPU here; --small runs this on the CPU, without meaning")
        print(json.dumps(figures))
        return
    diffusers.logging.set_verbosity_error()  # it warns of a list of modules to keep in float32, which is empty
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases: dict[str, tuple[int, int | None]] = CASES
    if asked.small:
        cases = {"8_unchunked": (8, None), "24_chunks_of_2": (4, 2)}
        half = torch.float32 if device == "cpu" else torch.float16
        settings = {f"{name}_32": Setting(SMALL[name], 32, half, device, 8) for name in SMALL}
    else:
        settings = {}
        for name in asked.settings or ("sd15_512", "sd15_1024", "sdxl_512", "sdxl_1024"):
            model, px = name.split("_")
            settings[name] = Setting(SHAPES[model], int(px), PRECISION[int(px)], device, 50)
    made: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    rates = {
        dtype: matmul_flops_per_s(device, dtype, 128 if asked.small else 8192)
        for dtype in {setting.dtype for setting in settings.values()}
    }
    made["matmul_tflops"] = {str(dtype).removeprefix("torch."): round(rate / 1e12, 3) for dtype, rate in rates.items()}
    ways = {side: ("eager",) if asked.small else WAYS[side] for side in WAYS}
    with warmed(settings, ways, cases, asked.warm_up_s, asked.without) as (ready, made["left_out"]):
        measure(made, settings, cases, rates, ready, asked.pairs)
    print(json.dumps(figures | {"gpu": made, "small": asked.small}))


def measure(made: Any, settings: Any, cases: Any, rates: Any, ready: Warm, pairs: int) -> None:
    """Into `made`, what each setting comes to."""
    for name, setting in settings.items():
        sides = {
            side: {way: ready[name, side, way] for way in WAYS[side] if (name, side, way) in ready} for side in WAYS
        }
        if not all(sides.values()):
            say(f"{name}: a side has nothing that runs")
            continue
        found = made[name] = {case: compare(setting, sides, about, pairs) for case, about in cases.items()}
        ours, best = sides["ours"], sides["ours"][found["8_unchunked"]["best"]["ours"]]
        found["8_unchunked"]["ours_whole_clip_s"] = round(best("whole_clip_s", *cases["8_unchunked"]), 3)
        found["8_unchunked"]["profile_ms"] = best("profile_ms", *cases["8_unchunked"])
        for each in found.values():
            each["flops_utilisation"] = round(each["ours_flops"] / each["ours_s"] / rates[setting.dtype], 4)
        for frames in (8, 64):
            found[f"peak_{frames}_frames_chunks_of_2_bytes"] = ours.get("eager", best)("peak_bytes", frames, 2)
        say(name, json.dumps(found))


if __name__ == "__main__":
    main()
