"""What a member of a sample is for: its image, a text column, or nothing that is copied.

Guarantees: a sample has one image or none, found by a rule that a message can state; members that
could run code when read are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from cluster.corpus.tar_header import Member
from cluster.corpus.tar_samples import Sample
from cluster.images import image_format

IMAGE_SUFFIXES = tuple(
    "jpg jpeg jpe jfif png webp gif bmp dib tif tiff avif heic heif img image".split()
)
"""Last parts of the extensions of images, the preferred first."""
TEXT_EXTENSIONS = frozenset(
    "answer answers caption cls cls2 count id idx index json label question tags text transcript "
    "txt url".split()
)
"""Last parts of extensions whose members are committed as string columns."""
# Could run code when read: no reader of ours may ever open them.
_NEVER_READ = frozenset("pkl pickle pyd pt pth dill joblib".split())
_MAGIC_BYTES = 32


def is_text(extension: str) -> bool:
    """Whether members with this extension become a string column."""
    return _suffix(extension) in TEXT_EXTENSIONS


def is_image(extension: str) -> bool:
    """Whether members with this extension are images, by its last part."""
    return _suffix(extension) in IMAGE_SUFFIXES


def list_not_copied(extensions: Collection[str]) -> list[str]:
    """The extensions whose members are in no column and are no sample's image, sorted."""
    plain = any(extension in IMAGE_SUFFIXES for extension in extensions)
    return sorted(
        extension
        for extension in extensions
        if extension
        and not is_text(extension)
        and (not is_image(extension) or (plain and extension not in IMAGE_SUFFIXES))
    )


def find_rival_images(extensions: Iterable[str]) -> list[str]:
    """The extensions of a sample of which any could be its image; empty where the rule decides:
    the plain suffix before compound ones (`a.png` before `a.mask.png`), then the only one."""
    images = [extension for extension in extensions if is_image(extension)]
    if len(images) < 2 or any(extension in IMAGE_SUFFIXES for extension in images):
        return []
    return images


def find_image(sample: Sample, read: Callable[[Member, int], bytes]) -> Member | None:
    """The sample's image: by extension, or by content where one member alone can be it.

    read: the first bytes of a member's data.
    """
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample.members:
            return sample.members[suffix]
    named = [extension for extension in sample.members if is_image(extension)]
    if not named:
        named = [
            extension
            for extension, member in sample.members.items()
            if not is_text(extension)
            and _suffix(extension) not in _NEVER_READ
            and image_format(read(member, _MAGIC_BYTES))
        ]
    return sample.members[named[0]] if len(named) == 1 else None


def _suffix(extension: str) -> str:
    return extension.rpartition(".")[2]
