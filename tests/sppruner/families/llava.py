"""LLaVA-1.5: 16 visual tokens an image, a CLS token, grouped-query attention."""

from __future__ import annotations

from tests.sppruner.families.base import Family
from tests.sppruner.llava import IMAGE, batch, build

FAMILY = Family(name="llava", build=build, batch=batch, image_id=IMAGE)
