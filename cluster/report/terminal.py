"""A summary on a terminal: rows done, tokens kept, and what that saved, modelled and measured."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.accounting.breakeven import BreakEven
from cluster.accounting.saving import Saving
from cluster.accounting.speedup import FEWEST_BLOCKS, MeasuredRatio
from cluster.console import open_console
from cluster.events import describe_events
from cluster.output.failed_rows import asked_by_default
from cluster.output.summary import Summary
from sppruner.cost import PARTS

_SHOWN = 5
# Rows of earlier schema versions were measured with caches bypassed, in shares of engine steps.
_CACHES_MEASURED = 3
# In earlier ones whole arms of blocks were timed, idle beginnings and ends included.
_STEADILY_MEASURED = 4
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_quantity(value: float, unit: str) -> str:
    """1234567, "B" → "1.23 MB"."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def format_saving(dense: float, pruned: float) -> str:
    """What is saved, in percent of dense; negative where pruning costs more."""
    return "–" if not dense else f"{100 * (dense - pruned) / dense:+.1f} %"


def render(
    summary: Summary, *, note: str | None = None, price: float | None = None
) -> RenderableType:
    """The report of a summary, in reading order. note: what was special about the attempt. price:
    of one hour of one replica, in any currency; None leaves money out."""
    parts: list[RenderableType] = [_facts(summary, note)]
    if summary.total.visual_tokens:
        parts += [Text(), _modelled(summary), Text(), _measured(summary, price)]
    return Group(*parts)


def print_report(summary: Summary, *, note: str | None = None, price: float | None = None) -> None:
    """Prints the report of a summary to stdout; see `render`."""
    open_console().print(render(summary, note=note, price=price))


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _facts(summary: Summary, note: str | None) -> Table:
    total, settings = summary.total, summary.settings
    facts = _grid()
    state = summary.state.replace("_", " ")
    facts.add_row("run", f"{summary.run_id}  {state}{f' ({note})' if note else ''}")
    dtype = f"  {summary.dtype}" if summary.dtype else ""
    facts.add_row("model", f"{settings['model']}  {settings['model_revision']}{dtype}")
    facts.add_row("pruning", _spec(summary))
    if summary.break_even is not None:
        facts.add_row("break-even", _break_even(summary.break_even))
    failed = "  ".join(f"{code} {n}" for code, n in sorted(total.failed.items()))
    facts.add_row("rows", f"{total.rows} of {summary.rows_planned} done")
    facts.add_row("failed", f"{total.rows_failed}{f'  ({failed})' if failed else ''}")
    if total.rows_failed:
        why = "their error_code and error_message say why"
        facts.add_row("", Text(f"{why}; {_how_to_ask_again(summary)}"))
    if summary.unread_bytes:
        facts.add_row(
            "unread",
            f"{summary.unread_bytes:,} bytes of damaged archives; each range is an error row",
        )
    if total.recomputed:
        facts.add_row("recomputed", f"{total.recomputed} rows took more than one attempt")
    for generation in summary.generations:
        facts.add_row(
            "asked again" if generation.number == 1 else f"{generation.number} times",
            f"{generation.asked} failed rows of {generation.units} units: {generation.mended} "
            f"mended, {generation.asked - generation.mended} failed again",
        )
    if summary.duplicate_keys:
        facts.add_row("keys", f"{summary.duplicate_keys} rows share their key with another row")
    if summary.accuracy is not None and summary.accuracy.scored:
        accuracy = summary.accuracy
        facts.add_row(
            "accuracy", f"{100 * accuracy.mean:.1f} % of {accuracy.scored} rows with references"
        )
    if summary.attempt is not None:
        attempt = summary.attempt
        busy = attempt.replica_busy_share
        facts.add_row(
            "speed",
            f"{attempt.rows} rows in {attempt.wall_seconds:.1f} s, {attempt.rows_per_second:.1f} "
            f"rows/s on {attempt.replicas} replica(s), after {attempt.start_seconds:.1f} s to start"
            + ("" if busy is None else f", busy {100 * busy:.0f} % of that time"),
        )
        happened = describe_events(attempt.events)
        if happened:
            facts.add_row("happened", happened)
    for part, reason in sorted(summary.unavailable.items()):
        facts.add_row(part, Text(f"not available: {reason}"))
    facts.add_row("output", summary.output)
    if summary.foreign:
        facts.add_row(
            "FOREIGN",
            Text(
                f"{len(summary.foreign)} objects in the output are none of this run, and readers "
                "of the prefix mix them with its rows or fail on them. End what writes them and "
                f"remove them: {', '.join(summary.foreign[:_SHOWN])}"
                + (" …" if len(summary.foreign) > _SHOWN else ""),
                style="red",
            ),
        )
    return facts


def _how_to_ask_again(summary: Summary) -> str:
    """The command that asks the failed rows again, with the codes that it asks only where they are
    named."""
    final = sorted(code for code in summary.total.failed if not asked_by_default(code))
    command = f"python jobs/retry_errors.py {summary.output}"
    codes = ",".join(final)
    if len(final) == len(summary.total.failed):
        return f"over an unchanged corpus they fail again, and {command} --codes {codes} asks them"
    return f"{command} asks them again" + (f" ({codes} only with --codes {codes})" if final else "")


def _spec(summary: Summary) -> str:
    spec = summary.settings["spec"]
    if spec["method"] == "none":
        return "none (dense)"
    budget = spec["budget"]
    kept = f"{100 * budget['ratio']:.1f} %" if "ratio" in budget else f"{budget['tokens']} tokens"
    options = "".join(f" {name}={value}" for name, value in spec["options"].items())
    return f"{spec['method']}, keeps {kept}{options}"


def _break_even(found: BreakEven) -> str:
    if found.measured is None:
        return "too few rows to measure whether pruning pays: every row ran dense"
    ratio = f"dense / pruned was {_ratio(found.measured)} before the run"
    return f"{ratio}: pruning pays" if found.pays else f"{ratio}: every row ran dense"


def _ratio(ratio: MeasuredRatio) -> str:
    interval = (
        f"95 % interval {ratio.low:.2f} – {ratio.high:.2f}"
        if ratio.low is not None and ratio.high is not None
        else f"fewer than {FEWEST_BLOCKS} blocks: no interval"
        if ratio.blocks < FEWEST_BLOCKS
        else "blocks too unequal: no interval"
    )
    blocks = f"{ratio.blocks} control block{'' if ratio.blocks == 1 else 's'}"
    return f"{ratio.ratio:.2f} × on {ratio.rows} rows in {blocks} ({interval})"


def _modelled(summary: Summary) -> Table:
    total = summary.total
    table = Table(title="modelled, from the model's config", title_justify="left")
    for column in ("", "dense", "as run", "saved"):
        table.add_column(column, justify="left" if not column else "right")
    before, kept = total.visual_tokens, total.visual_tokens_kept
    table.add_row("visual tokens", f"{before:,}", f"{kept:,}", format_saving(before, kept))
    for part in PARTS:
        dense, pruned = total.flops_dense.get(part, 0), total.flops.get(part, 0)
        table.add_row(f"{part} FLOPs", *_compared(dense, pruned, "FLOP"))
    dense, pruned = sum(total.flops_dense.values()), sum(total.flops.values())
    table.add_row("all FLOPs", *_compared(dense, pruned, "FLOP"), style="bold")
    spared = sum(total.flops_cached.values())
    if spared:
        cached = f"{format_quantity(spared, 'FLOP')} of these"
        table.add_row("spared by caches", "", cached, "")
    table.add_row("KV cache", *_compared(total.kv_bytes_dense, total.kv_bytes, "B"))
    return table


def _compared(dense: float, pruned: float, unit: str) -> tuple[str, str, str]:
    return format_quantity(dense, unit), format_quantity(pruned, unit), format_saving(dense, pruned)


def _measured(summary: Summary, price: float | None) -> RenderableType:
    total, ratio = summary.total, summary.measured
    facts = _grid()
    facts.title = "measured"
    facts.title_justify = "left"
    facts.add_row("replica time", f"{total.seconds:.2f} s for all rows as they ran")
    if (version := summary.settings["schema_version"]) < _CACHES_MEASURED:
        facts.add_row("", "an earlier version measured this run: its control rows met no caches")
    elif version < _STEADILY_MEASURED:
        facts.add_row("", "an earlier version measured this run: its ratio is too close to 1")
    if total.images_cached:
        facts.add_row(
            "caches",
            f"{total.images_cached} rows found their image encoded, {total.prefixes_cached} of "
            "them read up to the question",
        )
    if price is not None:
        facts.add_row("money", _money(summary, price))
    if ratio is None:
        facts.add_row("dense / pruned", f"not measured: {_why_not(summary)}")
    else:
        facts.add_row("dense / pruned", _ratio(ratio))
        if summary.not_measured is not None:
            facts.add_row("", summary.not_measured)
    if (saving := summary.saving) is not None:
        _add_saving(facts, saving)
    if total.control_nanoseconds:
        spent = f"{total.control_seconds:.2f} s, dense answers and warm-ups"
        facts.add_row("spent on control", spent)
    if total.blocks_spoiled and ratio is not None:
        facts.add_row("", f"{_count_of_spoiled(summary)}, no part of the ratio")
    if summary.break_even is not None and summary.break_even.seconds:
        facts.add_row("spent on break-even", f"{summary.break_even.seconds:.2f} s, before the run")
    if total.retry_nanoseconds:
        facts.add_row("spent on retries", f"{total.retry_seconds:.2f} s")
    if ratio is not None:
        facts.add_row("agreement", f"{total.agreements} of {ratio.rows} control rows, same text")
    return facts


def _add_saving(facts: Table, saving: Saving) -> None:
    """What was saved or lost, with what makes it uncertain."""
    if saving.seconds is None:
        facts.add_row("time saved", "not known: the blocks do not speak for all rows")
        for doubt in saving.doubts:
            facts.add_row("", doubt)
        return
    verb, sign = ("saved", 1) if saving.seconds >= 0 else ("lost", -1)
    text = f"{abs(saving.seconds):.2f} s estimated from that ratio"
    if saving.low is not None and saving.high is not None:
        low, high = sorted(sign * end for end in (saving.low, saving.high))
        text = f"{abs(saving.seconds):.2f} s ({low:.2f} – {high:.2f}), estimated from that ratio"
    if not saving.shown:
        text += f": not shown, it may be {'no saving' if sign > 0 else 'no loss'}"
    facts.add_row(f"time {verb}", text)


def _money(summary: Summary, price: float) -> str:
    """What the replica time cost, measuring and retries apart, and what densely would have."""
    total, saving = summary.total, summary.saving
    hourly = price / 3600
    decided = 0.0 if summary.break_even is None else summary.break_even.seconds
    beside = hourly * (total.control_seconds + total.retry_seconds + decided)
    text = f"{hourly * total.seconds:.4g} for the rows, {beside:.4g} for measuring and retries"
    if saving is not None and saving.seconds is not None:
        text += f"; saved {hourly * saving.seconds:.4g}"
        if saving.low is not None and saving.high is not None:
            text += f" ({hourly * saving.low:.4g} – {hourly * saving.high:.4g})"
    return f"{text}, at {price:g} an hour"


def _why_not(summary: Summary) -> str:
    decided = summary.break_even is not None and not summary.break_even.pays
    if decided or summary.settings["spec"]["method"] == "none":
        return "a dense run"
    reason = summary.not_measured
    if reason is None and summary.total.blocks_spoiled:
        reason = _count_of_spoiled(summary)
    return reason or "no control block is committed"


def _count_of_spoiled(summary: Summary) -> str:
    count = summary.total.blocks_spoiled
    return "1 control block was spoiled" if count == 1 else f"{count} control blocks were spoiled"
