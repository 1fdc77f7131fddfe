"""What denoising says when it can't go on."""

from __future__ import annotations

import pytest
import torch

from t2vz.engine import schedule
from t2vz.engine.attention import AnchorState
from t2vz.engine.guidance import unguided
from t2vz.engine.lockstep import Denoiser, denoise
from t2vz.errors import InvalidFrames


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "try dtype=float32 or bfloat16"),
        (torch.bfloat16, "try dtype=float32"),
        (torch.float32, "check the weights"),
    ],
)
def test_the_advice_against_nan_is_not_the_dtype_that_made_it(dtype, advice):
    def unet(sample, *given, **more):
        return (torch.full_like(sample, torch.nan),)

    denoiser = Denoiser(unet, AnchorState(1), torch.zeros(1, 2, 3, dtype=dtype), unguided, 3)
    scheduler = schedule.make_scheduler("ddim", {}, 3)
    with pytest.raises(InvalidFrames, match=rf"^NaN or infinite latents at step 1; {advice}") as caught:
        denoise(
            denoiser,
            torch.zeros(1, 4, 2, 2),
            scheduler,
            range(3),
            seed=1,
            chunk_size=1,
            on_step=lambda count: None,
        )
    assert "None" not in caught.value.message
