"""What images encode to, kept for the next prompt about them: many prompts ask about few images.

An entry is what one prompt's images encode to: how an image is cut up may depend on the images
beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor

from sppruner.adapters import Encoded, EncodedImage
from sppruner.cost import ImageShape
from sppruner.engine.collate import PER_TOKEN
from sppruner.errors import SpecError


def content_of(inputs: Mapping[str, Tensor], shapes: Sequence[ImageShape]) -> bytes:
    """A name for the images in a prompt's processor tensors, the same for the same images only;
    empty without any. shapes: of each image, since tiles alone do not say where one ends."""
    if not shapes:
        return b""
    digest = hashlib.blake2b(repr(tuple(shapes)).encode(), digest_size=32)
    for name in sorted(inputs.keys() - PER_TOKEN):
        value = inputs[name].cpu().contiguous()
        digest.update(f"\n{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entry:
    """output: an empty object of the family's own type. signals: that were read on the way. size:
    bytes of memory that the images hold."""

    images: tuple[EncodedImage, ...]
    output: Any
    signals: frozenset[str]
    size: int


class EncoderCache:
    """The encodings of the prompts seen last. Its tensors are shared: nobody may change them.

    limit: bytes that entries may hold together; those that were not asked for longest go first.
    hits, misses: prompts that were served without and with a pass of their images through the
    tower. Raises SpecError for a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise SpecError(f"encodings of {limit} bytes: give 0 to keep none, or more")
        self.limit = limit
        self.hits = self.misses = 0
        self._entries: LRUCache[bytes, _Entry] = LRUCache(limit, getsizeof=lambda e: e.size)

    @property
    def size(self) -> int:
        """Bytes held."""
        return int(self._entries.currsize)

    def of(
        self,
        contents: Sequence[bytes],
        signals: Sequence[frozenset[str]],
        encode: Callable[[Sequence[int], frozenset[str]], Encoded],
    ) -> Encoded:
        """What prompts encode to together, in their order.

        contents: each prompt's, as `content_of` names it. signals: that each needs; it may get
        more. encode: called at most once, with the prompts to encode, one for each content that is
        not held, and the signals to read. Raises what `encode` raises, and then nothing was kept.
        """
        wanted: dict[bytes, frozenset[str]] = {}
        for content, needed in zip(contents, signals, strict=True):
            wanted[content] = wanted.get(content, frozenset()) | needed
        held = {c: entry for c in wanted if (entry := self._find(c, wanted[c])) is not None}
        missing = [content for content in wanted if content not in held]
        if missing:
            read = frozenset[str]().union(*(wanted[content] for content in missing))
            # An entry that is encoded again for one more signal keeps those it had, or two methods
            # that take turns would never find what they need.
            read = read.union(*(self._entries[c].signals for c in missing if c in self._entries))
            encoded = encode([contents.index(content) for content in missing], read)
            for row, content in enumerate(missing):
                images = own([image for image in encoded.images if image.row == row])
                held[content] = _Entry(
                    images=images,
                    output=type(encoded.output)(),
                    signals=read,
                    size=size_of(images),
                )
                self._keep(content, held[content])
        self.misses += len(missing)
        self.hits += len(contents) - len(missing)
        return Encoded(
            images=tuple(
                _placed(image, row)
                for row, content in enumerate(contents)
                for image in held[content].images
            ),
            output=held[contents[0]].output,
        )

    def _find(self, content: bytes, signals: frozenset[str]) -> _Entry | None:
        entry = self._entries.get(content)
        return entry if entry is not None and signals <= entry.signals else None

    def _keep(self, content: bytes, entry: _Entry) -> None:
        self._entries.pop(content, None)
        if entry.size <= self.limit:
            self._entries[content] = entry


def own(images: Sequence[EncodedImage]) -> tuple[EncodedImage, ...]:
    """The images in memory that holds nothing else. Tensors that overlap still do, such as an
    image's features and those of its planes; what already is by itself is not copied."""
    spans: dict[tuple[int, torch.dtype], tuple[int, int]] = {}
    for tensor in tensors_of(images):
        first, last = _span(tensor)
        start, stop = spans.get(_memory(tensor), (first, last))
        spans[_memory(tensor)] = min(start, first), max(stop, last)
    copies: dict[tuple[int, torch.dtype], Tensor] = {}

    def owned(tensor: Tensor) -> Tensor:
        start, stop = spans[_memory(tensor)]
        if tensor.untyped_storage().nbytes() == (stop - start) * tensor.element_size():
            return tensor
        if _memory(tensor) not in copies:
            copies[_memory(tensor)] = tensor.as_strided((stop - start,), (1,), start).clone()
        at = tensor.storage_offset() - start
        return copies[_memory(tensor)].as_strided(tensor.shape, tensor.stride(), at)

    return tuple(_mapped(image, owned) for image in images)


def size_of(images: Sequence[EncodedImage]) -> int:
    """Bytes of memory that the images keep alive."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(images)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_of(images: Sequence[EncodedImage]) -> list[Tensor]:
    """Every tensor of the images."""
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for image in images:
        _mapped(image, seen)
    return found


def _mapped(image: EncodedImage, change: Callable[[Tensor], Tensor]) -> EncodedImage:
    """The image with every tensor changed."""
    return replace(
        image,
        run_ND=change(image.run_ND),
        planes=tuple(
            replace(
                plane,
                features_ND=change(plane.features_ND),
                hidden_NV=None if plane.hidden_NV is None else change(plane.hidden_NV),
                coords_N2=change(plane.coords_N2),
                signals={name: change(value) for name, value in plane.signals.items()},
            )
            for plane in image.planes
        ),
        places=tuple(map(change, image.places)),
        deepstack=tuple(map(change, image.deepstack)),
    )


def _placed(image: EncodedImage, row: int) -> EncodedImage:
    """The image as one of prompt `row`; its place among the prompt's images stays."""
    return replace(image, row=row, planes=tuple(replace(plane, row=row) for plane in image.planes))


def _memory(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _span(tensor: Tensor) -> tuple[int, int]:
    """First element of the storage that a tensor reads, and the one behind its last."""
    first = int(tensor.storage_offset())
    if tensor.numel() == 0:
        return first, first
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + int(reach) + 1
