"""From untrusted bytes to pixels, for batch and online requests.

`decode_image` decodes in the calling process; `cluster.images.decoders.Decoders` does it in
processes that can be killed.
"""

from cluster.images.decode import decode_image
from cluster.images.formats import image_format, image_size

__all__ = ["decode_image", "image_format", "image_size"]
