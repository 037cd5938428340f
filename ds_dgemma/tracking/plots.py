"""Curves of one or more runs as a picture: diffusion loss, AR loss, gradient norm and learning rate by step.

The faint line is every step as measured, the strong one a Gaussian average around each step, its deviation
1 % of the run. Circles are validation records. T counts records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ds_dgemma.errors import UserError
from ds_dgemma.tracking.metrics import Record, read_lines

COLOURS = ("#1f6feb", "#e36209", "#2da44e", "#a371f7", "#d1242f", "#8c6d1f", "#0f8b8d", "#57606a")
SMOOTHING_SHARE = 0.01
LOG_SCALE_RATIO = 20
PANELS = [
    ("loss_diffusion", "Diffusion loss", "nats per token"),
    ("loss_ar", "AR loss", "nats per token"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("lr", "Learning rate", ""),
]


@dataclass(frozen=True)
class Curve:
    """One metric of one kind of record: values by step, NaN where it was not finite."""

    steps_T: np.ndarray
    values_T: np.ndarray


def plot_runs(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Draw the runs over one another; return the PNG's path (default: `plots/curves.png` in the first)."""
    records = [_read(run) for run in runs]
    names = _names(runs)
    figure = Figure(figsize=(12, 7.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory: no display, and pyplot's global state is left alone
    for axes, (key, title, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name, run, colour in zip(names, records, _colours(len(runs)), strict=True):
            _draw(axes, run, key, colour, name)
        _dress(axes, title, unit)
    _head(figure, names, records)
    out = out or runs[0] / "plots" / "curves.png"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="png")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}. Name another file with --out.") from error
    return out


def smooth(values_T: np.ndarray, deviation: float) -> np.ndarray:
    """Gaussian average around each value, at the ends over what there is; a NaN does not count or spread."""
    radius = min(int(3 * deviation), (len(values_T) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    finite = np.isfinite(values_T)
    total = np.convolve(np.where(finite, values_T, 0.0), kernel, mode="same")
    weight = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values_T), np.nan), where=weight > 0)


def _read(run: Path) -> list[Record]:
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist. Name a run directory (run.dir of its config).")
    records = [record for _, record in read_lines(path)]
    steps = [record for record in records if "kind" not in record]
    if not steps:
        raise UserError(f"{path} has no step yet. Plot again when the run has done one.")
    for record in steps:
        for key, _, _ in PANELS:
            if not isinstance(record.get(key), int | float):
                found = f"{key} {record.get(key)!r}"
                raise UserError(f"{path}: step {record['step']} has {found}, a number is expected. No run writes that.")
    return records


def _names(runs: Sequence[Path]) -> list[str]:
    """Name runs by their directories, or by whole paths where two would be called the same."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _curve(records: list[Record], key: str, kind: str | None) -> Curve:
    chosen = [record for record in records if record.get("kind") == kind and key in record]
    return Curve(
        np.array([float(record["step"]) for record in chosen]),
        np.array([float(record[key]) if np.isfinite(float(record[key])) else np.nan for record in chosen]),
    )


def _draw(axes: Axes, records: list[Record], key: str, colour: str, name: str) -> None:
    measured = _curve(records, key, kind=None)
    validation = _curve(records, key, kind="validation")
    if key == "lr":  # set, not measured: nothing to smooth
        axes.plot(measured.steps_T, measured.values_T, color=colour, linewidth=1.8, label=name)
        return
    average = smooth(measured.values_T, deviation=max(1.0, SMOOTHING_SHARE * len(measured.values_T)))
    axes.plot(measured.steps_T, measured.values_T, color=colour, alpha=0.22, linewidth=0.8)
    axes.plot(measured.steps_T, average, color=colour, linewidth=1.8, label=name)
    if len(validation.steps_T):
        axes.plot(validation.steps_T, validation.values_T, "o", color=colour, ms=4.5, mfc="white")


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


def _head(figure: Figure, names: list[str], records: list[list[Record]]) -> None:
    if len(names) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
        return
    last = [record for record in records[0] if "kind" not in record][-1]
    losses = f"diffusion {last['loss_diffusion']:.4f}    AR {last['loss_ar']:.4f}"
    figure.suptitle(f"{names[0]}    step {last['step']}    {losses}", fontsize=13)
