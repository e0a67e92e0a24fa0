"""Encoder cache: vision features of recent images, since many prompts share few images.

An entry holds the features of all images of one prompt together: how an image is cut into tiles may
depend on the images beside it.
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
from sppruner.engine.collate import TOKEN_ENTRIES
from sppruner.errors import SpecError


def hash_images(inputs: Mapping[str, Tensor], shapes: Sequence[ImageShape]) -> bytes:
    """A hash of the images in a prompt's processor tensors; empty without images.

    shapes: of each image, since tiles alone do not show where one image ends.
    """
    if not shapes:
        return b""
    digest = hashlib.blake2b(repr(tuple(shapes)).encode(), digest_size=32)
    for name in sorted(inputs.keys() - TOKEN_ENTRIES):
        value = inputs[name].cpu().contiguous()
        digest.update(f"\n{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entry:
    """output: an empty object of the family's own output type. signals: those that were read while
    encoding. size: bytes of memory that the images hold."""

    images: tuple[EncodedImage, ...]
    output: Any
    signals: frozenset[str]
    size: int


class EncoderCache:
    """LRU cache of encoded images by prompt. Its tensors are shared: nobody may change them.

    limit: most bytes of all entries together. hits, misses: prompts that were served without and
    with a pass of their images through the tower. Raises SpecError for a negative limit.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise SpecError(f"an encoder cache of {limit} bytes: give 0 for no cache, or more")
        self.limit = limit
        self.hits = self.misses = 0
        self._entries: LRUCache[bytes, _Entry] = LRUCache(limit, getsizeof=lambda e: e.size)

    @property
    def size(self) -> int:
        """Bytes held."""
        return int(self._entries.currsize)

    def clear(self) -> None:
        """Drops all entries."""
        self._entries.clear()

    def get_or_encode(
        self,
        keys: Sequence[bytes],
        signals: Sequence[frozenset[str]],
        encode: Callable[[Sequence[int], frozenset[str]], Encoded],
    ) -> Encoded:
        """The encoded images of prompts, in their order, as one batch.

        keys: `hash_images` of each prompt. signals: those that each prompt needs; it may get more.
        encode: called at most once, with the indices of the prompts to encode, one for each key
        that is not held, and the signals to read. Raises what `encode` raises; nothing is cached
        then.
        """
        needed: dict[bytes, frozenset[str]] = {}
        for key, names in zip(keys, signals, strict=True):
            needed[key] = needed.get(key, frozenset()) | names
        held = {k: entry for k in needed if (entry := self._get(k, needed[k])) is not None}
        missing = [key for key in needed if key not in held]
        if missing:
            read = frozenset[str]().union(*(needed[key] for key in missing))
            # An entry that is encoded again for one more signal keeps those it had, or two methods
            # in alternation would never find theirs.
            read = read.union(*(self._entries[k].signals for k in missing if k in self._entries))
            encoded = encode([keys.index(key) for key in missing], read)
            for row, key in enumerate(missing):
                images = compact_storage([image for image in encoded.images if image.row == row])
                held[key] = _Entry(
                    images=images,
                    output=type(encoded.output)(),
                    signals=read,
                    size=storage_bytes(images),
                )
                self._put(key, held[key])
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        return Encoded(
            images=tuple(
                _with_row(image, row) for row, key in enumerate(keys) for image in held[key].images
            ),
            output=held[keys[0]].output,
        )

    def _get(self, key: bytes, signals: frozenset[str]) -> _Entry | None:
        entry = self._entries.get(key)
        return entry if entry is not None and signals <= entry.signals else None

    def _put(self, key: bytes, entry: _Entry) -> None:
        self._entries.pop(key, None)
        if entry.size <= self.limit:
            self._entries[key] = entry


def compact_storage(images: Sequence[EncodedImage]) -> tuple[EncodedImage, ...]:
    """The images in storage that holds nothing else.

    Tensors that overlap still do, such as an image's features and those of its planes. A tensor
    that already fills its storage is not copied.
    """
    spans: dict[tuple[int, torch.dtype], tuple[int, int]] = {}
    for tensor in tensors_of(images):
        first, last = _span(tensor)
        start, stop = spans.get(_storage_key(tensor), (first, last))
        spans[_storage_key(tensor)] = min(start, first), max(stop, last)
    copies: dict[tuple[int, torch.dtype], Tensor] = {}

    def compacted(tensor: Tensor) -> Tensor:
        start, stop = spans[_storage_key(tensor)]
        if tensor.untyped_storage().nbytes() == (stop - start) * tensor.element_size():
            return tensor
        if _storage_key(tensor) not in copies:
            copy = tensor.as_strided((stop - start,), (1,), start).clone()
            copies[_storage_key(tensor)] = copy
        at = tensor.storage_offset() - start
        return copies[_storage_key(tensor)].as_strided(tensor.shape, tensor.stride(), at)

    return tuple(_map_tensors(image, compacted) for image in images)


def storage_bytes(images: Sequence[EncodedImage]) -> int:
    """Bytes of memory that the images keep alive."""
    storages = [tensor.untyped_storage() for tensor in tensors_of(images)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_of(images: Sequence[EncodedImage]) -> list[Tensor]:
    """Every tensor of the images."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for image in images:
        _map_tensors(image, collect)
    return found


def _map_tensors(image: EncodedImage, change: Callable[[Tensor], Tensor]) -> EncodedImage:
    """The image with `change` applied to every tensor."""
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


def _with_row(image: EncodedImage, row: int) -> EncodedImage:
    """The image as one of prompt `row`; its index among the prompt's images stays."""
    return replace(image, row=row, planes=tuple(replace(plane, row=row) for plane in image.planes))


def _storage_key(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first element of the storage that a tensor reads, and the one after its last."""
    first = int(tensor.storage_offset())
    if tensor.numel() == 0:
        return first, first
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + int(reach) + 1
