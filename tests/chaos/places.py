"""Where corpus and output lie, seen from outside: written and read past the proxy and the run."""

from __future__ import annotations

import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Final

import boto3

from tests.chaos.history import ObjectWrite, is_visible
from tests.chaos.proxy import FaultProxy

_DISK_BYTES: Final = 24 * 2**20


class Place(ABC):
    """The corpus and the output of one run."""

    input: str
    """URI of the corpus."""
    output: str
    """URI of the output."""

    @abstractmethod
    def put_corpus(self, files: dict[str, bytes]) -> None:
        """Writes the corpus."""

    @abstractmethod
    def writes(self) -> list[ObjectWrite]:
        """The changes of the output's objects so far, in order."""

    @abstractmethod
    def objects(self) -> dict[str, bytes]:
        """The output as it is now, by key."""

    def commits(self) -> int:
        """How many different objects with rows have been written."""
        return len({w.key for w in self.writes() if w.body is not None and is_visible(w.key)})

    @abstractmethod
    def close(self) -> None:
        """Gives back what the place took."""


class S3Place(Place):
    """A bucket behind the proxy, whose record is the history."""

    def __init__(self, bucket: str, endpoint: str, proxy: FaultProxy) -> None:
        self.input, self.output = f"s3://{bucket}/corpus", f"s3://{bucket}/labels"
        self._bucket = bucket
        self._proxy = proxy
        self._prefix = f"/{bucket}/labels/"
        self._client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="local",
            aws_secret_access_key="local",
        )
        self._client.create_bucket(Bucket=bucket)

    def put_corpus(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self._client.put_object(Bucket=self._bucket, Key=f"corpus/{name}", Body=data)

    def writes(self) -> list[ObjectWrite]:
        return [
            ObjectWrite(
                key=exchange.path.removeprefix(self._prefix),
                body=exchange.body if exchange.method == "PUT" else None,
                conditional=exchange.only_if_absent,
            )
            for exchange in self._proxy.exchanges(answered=True)
            if exchange.applied
            and exchange.method in ("PUT", "DELETE")
            and exchange.path.startswith(self._prefix)
        ]

    def objects(self) -> dict[str, bytes]:
        pages = self._client.get_paginator("list_objects_v2")
        keys = [
            entry["Key"]
            for page in pages.paginate(Bucket=self._bucket, Prefix="labels/")
            for entry in page.get("Contents", ())
        ]
        return {
            key.removeprefix("labels/"): self._client.get_object(Bucket=self._bucket, Key=key)[
                "Body"
            ].read()
            for key in keys
        }

    def close(self) -> None:
        self._client.close()


class LocalPlace(Place):
    """Folders on this machine; the history is what `writes` has seen. small_disk: the output lies
    on a file system of its own, which `fill` fills."""

    def __init__(self, folder: Path, *, small_disk: bool = False) -> None:
        self._folder = folder
        self._labels = folder / "disk" / "labels"
        self._labels.parent.mkdir(parents=True)
        self.input, self.output = str(folder / "corpus"), str(self._labels)
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._writes: list[ObjectWrite] = []
        self.disk_is_small = small_disk and _mount(self._labels.parent)

    def put_corpus(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            file = self._folder / "corpus" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            os.utime(file, ns=(10**18, 10**18))  # a local etag holds the time

    def writes(self) -> list[ObjectWrite]:
        present = {}
        for file in sorted(self._labels.rglob("*")):
            key = file.relative_to(self._labels).as_posix()
            try:
                stat = file.stat()
                if not file.is_file() or file.name.startswith("."):
                    continue
                present[key] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
                if self._seen.get(key) != present[key]:
                    self._writes.append(ObjectWrite(key=key, body=file.read_bytes()))
            except FileNotFoundError:
                continue
        removed = self._seen.keys() - present.keys()
        self._writes += [ObjectWrite(key=key, body=None) for key in sorted(removed)]
        self._seen = present
        return list(self._writes)

    def objects(self) -> dict[str, bytes]:
        return {
            file.relative_to(self._labels).as_posix(): file.read_bytes()
            for file in sorted(self._labels.rglob("*"))
            if file.is_file()
        }

    def fill(self) -> None:
        """Takes every free byte of the small disk."""
        assert self.disk_is_small
        with (self._labels.parent / "ballast").open("ab", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while file.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Gives the bytes back."""
        (self._labels.parent / "ballast").unlink(missing_ok=True)

    def close(self) -> None:
        if self.disk_is_small:
            # Lazily: a process that still holds a file there must not keep the mount.
            subprocess.run(["umount", "--lazy", str(self._labels.parent)], check=True, timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)


def _mount(folder: Path) -> bool:
    """Mounts a small file system in memory; False where this process may not."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
