"""t2vz: Text2Video-Zero as a batch video-processing pipeline. See README.md."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2vz.api import TextToVideoZero, TextToVideoZeroControlNet, VideoInstructPix2Pix, VideoOutput

__version__ = version("t2vz")
__all__ = ["TextToVideoZero", "TextToVideoZeroControlNet", "VideoInstructPix2Pix", "VideoOutput"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # not before it is asked for: `import t2vz` and all below it stay light
        return getattr(import_module("t2vz.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
