"""The details of an answer as a client gets them: what each extension says, and the images that it speaks of.

{"images": ["data:image/png;base64,...", ...], "extensions": {"dynamic": [{"kind": "patches", ...}, ...]}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.data.images import ProcessedImage
from llava.data.pixels import pixels_to_image
from llava.details import KeptPatches, Said, formatted
from llava.runtime.drawing.patches import png_url
from llava.serve.schema import Details


def row_details(said: Mapping[str, Sequence[Said]], images: Sequence[ProcessedImage], image_processor: Any) -> Details:
    """The details of one answer. Takes time, so it is not called where an answer is generated.

    Args:
        said: by the names of extensions.
        images: of the conversation.
        image_processor: of the model.
    """
    given = formatted(said)
    speaks_of_images = any(isinstance(each, KeptPatches) for details in given.values() for each in details)
    # What the tower sees, after cropping or padding: patches are counted on it. Of tiles the overview comes first.
    overviews = [image.pixels if image.pixels.ndim == 3 else image.pixels[0] for image in images]
    return Details(
        images=[png_url(pixels_to_image(pixels, image_processor)) for pixels in overviews if speaks_of_images],
        extensions=given,
    )
