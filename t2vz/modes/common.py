"""What several modes need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from t2vz.engine import guidance
from t2vz.engine.attention import Attends, anchor_attention
from t2vz.engine.graphs import Graphs, eager
from t2vz.engine.lockstep import Denoiser, denoise
from t2vz.engine.speed import shared_beginning
from t2vz.errors import GenerationError
from t2vz.models.loading import Components
from t2vz.models.prompt import Conditioning, encode
from t2vz.modes import Generated, Request


def latent_shape(components: Components, request: Request) -> tuple[int, int, int]:
    """(C, h, w) of one frame's latent."""
    cell = components.cell_px
    return components.vae.config.latent_channels, request.height // cell, request.width // cell


def indices(request: Request) -> tuple[int, ...]:
    """Numbers in the clip of the frames to make: the request's part of them, and the anchors they attend to.

    Where there is motion dynamics frame 0 is always among them: motion begins there.
    """
    part, parts = request.part
    if parts > 1 and request.spec.attention_anchor == "first_previous":
        raise GenerationError(
            "attention_anchor=first_previous: frames that attend to the one before can't be split over processes; "
            "choose another anchor, or one process"
        )
    own = range(part * request.frames // parts, (part + 1) * request.frames // parts)
    anchors = {max(scene for scene in request.scenes if scene <= frame) for frame in own}
    moving = {0} if request.spec.mode == "text" and request.spec.motion_dynamics else set()
    return tuple(sorted({*moving, *anchors, *own}))


def prompt_branches(components: Components, request: Request) -> tuple[Conditioning, guidance.Guide]:
    """The guidance branches (negative prompt, prompt), and what joins their predictions.

    At a guidance scale of 1 or less the prompt stands alone, as in diffusers.
    """
    spec = request.spec
    if spec.guidance_scale > 1:
        return (
            conditioning(components, request, [spec.negative_prompt, spec.prompt], (False, True)),
            guidance.classifier_free(spec.guidance_scale),
        )
    return conditioning(components, request, [spec.prompt], (True,)), guidance.unguided


def conditioning(
    components: Components, request: Request, prompts: list[str], with_picture: tuple[bool, ...]
) -> Conditioning:
    """What the branches' prompts become; with_picture: which of them see the IP-Adapter's picture."""
    return encode(
        components,
        prompts,
        width=request.width,
        height=request.height,
        image=request.picture,
        image_branches=with_picture,
    )


def _finest_attention(components: Components, request: Request) -> tuple[int, int]:
    """(h, w) of the first layers with attention: the latent's own but for SDXL, whose first block has none."""
    blocks = components.unet.config.down_block_types
    first = next((i for i, kind in enumerate(blocks) if "Attn" in kind), 0)
    _, h, w = latent_shape(components, request)
    return -(-h // 2**first), -(-w // 2**first)


@contextmanager
def denoising(
    components: Components, request: Request, branches: Conditioning, guide: guidance.Guide, **parts: Any
) -> Iterator[Denoiser]:
    """A Denoiser of the request's frames, with the attention that its row asks for installed meanwhile.

    parts: `controls`, `image_latents` and `image_branches` of `Denoiser`.
    """
    spec = request.spec
    frames = indices(request)
    attends: Attends = "anchor_previous" if spec.attention_anchor == "first_previous" else "anchor"
    try:
        models = [components.unet, *components.controlnets]
        # The branches begin with the same latents, but that edits show one of them no source.
        shown = parts.get("image_branches") or (0.0,) * len(branches.text)
        same = tuple(shown.index(each) for each in shown)
        # Not where the frame before is kept, which is another place in every batch, nor where weights come and go.
        recorded = components.device.type == "cuda" and attends == "anchor" and not components.hooks
        with (
            anchor_attention(
                models,
                branches=len(branches.text),
                attends=attends if spec.cross_frame_attention else "self",
                merge=spec.token_merging_ratio,
                latent_size=_finest_attention(components, request),
                in_place=recorded,
            ) as state,
            shared_beginning(models, state, same),
        ):
            yield Denoiser(
                components.unet,
                state,
                branches.text,
                guide,
                spec.num_inference_steps,
                added=branches.added,
                guided_part=spec.guidance_end,
                anchors=tuple(frames.index(scene) for scene in request.scenes if scene in frames),
                run=Graphs() if recorded else eager,
                **parts,
            )
    finally:
        components.release()


def run(
    denoiser: Denoiser, request: Request, latents: Tensor, scheduler: Any, steps: range, *, resumable: bool = True
) -> Tensor:
    """`denoise` as the request has it: latents of the anchor alone, or of all frames of `indices(request)`.

    resumable: this is the part that snapshots are taken of, one a mode.
    """
    resumption: dict[str, Any] = {"start": request.start, "on_snapshot": request.on_snapshot} if resumable else {}
    return denoise(
        denoiser,
        latents.to(denoiser.text.device),
        scheduler,
        steps,
        seed=request.seed,
        chunk_size=request.spec.chunk_size,
        on_step=request.on_step,
        indices=indices(request)[: len(latents)],
        **resumption,
    )


def generated(denoiser: Denoiser, request: Request, latents: Tensor, branches: Conditioning) -> Generated:
    return Generated(latents, indices(request), denoiser.evaluations, tuple(branches.warnings))
