"""From PyAV's frames to RGB pictures as displayed: deinterlaced, in the right colours, turned and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from t2vz.errors import SourceError
from t2vz.media.tonemap import PEAK_CD_M2, WHITE_CD_M2, to_sdr

_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
# Matrices that libswscale has no coefficients for; it takes BT.601's without a word.
_STRANGE_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived, constant luminance",
    14: "ICtCp",
    15: "IPT-C2 (Dolby Vision profile 5)",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}
_WIDE_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
# How a display matrix that keeps the axes (by the signs of a and d) or swaps them (of c and b) turns and mirrors.
_TURNS = {
    ("straight", True, True): (0, False),
    ("straight", False, True): (0, True),
    ("straight", False, False): (180, False),
    ("straight", True, False): (180, True),
    ("swapped", True, False): (90, False),
    ("swapped", True, True): (90, True),
    ("swapped", False, True): (270, False),
    ("swapped", False, False): (270, True),
}
_BT2020 = 9  # AVCOL_PRI_BT2020
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, AVCOL_PRI_UNSPECIFIED
_UNSAID = (0, _UNSPECIFIED)
# Above the one or from the other on, untagged video is taken for HD, as players (mpv) do.
_SD_HEIGHT_PX, _HD_WIDTH_PX = 576, 1280
_TO_SDR = (
    "ffmpeg -i IN -vf zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=mobius,"
    "zscale=t=bt709:m=bt709:r=tv,format=yuv420p OUT"
)


def check_colours(path: str, frame: Any, declared: Any) -> tuple[str, tuple[str, ...]]:
    """(kind of HDR: "PQ", "HLG" or ""; warnings). declared: codec context, which has the container's word on them.

    Errors: SourceError for what would come out wrong: matrices that can't be undone, HDR of other primaries.
    """
    for matrix in (frame.colorspace, declared.colorspace):
        if matrix in _STRANGE_MATRICES and not frame.format.is_rgb:
            raise SourceError(
                f"{path}: its colours are {_STRANGE_MATRICES[matrix]}, which can't be read; "
                "re-encode it as BT.709 first"
            )
    primaries = next((p for p in (frame.color_primaries, declared.color_primaries) if p not in _UNSAID), None)
    hdr = _HDR_TRANSFERS.get(frame.color_trc) or _HDR_TRANSFERS.get(declared.color_trc) or ""
    if hdr and primaries not in (None, _BT2020):
        raise SourceError(f"{path}: is HDR ({hdr}) of other primaries than BT.2020; make it SDR first: {_TO_SDR}")
    if hdr:
        return hdr, (
            f"HDR ({hdr}): tones are mapped to SDR, with white at {WHITE_CD_M2:.0f} and the peak at "
            f"{PEAK_CD_M2:.0f} cd/m²",
        )
    if primaries in _WIDE_PRIMARIES:
        return "", (f"wide gamut ({_WIDE_PRIMARIES[primaries]}) is taken as BT.709: colours are a little paler",)
    return "", ()


def orientation(frame: Any) -> tuple[int, bool] | None:
    """(degrees counter-clockwise, mirrored): how a frame is brought to display: mirrored left to right, then turned.

    None if its matrix turns by an angle that is no multiple of 90 degrees.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return 0, False
    # x' = a x + c y, y' = b x + d y, with y downwards.
    a, b, _, c, d = np.frombuffer(bytes(side_data), np.int32)[:5].tolist()
    small = max(map(abs, (a, b, c, d))) / 1000
    straight, swapped = abs(b) <= small and abs(c) <= small, abs(a) <= small and abs(d) <= small
    if straight and swapped:
        return 0, False  # all of it 0
    if not straight and not swapped:
        return None
    return _TURNS["straight", a > 0, d > 0] if straight else _TURNS["swapped", c > 0, b > 0]


def is_untagged_hd(frame: Any, codec: str) -> bool:
    """True if the frame names no colour matrix but has a size that means BT.709 (FFmpeg: BT.601)."""
    return (
        frame.colorspace == _UNSPECIFIED
        and (frame.height > _SD_HEIGHT_PX or frame.width >= _HD_WIDTH_PX)
        and not frame.format.is_rgb
        and codec != "mjpeg"  # JPEG is BT.601 at any size
    )


def deinterlaced(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """The frames in their order; from the first interlaced one on through FFmpeg's bwdif, a frame for a frame.

    bwdif makes a whole frame of each frame's earlier field and what the frames around tell, and leaves
    progressive frames as they are.
    """
    graph, shape = None, None
    for frame in frames:
        now = (frame.width, frame.height, frame.format.name)
        if graph is not None and now != shape:  # a filter graph is for one size
            yield from _drained(graph)
            graph = None
        if graph is None:
            if not frame.interlaced_frame:
                yield frame
                continue
            graph, shape = _graph(frame, stream.time_base, ("bwdif", "mode=send_frame:deint=interlaced")), now
        graph.push(frame)
        yield from _pulled(graph)
    if graph is not None:
        yield from _drained(graph)


def _drained(graph: Any) -> Iterator[Any]:
    graph.push(None)
    yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[Any]:
    with suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.pull()


def rgb_converter(codec: str, rotation: int, mirrored: bool, hdr: str) -> Callable[[Any], NDArray[np.uint8]]:
    """PyAV frame → uint8 (h, w, 3) RGB, turned for display. By FFmpeg's own scale filter: its bits.

    PyAV's reformatter does nearly the same, but places chroma differently in 10-bit and interlaced frames.
    HDR is mapped to SDR.
    """
    graphs: dict[tuple[Any, ...], Any] = {}

    def to_rgb(frame: Any) -> NDArray[np.uint8]:
        matrix = ""
        if hdr and frame.colorspace in _UNSAID and not frame.format.is_rgb:
            matrix = "bt2020"
        elif not hdr and is_untagged_hd(frame, codec):
            matrix = "bt709"
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        if shape not in graphs:
            graphs.clear()
            scale = "flags=bicubic" + (f":in_color_matrix={matrix}" if matrix else "")
            form = "rgb48le" if hdr else "rgb24"
            graphs[shape] = _graph(frame, frame.time_base, ("scale", scale), ("format", f"pix_fmts={form}"))
        graphs[shape].push(frame)
        picture = graphs[shape].pull().to_ndarray()
        if hdr:
            picture = to_sdr(picture, hdr)
        return np.rot90(picture[:, ::-1] if mirrored else picture, rotation // 90)

    return to_rgb


def _graph(frame: Any, time_base: Any, *filters: tuple[str, str]) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=time_base)
    graph.link_nodes(source, *(graph.add(name, options) for name, options in filters), graph.add("buffersink"))
    graph.configure()
    return graph
