"""t2vz: Text2Video-Zero as a batch video-processing pipeline. See README.md."""

from importlib.metadata import version

__version__ = version("t2vz")
