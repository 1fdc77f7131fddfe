"""What the comparisons with diffusers' pipelines share: keyed noise put into theirs, and one mended step."""

from t2vz.engine import noise


class Corrected:
    """Beside a TextToVideoZero pipeline of diffusers: keyed noise of `seed`, and a corrected DDPM-forward step, whose
    product of alphas is off by one there."""

    seed: int

    def forward_loop(self, x_t0, t0, t1, generator):
        alphas = self.scheduler.alphas_cumprod
        ratio = alphas[t1] / alphas[t0]
        eps = noise.draw(self.seed, "motion", range(1, len(x_t0) + 1), tuple(x_t0.shape[1:]))
        return ratio.sqrt() * x_t0 + (1 - ratio).sqrt() * eps


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def initial(seed, width, height):
    """The latents that all frames begin with."""
    return noise.draw(seed, "initial", [0], (4, height // 8, width // 8))
