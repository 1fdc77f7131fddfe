"""An invisible watermark: a few letters in the frames themselves, that outlive the encoding and cutting out of frames.

Each bit is written many times, as the parity of four middle frequencies (DCT coefficients) of the luma in blocks of
8 × 8 px: quantisation index modulation, with the blocks, the bits and the offsets scattered by a fixed seed, so that a
plain area says nothing. Reading adds up what all blocks of all frames say; a checksum of 32 bits tells a mark from
chance (one unmarked clip in four million reads as marked).

It holds against all formats at their default qualities, and in frames of 128 px and more down to CRF 24 of H.264. It
does not hold against scaling, cropping or whoever wants it gone: it marks, it proves nothing.
"""

from __future__ import annotations

import binascii
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from t2vz.spec import WATERMARK_BYTES

_BLOCK_PX = 8
_STEP = 20.0  # of a coefficient; writing changes each by at most half of it, 2 levels of a pixel
_FREQUENCIES = ((1, 1), (1, 2), (2, 1), (2, 2))  # low enough to outlive an encoder, high enough not to be seen
_BITS = 8 * (WATERMARK_BYTES + 4)  # the letters and their CRC-32
_DOUBTED = 10  # bits, when reading
_SEED = 20230323
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709, as files are written

Frames = NDArray[np.uint8]  # (F, H, W, 3), RGB


def marking(batches: Iterable[Frames], text: str) -> Iterator[Frames]:
    """The same batches with the text, of at most WATERMARK_BYTES, in every frame."""
    bits = _bits_of(text)
    for batch in batches:
        yield np.stack([_marked(frame, bits) for frame in batch])


def read(frames: Iterable[Frames]) -> str | None:
    """The text that is in the frames, batches of uint8 (F, H, W, 3), RGB; None if there is none."""
    said = np.zeros(_BITS)
    for frame in (frame for batch in frames for frame in batch):
        blocks = _blocks(_luma(frame))
        bit, offset = _places(*blocks.shape[:2])
        for at, wave in enumerate(_waves()):
            phase = (np.einsum("yxij,ij->yx", blocks, wave) - offset[at]) / _STEP
            said += np.bincount(bit[at].ravel(), np.cos(2 * np.pi * phase).ravel(), _BITS)
    # The weakest bits may have been lost, as in small frames: they are tried both ways.
    weakest = np.argsort(np.abs(said))[:_DOUBTED]
    for tried in itertools.product((False, True), repeat=_DOUBTED):
        bits = said < 0
        bits[weakest] ^= tried
        if (text := _text_of(bits)) is not None:
            return text
    return None


def _marked(frame: NDArray[np.uint8], bits: NDArray[np.bool_]) -> NDArray[np.uint8]:
    blocks = _blocks(_luma(frame))
    rows, columns = blocks.shape[:2]
    change = np.zeros_like(blocks)
    bit, offset = _places(rows, columns)
    for at, wave in enumerate(_waves()):
        found = np.einsum("yxij,ij->yx", blocks, wave)
        wanted = offset[at] + _STEP / 2 * bits[bit[at]]
        change += ((wanted - found + _STEP / 2) % _STEP - _STEP / 2)[..., None, None] * wave
    out = frame.astype(np.float32)
    inner = out[: rows * _BLOCK_PX, : columns * _BLOCK_PX]
    inner += change.transpose(0, 2, 1, 3).reshape(rows * _BLOCK_PX, columns * _BLOCK_PX)[..., None]
    return out.round().clip(0, 255).astype(np.uint8)


def _luma(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    return frame.astype(np.float32) @ _LUMA


def _blocks(luma: NDArray[np.float32]) -> NDArray[np.float32]:
    """(H, W) → (rows, columns, 8, 8); what is left at the right and below is not marked."""
    rows, columns = luma.shape[0] // _BLOCK_PX, luma.shape[1] // _BLOCK_PX
    inner = luma[: rows * _BLOCK_PX, : columns * _BLOCK_PX]
    return inner.reshape(rows, _BLOCK_PX, columns, _BLOCK_PX).transpose(0, 2, 1, 3)


@lru_cache(maxsize=1)
def _waves() -> tuple[NDArray[np.float32], ...]:
    """The DCT's basis pictures of the frequencies, (8, 8), of length 1."""
    n = np.arange(_BLOCK_PX)

    def wave(k: int) -> NDArray[np.float64]:
        return np.sqrt(2 / _BLOCK_PX) * np.cos(np.pi * (2 * n + 1) * k / (2 * _BLOCK_PX))

    return tuple(np.outer(wave(v), wave(u)).astype(np.float32) for v, u in _FREQUENCIES)


@lru_cache(maxsize=8)
def _places(rows: int, columns: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each frequency and block the number of its bit and its offset, (2, rows, columns)."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    shape = (len(_FREQUENCIES), rows, columns)
    number = int(np.prod(shape))
    # Every bit as often as every other, to one.
    bits = random.permutation(np.arange(number) % _BITS)
    return bits.reshape(shape), (random.random(number, np.float32) * np.float32(_STEP)).reshape(shape)


def _bits_of(text: str) -> NDArray[np.bool_]:
    body = text.encode().ljust(WATERMARK_BYTES, b"\0")
    return np.unpackbits(np.frombuffer(body + _checksum(body), np.uint8)).astype(bool)


def _text_of(bits: NDArray[np.bool_]) -> str | None:
    found = np.packbits(bits).tobytes()
    body = found[:WATERMARK_BYTES]
    if found[WATERMARK_BYTES:] != _checksum(body):
        return None
    try:
        return body.rstrip(b"\0").decode() or None
    except UnicodeDecodeError:
        return None


def _checksum(body: bytes) -> bytes:
    return binascii.crc32(body).to_bytes(4, "big")
