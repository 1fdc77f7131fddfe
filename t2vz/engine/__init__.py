"""The mathematics of Text2Video-Zero, in lockstep form: tensors and a seed in, latents out.

Knows no files, no manifests and no models by name. Start at `lockstep`.
"""
