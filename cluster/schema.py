"""The row schema: what readers pass to the labeller, and what is committed.

A unit travels as one Arrow table. Columns whose name starts with `_in_` or `_out_` are internal and
dropped before the commit; every other column belongs to the source or to the output.

`kept_tokens` is the mask of the visual tokens that the model saw: one bit for each of the row's
`visual_tokens`, in prompt order, image after image, set if the token entered the decoder. The bit
order is that of `numpy.packbits(…, bitorder="little")`, and the inverse is

    numpy.unpackbits(numpy.frombuffer(mask, "uint8"), count=visual_tokens, bitorder="little")

Of a dense row all bits are set. Of a method that replaces several tokens by one (`pool`, merging)
the bit of that token's position is set. A method that also prunes inside the decoder drops some of
these tokens there: the set bits count the tokens that entered, `visual_tokens_kept` those that the
budget counts. Error rows have null.

`seconds` are measured: the row's share of its replica's wall time, which is shared at every moment
by all rows that the replica has (`serving/row_clock.py`). `is_control` marks the rows of a control
block; those that were answered densely too have `control_text` and `control_seconds`, which none
has of a block that was spoiled. A block's ratio is the mean of its `control_steady_seconds` over
that of its `steady_seconds`: of the answers in the steady part of each arm, the seconds since the
answer before (`accounting/steady_part.py`). `discarded_seconds` went into answers that are not
here: of a row that was asked again, or, in a control block, of a spoiled dense arm and the warm-up.
FLOPs and KV bytes are modelled, from the model's config: of the row as its tokens were,
`flops_cached` of these were spared by caches, `*_dense` without pruning.
"""

from __future__ import annotations

import pyarrow as pa

from cluster.config import Kind
from sppruner.cost import PARTS

UNIT_FIELD = pa.field("_in_unit", pa.string())
"""Reader → sink: id of the row's unit."""
PLANNED_FIELD = pa.field("_in_unit_rows", pa.int32())
"""Reader → sink: planned rows of the row's unit. The sink checks against what comes with them,
since the manifest of a large run is too large for every write task."""

# Reader → labeller. One row is one input row, or a damaged part of an archive.
INPUT_FIELDS: tuple[pa.Field, ...] = (
    UNIT_FIELD,
    PLANNED_FIELD,
    pa.field("_in_row", pa.int32()),
    pa.field("_in_key", pa.string()),
    # A dictionary, since rows often share an image.
    pa.field("_in_image", pa.dictionary(pa.int32(), pa.large_binary())),
    pa.field("_in_prompt", pa.string()),
    pa.field("_in_error_code", pa.string()),
    pa.field("_in_error_message", pa.string()),
    pa.field("_in_error_stage", pa.string()),
)

_FLOPS = pa.struct([pa.field(part, pa.int64()) for part in PARTS])

OUTPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("key", pa.string()),
    pa.field("text", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("error_stage", pa.string()),
    pa.field("attempts", pa.int32()),
    pa.field("finish_reason", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("visual_tokens", pa.int32()),
    pa.field("visual_tokens_kept", pa.int32()),
    pa.field("kept_tokens", pa.binary()),
    pa.field("prune_method", pa.string()),
    pa.field("prune_spec", pa.string()),
    pa.field("seconds", pa.float64()),
    pa.field("is_control", pa.bool_()),
    pa.field("control_text", pa.string()),
    pa.field("control_seconds", pa.float64()),
    pa.field("steady_seconds", pa.float64()),
    pa.field("control_steady_seconds", pa.float64()),
    pa.field("discarded_seconds", pa.float64()),
    pa.field("device", pa.string()),
    pa.field("flops", _FLOPS),
    pa.field("flops_dense", _FLOPS),
    pa.field("flops_cached", _FLOPS),
    pa.field("kv_bytes", pa.int64()),
    pa.field("kv_bytes_dense", pa.int64()),
    pa.field("model", pa.string()),
    pa.field("model_revision", pa.string()),
    pa.field("run_id", pa.string()),
    # The row's position in the corpus, which distinguishes rows with equal keys.
    pa.field("unit_id", pa.string()),
    pa.field("unit_row", pa.int32()),
)
VQA_FIELDS: tuple[pa.Field, ...] = (
    pa.field("question", pa.string()),
    pa.field("answer", pa.string()),
)

_INTERNAL = ("_in_", "_out_")


def is_internal(name: str) -> bool:
    """Whether a column is internal and never committed."""
    return name.startswith(_INTERNAL)


def _output_names(kind: Kind) -> frozenset[str]:
    fields = OUTPUT_FIELDS + (VQA_FIELDS if kind == "vqa" else ())
    return frozenset(field.name.lower() for field in fields)


def is_reserved(name: str, kind: Kind) -> bool:
    """Whether a source column cannot be committed under its own name: it is internal, or an output
    column's in any case (LLaVA and WebDataset corpora often have a `text`, LAION's a `TEXT`; DuckDB
    and Spark take them for one)."""
    return is_internal(name) or name.lower() in _output_names(kind)


def input_schema(source: pa.Schema) -> pa.Schema:
    """The schema of a unit as read: the source columns under committed names, then INPUT_FIELDS."""
    return pa.schema([*source, *INPUT_FIELDS])


def output_schema(source: pa.Schema, kind: Kind) -> pa.Schema:
    """The schema of a committed unit: source columns, OUTPUT_FIELDS, and VQA_FIELDS for VQA."""
    return pa.schema([*source, *OUTPUT_FIELDS, *(VQA_FIELDS if kind == "vqa" else ())])
