"""Modelled cost of a prompt, from the model's config alone: FLOPs by part and KV-cache bytes.

A multiply-add counts as 2. Attention counts every query-key pair (no causal discount), as
`torch.utils.flop_counter.FlopCounterMode` does; under eager attention the parts equal its counts
exactly. Norms, softmax and activations are not counted. Modelled figures describe the arithmetic;
they are never reported as measured seconds.
"""

from sppruner.cost.decoder_cost import DecoderCost
from sppruner.cost.encoders import ClipTowerCost, LlavaEncoderCost
from sppruner.cost.encoders_qwen import QwenEncoderCost
from sppruner.cost.encoders_tiled import SiglipTowerCost, TiledEncoderCost
from sppruner.cost.model_cost import PARTS, EncoderCost, ImageShape, ModelCost, RowCost

__all__ = [
    "PARTS",
    "ClipTowerCost",
    "DecoderCost",
    "EncoderCost",
    "ImageShape",
    "LlavaEncoderCost",
    "ModelCost",
    "QwenEncoderCost",
    "RowCost",
    "SiglipTowerCost",
    "TiledEncoderCost",
]
