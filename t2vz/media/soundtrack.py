"""Soundtrack: the sound of a source's range, carried over to an output beside the frames.

In two steps, so that the source is opened in a child only (`media.sandbox`): `write` makes a file of the range's sound,
in the output's container and codec; a `Track` copies the packets of that into the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from t2vz.clip import AudioReference
from t2vz.errors import SourceError
from t2vz.media.av_source import AV_ERRORS, decoded, open_source, origin_s

# Codecs that go into a container as they are, and what every other is made into.
_COPIED = {
    "mp4": ("aac", "mp3", "ac3", "eac3", "alac"),
    "webm": ("opus", "vorbis"),
    "mkv": ("aac", "mp3", "ac3", "eac3", "alac", "flac", "opus", "vorbis", "pcm_s16le", "pcm_s24le"),
}
_TRANSCODED = {"mp4": "aac", "webm": "libopus", "mkv": "flac"}
_BIT_RATE = {"aac": 96_000, "libopus": 64_000}  # a channel, bits/s
_OPUS_RATE_HZ = 48_000
_SEEK_BEYOND_S = 10.0
_SEEK_MARGIN_S = 1.0


_MUXERS = {"mkv": "matroska"}


class Track:
    """Packets of a file that `write` made, written as the video goes on, so that neither waits in memory for the other.

    written: True once sound is in the output.
    """

    def __init__(self, path: Path) -> None:
        self.written = False
        self._source = open_source(path)
        self._pending: Any = None
        self._packets: Iterator[Any] = iter(())
        self._output: Any = None

    def add_to(self, output: Any) -> None:
        """Make the stream in the output container, before anything is written there."""
        (sound,) = self._source.streams.audio
        stream = output.add_stream_from_template(sound)
        self._packets = (packet for packet in self._source.demux(sound) if packet.size and packet.pts is not None)
        self._output, self._stream = output, stream

    def write_until(self, end_s: float) -> None:
        """Write the packets that begin before `end_s` of the output."""
        while True:
            if self._pending is None:
                self._pending = next(self._packets, None)
            if self._pending is None or self._pending.pts * self._pending.time_base >= end_s:
                return
            self._pending.stream = self._stream
            self._output.mux(self._pending)
            self._pending = None
            self.written = True

    def close(self) -> None:
        self._packets = iter(())
        self._source.close()


class _Range:
    """The source's packets of the range. Of several tracks it takes the default one, else the first."""

    def __init__(self, audio: AudioReference, format: str, warnings: list[str]) -> None:
        """Open the source. Raises what opening or decoding its first sound raises."""
        self._warnings = warnings
        self._source = open_source(audio.path)
        try:
            tracks = [track for track in self._source.streams.audio if track.codec_context is not None]
            if not tracks:
                raise SourceError(f"{audio.path}: no audio stream of a known codec")
            kept = next((k for k, track in enumerate(tracks) if track.disposition & av.stream.Disposition.default), 0)
            self._stream = tracks[kept]
            if len(tracks) > 1:
                warnings.append(f"{len(tracks)} audio tracks: number {kept + 1} is kept")
            self._begin_s = audio.start_s + origin_s(self._source)
            self._end_s = audio.end_s + origin_s(self._source)
            codec = self._stream.codec_context.name
            # AAC of MPEG-TS has its parameters in the packets, where MP4 can't have them.
            complete = codec != "aac" or bool(self._stream.codec_context.extradata)
            self._encoder = None if codec in _COPIED[format] and complete else _TRANSCODED[format]
            self._seek()
            if next(decoded(self._source, self._stream), None) is None:
                raise SourceError(f"{audio.path}: nothing of its audio decodes")
            self._seek()
        except BaseException:
            self._source.close()
            raise

    def write(self, output: Any) -> bool:
        """Write all of it to the output container; False if it is nothing. Damage ends the sound with a warning."""
        packets, at_s, written = self._packets(output), 0.0, False
        while True:
            try:
                at_s, packet = next(packets, (at_s, None))
            except AV_ERRORS as error:
                return self._ended(at_s, error, written)
            if packet is None:
                return written
            try:
                output.mux(packet)
            except AV_ERRORS as error:
                if isinstance(error, OSError):  # the disk's, and not the packet's
                    raise
                return self._ended(at_s, error, written)
            written = True

    def _ended(self, at_s: float, error: Exception, written: bool) -> bool:
        self._warnings.append(f"the audio ends early, at {at_s:.2f} s: its source is damaged ({_why(error)})")
        return written

    def _packets(self, output: Any) -> Iterator[tuple[float, Any]]:
        """(when it begins in the output, in seconds; a packet of the stream that is made there)."""
        if self._encoder is None:
            return self._copied(output.add_stream_from_template(self._stream))
        context = self._stream.codec_context
        rate_hz = _OPUS_RATE_HZ if self._encoder == "libopus" else context.sample_rate
        channels = min(context.channels, 2)
        if context.channels > channels:
            self._warnings.append(f"{context.channels} channels of sound are mixed down to stereo")
        stream = output.add_stream(self._encoder, rate=rate_hz, layout=("mono", "stereo")[channels - 1])
        if self._encoder in _BIT_RATE:
            stream.bit_rate = channels * _BIT_RATE[self._encoder]
        return self._transcoded(stream)

    def close(self) -> None:
        self._source.close()

    def _seek(self) -> None:
        near_s = self._begin_s - _SEEK_MARGIN_S if self._begin_s > _SEEK_BEYOND_S else 0.0
        self._source.seek(int(near_s * av.time_base), backward=True)

    def _copied(self, stream: Any) -> Iterator[tuple[float, Any]]:
        tick = self._stream.time_base
        begin = round(self._begin_s / tick)
        for packet in self._source.demux(self._stream):
            if not packet.size or packet.pts is None or packet.pts < begin:
                continue
            if packet.pts * tick >= self._end_s:
                return
            packet.pts -= begin
            packet.dts = packet.pts
            packet.stream = stream
            yield float(packet.pts * tick), packet

    def _transcoded(self, stream: Any) -> Iterator[tuple[float, Any]]:
        trim = _trim_graph(self._stream, self._begin_s, self._end_s)

        def frames() -> Iterator[Any]:
            for frame in decoded(self._source, self._stream):
                if frame.time is not None and frame.time >= self._end_s:
                    return
                trim.push(frame)
                while True:
                    try:
                        yield trim.pull()
                    except (av.error.BlockingIOError, av.error.EOFError):
                        break

        for frame in frames():
            for packet in stream.encode(frame):
                yield float(packet.pts * packet.time_base), packet
        for packet in stream.encode(None):
            yield float(packet.pts * packet.time_base), packet


def write(audio: AudioReference, path: Path, format: str) -> tuple[bool, tuple[str, ...]]:
    """Write a file of the range's sound alone, for a container of `format`: (whether there is any, warnings).

    What can't be read is a warning. The operating system's errors with `path` pass.
    """
    warnings: list[str] = []
    try:
        sound = _Range(audio, format, warnings)
    except (*AV_ERRORS, OSError, SourceError) as error:
        return False, (*warnings, unreadable(error))
    try:
        with av.open(
            f"file:{path}", "w", format=_MUXERS.get(format, format), container_options={"fflags": "+bitexact"}
        ) as output:
            written = sound.write(output)
    except AV_ERRORS as error:
        if isinstance(error, OSError):
            raise
        return False, (*warnings, unreadable(error))
    finally:
        sound.close()
    return written, tuple(warnings)


def unreadable(error: Exception) -> str:
    """The warning."""
    return f"the source's audio can't be read, the video has none ({_why(error)})"


def _why(error: Exception) -> object:
    """FFmpeg's words without the file's name, which may be a draft's."""
    return getattr(error, "strerror", None) or error


def _trim_graph(stream: Any, begin_s: float, end_s: float) -> Any:
    """Frames cut to the range, to the sample, and counted from its beginning."""
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_abuffer(template=stream),
        graph.add("atrim", f"start={begin_s:.6f}:end={end_s:.6f}"),
        graph.add("asetpts", f"PTS-{begin_s:.6f}/TB"),
        graph.add("abuffersink"),
    ).configure()
    return graph
