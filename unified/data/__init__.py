"""From files to training batches."""

from unified.data.rows import CaptionedImage, SkipReport, captioned_images, open_rgb
from unified.data.sources import load_source

__all__ = ["CaptionedImage", "SkipReport", "captioned_images", "load_source", "open_rgb"]
