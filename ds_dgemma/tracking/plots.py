"""Curves of one or more runs as a picture: losses, also by noise level, gradient norm, learning rate, speed, and what
answers were worth.

The faint line is every step as measured, the strong one a Gaussian average around each step, its deviation 1 % of the
run. Circles are validation and evaluation records. A panel of which no run has a record is left out. T counts records.
"""

import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ds_dgemma.config.recorded import METRICS
from ds_dgemma.errors import UserError
from ds_dgemma.tracking.metrics import Record, read_lines

COLOURS = ("#1f6feb", "#e36209", "#2da44e", "#a371f7", "#d1242f", "#8c6d1f", "#0f8b8d", "#57606a")
DASHES, MARKS = ("-", "--", ":", "-."), ("o", "s", "^", "v", "D")  # of lines with names, beside other runs'
SMOOTHING_SHARE = 0.01
LOG_SCALE_RATIO = 20
NEEDED = ("loss_diffusion", "loss_ar", "grad_norm", "lr")  # of every step
BY_LEVEL, MANNER = "loss_diffusion_at_", ("length_to_reference", "steps_per_canvas", "tokens_per_forward")


@dataclass(frozen=True)
class Curve:
    """One metric of one kind of record: values by step, NaN where it was not finite."""

    steps_T: np.ndarray
    values_T: np.ndarray


@dataclass(frozen=True)
class Line:
    """A curve in a panel."""

    curve: Curve
    name: str = ""  # beside the run's
    smoothed: bool = False
    points: bool = False  # few and far between


@dataclass(frozen=True)
class Panel:
    """What is drawn of a run."""

    title: str
    unit: str
    lines: Callable[[list[Record]], list[Line]]


def step_lines(key: str, smoothed: bool = True) -> Callable[[list[Record]], list[Line]]:
    """Every step's value, and validation's of the same name."""

    def lines(records: list[Record]) -> list[Line]:
        validated = Line(_curve(records, key, "validation"), points=True)
        return [Line(_curve(records, key, None), smoothed=smoothed), validated]

    return lines


def level_lines(records: list[Record]) -> list[Line]:
    """Validation's diffusion loss, for each noise level."""
    keys = sorted({key for record in records for key in record if key.startswith(BY_LEVEL)})
    return [Line(_curve(records, key, "validation"), f"t = {key.removeprefix(BY_LEVEL)}", points=True) for key in keys]


def answer_lines(records: list[Record]) -> list[Line]:
    """Shares of a task, the share of answers that stop, and validation's share of right tokens."""
    answered = [record for record in records if record.get("kind") == "evaluation"]
    keys = dict.fromkeys(key for record in answered for key, value in record.items() if isinstance(value, float))
    shares = [key for key in keys if key not in MANNER]
    lines = [Line(_curve(records, key, "evaluation"), key.replace("_", " "), points=True) for key in shares]
    return [*lines, Line(_curve(records, "accuracy", "validation"), "tokens denoised right", points=True)]


PANELS = [
    Panel("Diffusion loss", "nats per token", step_lines("loss_diffusion")),
    Panel("AR loss", "nats per token", step_lines("loss_ar")),
    Panel("Gradient norm", "before clipping", step_lines("grad_norm")),
    Panel("Learning rate", "", step_lines("lr", smoothed=False)),
    Panel("Diffusion loss by noise level", "nats per token", level_lines),
    Panel("Answers", "", answer_lines),
    Panel("Throughput", "tokens per second", step_lines("tokens_per_second")),
    Panel("Model FLOPs utilisation", "", step_lines("mfu")),
]


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs over one another; return the path, PNG or HTML (default: `plots/curves.png` in the first)."""
    records, names = [_read(run) for run in runs], _names(runs)
    out = out or runs[0] / "plots" / "curves.png"
    if out.suffix not in (".png", ".html"):
        raise UserError(f"--out {out}: a file that ends in .png or .html was expected.")
    figure = draw(names, records)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            figure.savefig(out, format="png")
        else:
            out.write_text(_page(figure, names, records), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}. Name another file with --out.") from error
    return out


def draw(names: Sequence[str], records: Sequence[list[Record]]) -> Figure:
    """A panel for each kind of curve that a run has."""
    shown = [panel for panel in PANELS if any(len(line.curve.steps_T) for run in records for line in panel.lines(run))]
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(12, 3.75 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, and pyplot's global state is left alone
    places = figure.subplots(rows, 2, squeeze=False).flat
    for axes, panel in zip(places, shown, strict=False):
        lines = [panel.lines(run) for run in records]
        named = list(dict.fromkeys(line.name for of_run in lines for line in of_run if line.name and _is_there(line)))
        for name, of_run, colour in zip(names, lines, _colours(len(names)), strict=True):
            _draw(axes, of_run, colour, name, named, alone=len(names) == 1)
        if named:
            _tell_lines(axes, named, alone=len(names) == 1)
        _dress(axes, panel.title, panel.unit)
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_axis_off()
    _head(figure, list(names), list(records))
    return figure


def smooth(values_T: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian average around each value, at the ends over what there is; a NaN does not count or spread."""
    radius = min(int(3 * deviation), (len(values_T) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    finite = np.isfinite(values_T)
    total = np.convolve(np.where(finite, values_T, 0.0), kernel, mode="same")
    weight = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values_T), np.nan), where=weight > 0)


def _read(run: Path) -> list[Record]:
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"{path} does not exist. Name a run directory (run.dir of its config).")
    records = [record for _, record in read_lines(path)]
    steps = [record for record in records if "kind" not in record]
    if not steps:
        raise UserError(f"{path} has no step yet. Plot again when the run has done one.")
    for record in steps:
        for key in NEEDED:
            if not isinstance(record.get(key), int | float):
                found = f"{key} {record.get(key)!r}"
                raise UserError(f"{path}: step {record['step']} has {found}, a number is expected. No run writes that.")
    return records


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their directories, or by whole paths where two would be called the same."""
    short = [run.resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run) for run in runs]
    # matplotlib takes $ for mathematics, and hides what begins with _
    return [name.replace("$", r"\$").lstrip("_") or name for name in names]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(records: Sequence[Record], key: str, kind: str | None) -> Curve:
    chosen = [record for record in records if record.get("kind") == kind and record.get(key) is not None]
    return Curve(
        np.array([float(record["step"]) for record in chosen]),
        np.array([float(record[key]) if np.isfinite(float(record[key])) else np.nan for record in chosen]),
    )


def _is_there(line: Line) -> bool:
    return len(line.curve.steps_T) > 0


def _style(number: int, of: int, alone: bool) -> dict[str, Any]:
    """Of a line with a name: a colour of its own, or, beside other runs, its dashes and marks."""
    if alone:
        return {"color": colormaps["viridis"](0.9 * number / max(of - 1, 1)), "marker": "o", "linestyle": "-"}
    return {"marker": MARKS[number % len(MARKS)], "linestyle": DASHES[number % len(DASHES)]}


def _draw(axes: Axes, lines: list[Line], colour: str, name: str, named: list[str], alone: bool) -> None:
    """A run's lines; `named` are the names of lines in this panel, of any run."""
    for line in filter(_is_there, lines):
        steps, values = line.curve.steps_T, line.curve.values_T
        label = None if line.points else name
        if line.name:
            own = {"color": colour, **_style(named.index(line.name), len(named), alone)}
            axes.plot(steps, values, ms=4, lw=1.3, mfc="white", **own)
        elif line.points:
            axes.plot(steps, values, "o", color=colour, ms=4, mfc="white")
        elif line.smoothed:
            average = smooth(values, deviation=max(1.0, SMOOTHING_SHARE * len(values)))
            axes.plot(steps, values, color=colour, alpha=0.22, linewidth=0.8)
            axes.plot(steps, average, color=colour, linewidth=1.8, label=label)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.8, label=label)


def _tell_lines(axes: Axes, named: list[str], alone: bool) -> None:
    """What the lines of a panel are, whatever their run."""
    styles = [{"color": "#57606a", **_style(number, len(named), alone)} for number in range(len(named))]
    handles = [Line2D([], [], ms=4, lw=1.3, mfc="white", **style) for style in styles]
    axes.legend(handles, named, fontsize=8, frameon=False)


def _dress(axes: Axes, title: str, unit: str) -> None:
    """Title, axes and grid; a measured curve (one with a unit) that falls far is drawn on a log scale."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    values = values[np.isfinite(values)]
    if unit and len(values) and 0 < LOG_SCALE_RATIO * values.min() < values.max():
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_ylabel(unit, color="#57606a")
    axes.set_xlabel("step", color="#57606a")
    axes.grid(color="#d0d7de", linewidth=0.6, alpha=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c959f")
    axes.tick_params(colors="#57606a", which="both")
    axes.margins(x=0.01)


def _last(records: list[Record]) -> Record:
    """Of the newest step."""
    return [record for record in records if "kind" not in record][-1]


def _head(figure: Figure, names: list[str], records: list[list[Record]]) -> None:
    if len(names) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return
    last = _last(records[0])
    losses = f"diffusion {last['loss_diffusion']:.4f}    AR {last['loss_ar']:.4f}"
    figure.suptitle(f"{names[0]}    step {last['step']}    {losses}", fontsize=13)


def _page(figure: Figure, names: list[str], records: list[list[Record]]) -> str:
    """One file that needs no other: the picture as SVG, and the last values of every run."""
    picture = io.StringIO()
    figure.savefig(picture, format="svg")
    keys = ("step", "loss", *NEEDED, "tokens_per_second")
    rows = []
    for name, run in zip(names, records, strict=True):
        last = _last(run)
        cells = [f"{last[key]:.6g}" if isinstance(last.get(key), int | float) else "" for key in keys]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells)))
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in ("run", *keys))
    table = f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
    style = (
        "body{font-family:sans-serif;max-width:75em;margin:auto} svg{width:100%;height:auto} td,th{padding:.2em .8em}"
    )
    svg = picture.getvalue()
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(", ".join(names))}</title><style>{style}</style>'
        f"{svg[svg.index('<svg') :]}{table}\n"
    )
