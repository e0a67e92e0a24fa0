"""Deprecated path of the endpoint: `serve run cluster.fleet:build`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from ray import serve

from cluster.serving.application import endpoint


def build(args: Mapping[str, str]) -> serve.Application:
    """Deprecated: use `cluster:endpoint`, which takes the same arguments."""
    warnings.warn(
        "cluster.fleet:build is deprecated: use `serve run cluster:endpoint …`",
        FutureWarning,  # Python hides a DeprecationWarning that Serve's importer triggers
        stacklevel=2,
    )
    return endpoint(args)
