"""PyPI's torchvision is a CUDA build: beside a CPU build of torch its compiled operators do not
load, and its import fails on the first one that it describes. Before that import, this declares
them; image processors call none.

Copied into the environment of `make test-vllm`. No environment with a GPU needs it.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_declared: list[Any] = []  # a library's operators live as long as it does


class _BeforeTorchvision(MetaPathFinder):
    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _declared.append(library)


sys.meta_path.insert(0, _BeforeTorchvision())
