"""The row schema: what readers hand to the caller, and what is committed.

A unit travels as one Arrow table. Columns whose name starts with `_in_` or `_out_` are the
system's own and are dropped before the commit; every other column is the source's or the output's.

`kept_tokens` says which visual tokens the model saw: one bit for each of the row's `visual_tokens`
in prompt order, image after image, set where the token entered the decoder. Bits are in the order
of `numpy.packbits(…, bitorder="little")`, so

    numpy.unpackbits(numpy.frombuffer(mask, "uint8"), count=visual_tokens, bitorder="little")

gives them back. A dense row has all of them set. A method that puts one token in place of several
(`pool`, merging) has the place of that token set. A method that prunes inside the decoder too
drops some of these tokens there: as many as are set entered it, and `visual_tokens_kept` is what
its budget counts. Error rows have null.
"""

from __future__ import annotations

import pyarrow as pa

from cluster.config import Kind

# Reader → caller. One row of each table is one input row (or one broken archive).
INPUT_FIELDS: tuple[pa.Field, ...] = (
    pa.field("_in_unit", pa.string()),
    pa.field("_in_row", pa.int32()),
    pa.field("_in_key", pa.string()),
    pa.field("_in_image", pa.large_binary()),
    pa.field("_in_prompt", pa.string()),
    pa.field("_in_error_code", pa.string()),
    pa.field("_in_error_message", pa.string()),
    pa.field("_in_error_stage", pa.string()),
)

# Labeller → sink, besides OUTPUT_FIELDS: the modelled cost of the row as JSON, for the ledger.
COST_FIELD = pa.field("_out_cost", pa.string())

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
    pa.field("model", pa.string()),
    pa.field("model_revision", pa.string()),
    pa.field("run_id", pa.string()),
    # Where the row came from: with these, rows whose keys collide stay distinguishable.
    pa.field("unit_id", pa.string()),
    pa.field("unit_row", pa.int32()),
)
VQA_FIELDS: tuple[pa.Field, ...] = (
    pa.field("question", pa.string()),
    pa.field("answer", pa.string()),
)

_INTERNAL = ("_in_", "_out_")


def is_internal(name: str) -> bool:
    """Whether a column is the system's own and never committed."""
    return name.startswith(_INTERNAL)


def output_names(kind: Kind) -> frozenset[str]:
    fields = OUTPUT_FIELDS + (VQA_FIELDS if kind == "vqa" else ())
    return frozenset(field.name for field in fields)


def source_name(name: str, kind: Kind) -> str:
    """The name under which a source column is committed: its own, or `source_<name>` where an
    output column has that name (LLaVA and WebDataset corpora often carry a `text`)."""
    return f"source_{name}" if name in output_names(kind) or is_internal(name) else name


def input_schema(source: pa.Schema) -> pa.Schema:
    """What a reader yields: the (already renamed) source columns, then INPUT_FIELDS."""
    return pa.schema([*source, *INPUT_FIELDS])


def output_schema(source: pa.Schema, kind: Kind) -> pa.Schema:
    """What is committed: source columns, OUTPUT_FIELDS, and for VQA question and answer."""
    return pa.schema([*source, *OUTPUT_FIELDS, *(VQA_FIELDS if kind == "vqa" else ())])
