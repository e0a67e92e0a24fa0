"""Plot of accuracy against kept tokens, one panel per model, with 95 % bands. Methods that prune
inside the decoder are marked "(inside)", since their first layers process more tokens than the axis
shows. Needs matplotlib, the extra `evaluate`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sppruner.errors import EvaluationError
from sppruner.evaluation.tables import method_of

# Okabe and Ito's colours, distinct for most readers; beyond seven methods the line style differs.
_COLOURS = "#D55E00 #0072B2 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split()
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vPX"


def check_plot() -> None:
    """Raises EvaluationError without matplotlib, before anything is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError("--plot needs matplotlib: pip install 'sppruner[evaluate]'")


def plot(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes a plot of the records; the suffix (.png, .pdf, .svg) selects the format."""
    check_plot()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(record["model"] for record in records))
    figure = Figure(figsize=(1.6 + 4.6 * len(models), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    methods = list(
        dict.fromkeys(method_of(record) for record in records if record["method"] != "none")
    )
    for panel, model in zip(panels, models, strict=True):
        _panel(panel, model, [record for record in records if record["model"] == model], methods)
    panels[0].set_ylabel(f"{records[0]['metric']}, %")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=200)


def _panel(
    panel: Any, model: str, records: Sequence[Mapping[str, Any]], methods: Sequence[str]
) -> None:
    panel.set_title(model)
    panel.set_xscale("log")
    for record in records:
        if record["method"] == "none":
            panel.axhline(100 * record["accuracy"], color="0.35", lw=1, label="dense")
            panel.axhspan(100 * record["low"], 100 * record["high"], color="0.35", alpha=0.12, lw=0)
    shares: set[float] = set()
    shade = 0.15 if len(methods) <= 6 else 0.05  # many overlapping bands hide the lines
    for number, method in enumerate(methods):
        points = sorted(
            (record for record in records if method_of(record) == method),
            key=lambda record: record["kept_share"],
        )
        kept = [100 * record["kept_share"] for record in points]
        shares.update(round(share, 1) for share in kept)
        # A budget spent inside the decoder leaves more tokens to the layers before.
        inside = any(record["kept_layers"] > record["kept_share"] + 0.01 for record in points)
        colour = _COLOURS[number % len(_COLOURS)]
        panel.plot(
            kept,
            [100 * record["accuracy"] for record in points],
            color=colour,
            linestyle=_STYLES[number // len(_COLOURS) % len(_STYLES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            lw=1.5,
            label=f"{method} (inside)" if inside else method,
        )
        low, high = ([100 * record[end] for record in points] for end in ("low", "high"))
        panel.fill_between(kept, low, high, color=colour, alpha=shade, lw=0)
    panel.set_xticks(sorted(shares), [f"{share:g}" for share in sorted(shares)])
    panel.minorticks_off()
    panel.set_xlabel("visual tokens kept, %")
    panel.grid(color="0.92", lw=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
