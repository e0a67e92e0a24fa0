"""How many samples other tools say each tar holds, from the files that they put beside the tars.

img2dataset writes `NNNNN_stats.json` with `successes` for `NNNNN.tar`; an index of webdataset's
wids lists `{url, nsamples}` under `shardlist`. They know no byte ranges, so they cannot replace
the index of a tar; what they say is compared with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import structlog

from cluster.errors import StoreError
from cluster.store import FIRST_CONTACT_S, ObjectInfo, Store

logger = structlog.get_logger(__name__)

STATS_SUFFIX = "_stats.json"
"""How the names of img2dataset's figures of a shard end."""
# Of other JSON files: a corpus with more has one for each sample, and none of them is an index.
_MAX_FILES = 8
_MAX_BYTES = 64 * 2**20


def find_shard_counts(
    store: Store, tars: Sequence[ObjectInfo], *, prefix: str = ""
) -> dict[str, int]:
    """Samples by key of the tar, for those that a file beside them counts, whose name starts with
    `prefix`. What cannot be listed or read counts none: this is for a warning."""
    store = store.with_patience(FIRST_CONTACT_S)
    try:
        listed = store.list(prefix, suffixes=(".json",))
    except StoreError as error:
        logger.warning("shard_counts_unlisted", error=str(error))
        return {}
    keys = {info.key for info in tars}
    counts: dict[str, int] = {}
    others = []
    for info in listed:
        tar = f"{info.key.removesuffix(STATS_SUFFIX)}.tar"
        if info.key.endswith(STATS_SUFFIX):
            record = _read(store, info) if tar in keys else None
            _add(counts, tar, record.get("successes") if isinstance(record, dict) else None)
        elif info.size <= _MAX_BYTES:
            others.append(info)
    for info in others if len(others) <= _MAX_FILES else []:
        record = _read(store, info)
        shards = record.get("shardlist") if isinstance(record, dict) else None
        folder = info.key.rpartition("/")[0]
        for shard in shards if isinstance(shards, list) else []:
            if isinstance(shard, dict) and isinstance(shard.get("url"), str):
                tar = f"{folder}/{shard['url'].rpartition('/')[2]}".removeprefix("/")
                if tar in keys:
                    _add(counts, tar, shard.get("nsamples"))
    return counts


def _read(store: Store, info: ObjectInfo) -> Any:
    """None for a file that is not JSON, which is none of ours, or that cannot be read."""
    try:
        return json.loads(store.get(info.key))
    except (ValueError, RecursionError):
        return None
    except StoreError as error:
        logger.warning("shard_count_unreadable", error=str(error))
        return None


def _add(counts: dict[str, int], tar: str, number: object) -> None:
    if isinstance(number, int) and not isinstance(number, bool):
        counts[tar] = number
