"""Guidance: how the noise predictions of the branches become one. All take float tensors (B, f, C, h, w)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Guide = Callable[[Tensor], Tensor]


def unguided(prediction: Tensor) -> Tensor:
    """B = 1: the prompt's prediction as it is."""
    return prediction[0]


def classifier_free(scale: float) -> Guide:
    """B = 2, (negative prompt, prompt): ε_∅ + scale · (ε_text − ε_∅)."""

    def guide(prediction: Tensor) -> Tensor:
        negative, positive = prediction
        return negative + scale * (positive - negative)

    return guide


def instruct_pix2pix(text_scale: float, image_scale: float) -> Guide:
    """B = 3, (nothing, image, image and text): InstructPix2Pix, eq. 3."""

    def guide(prediction: Tensor) -> Tensor:
        nothing, image, both = prediction
        return nothing + text_scale * (both - image) + image_scale * (image - nothing)

    return guide
