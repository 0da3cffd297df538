"""Draw the README's plots from contracts/evidence/: speed, time between tokens, and where a step's time goes.

`python -m tools.plots [--evidence DIR] [--out DIR]`

Every number in a plot is read from the JSON files that the tools wrote; the files are named in its caption. A
plot carries a digest of what it shows, so that a test sees when the evidence has changed and it has not.
Needs matplotlib: `pip install '.[plots]'`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.environment import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EVIDENCE = Path("contracts/evidence")
SIDES = {"decode": "engine", "http_decode": "through HTTP"}
PERCENTILES = (50, 95, 99)
LEAST_SHARE = 0.01  # of a step: smaller parts are drawn as one
# what the kernels do, whose names are all that a trace has
PARTS = {
    "qkv": "q, k, v products",
    "attend_decode": "attention over the cache",
    "attn_output": "attention's output product",
    "route_row": "router",
    "route_few": "router",
    "router": "router",
    "gate_up": "experts, gate and up",
    "down": "experts, down",
    "experts": "experts, gate, up and down",
    "combine": "experts, their sum",
    "decode_row": "all layers",
    "lm_head": "output layer",
    "sample": "sampling",
}

# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, GREY, INK = "#0072B2", "#C04F00", "#B8BEC6", "#1F2328"
# colour, marker, and whether its figures stand above the line: the two lines lie on each other
STYLES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "engine": (BLUE, {"marker": "o", "markersize": 7}, True),
    "through HTTP": (
        ORANGE,
        {"marker": "D", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2, "linestyle": "--"},
        False,
    ),
}


class PlotError(Exception):
    """Evidence that does not hold what a plot shows; the message names the file."""


# --- What a plot shows, read from the evidence.


@dataclass(frozen=True)
class Row:
    """One side at one number of streams: tokens a second of all, and milliseconds by percentile."""

    side: str
    streams: int
    tok_per_s: float
    gaps_ms: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Rates:
    """What a bench found of decoding, for one length of prompts."""

    caption: str
    rows: tuple[Row, ...]

    def of(self, side: str) -> list[Row]:
        return sorted((row for row in self.rows if row.side == side), key=lambda row: row.streams)

    @property
    def sides(self) -> list[str]:
        return [side for side in SIDES.values() if self.of(side)]

    @property
    def streams(self) -> list[int]:
        return sorted({row.streams for row in self.rows})


@dataclass(frozen=True)
class Bar:
    """A part of a step in microseconds, and what reading its bytes at the copy's speed would take."""

    label: str
    microseconds: float
    floor: float | None = None


@dataclass(frozen=True)
class StepTimes:
    """Where the time of one step goes, longest part first, what lies between the parts last."""

    title: str
    caption: str
    span: float
    bars: tuple[Bar, ...]


def read_rates(document: Mapping[str, Any], file: str) -> Rates:
    """The decode rows of a bench's document that share the most usual length of prompts."""
    found = [row for row in document["results"] if row["what"] in SIDES and row["tok_per_s"]]
    if not found:
        raise PlotError(f"{file} has no row of decode")
    length = Counter(row["prompt_tokens"] for row in found).most_common(1)[0][0]
    rows = [_row(row) for row in found if row["prompt_tokens"] == length]
    env = document["env"]
    how = f"prompts of {length} tokens, {env['sampling']}, {env['new_tokens']} tokens a stream, "
    how += f"medians of {env['repeats']} runs"
    return Rates(f"{env['shape']['name']} ({env['model']}), {how}\n{_caption(env, file)}", tuple(rows))


def _row(found: Mapping[str, Any]) -> Row:
    known = {share: found.get(f"gap_ms_p{share}") for share in PERCENTILES}
    gaps = tuple((share, value) for share, value in known.items() if value is not None)
    return Row(SIDES[found["what"]], found["streams"], found["tok_per_s"], gaps)


def read_step(document: Mapping[str, Any], file: str) -> StepTimes:
    """The decode step of a trace's document."""
    steps = [one for one in document["profiles"] if one["title"].startswith("a decode step")]
    if not steps:
        raise PlotError(f"{file} has no decode step")
    span = steps[0]["span_us"]
    parts = sorted(steps[0]["parts"], key=lambda part: -part["microseconds"])
    bars = [_bar(part) for part in parts if part["microseconds"] >= LEAST_SHARE * span]
    if rest := [part["microseconds"] for part in parts[len(bars) :]]:
        bars.append(Bar(f"{len(rest)} smaller parts", fsum(rest)))
    # fsum: sum() rounds otherwise from Python 3.12 on, and the digest would be another
    between = span - fsum(part["microseconds"] for part in parts)
    if between > 0:
        bars.append(Bar("between kernels", between))
    caption = (
        f"{document['model']}, copies at {document['copy_gb_per_s']:,.0f} GB/s\n{_caption(document, file)}"
    )
    title = steps[0]["title"].replace(" of 1 streams", " of one stream")
    return StepTimes(title, caption, span, tuple(bars))


def _bar(part: Mapping[str, Any]) -> Bar:
    calls = "" if part["calls"] == 1 else f" × {part['calls']:g}"
    what = PARTS.get(part["name"])
    label = f"{part['name']}{calls}" + (f"\n{what}" if what else "")
    share = part["floor_share"]
    return Bar(label, part["microseconds"], None if share is None else share * part["microseconds"])


def _caption(env: Mapping[str, Any], file: str) -> str:
    commit = f"commit {env['commit'][:7]}{' with changes' if env['dirty'] else ''}" if env["commit"] else None
    known = [env["machine"], f"jax {env['jax']}", env.get("date", "")[:10], commit, file]
    return " · ".join(part for part in known if part)


def digest(shown: Rates | StepTimes) -> str:
    """Of everything that a plot shows."""
    return hashlib.sha256(json.dumps(asdict(shown), sort_keys=True).encode()).hexdigest()[:16]


def drawn_digest(svg: str) -> str | None:
    """The digest of what a plot showed when it was drawn."""
    found = re.search(r"digest ([0-9a-f]{16})", svg)
    return found[1] if found else None


# --- Drawing.


def draw_speed(rates: Rates) -> Figure:
    """Tokens a second of all streams together, and of each, over the number of streams."""
    figure, (together, each) = _figure(rates.caption, "Decode speed against batch size", columns=2)
    together.set_title("tokens a second, all streams together")
    _speeds(together, rates, [1] * len(rates.streams))
    together.legend(loc="upper left")
    each.set_title("tokens a second, each stream")
    _speeds(each, rates, rates.streams)
    return figure


def _speeds(axes: Axes, rates: Rates, shared_by: Sequence[int]) -> None:
    """A line a side; at each number of streams the speed is shared by so many."""
    falls = shared_by[-1] > 1
    for side in rates.sides:
        colour, marker, above = STYLES[side]
        rows = rates.of(side)
        speeds = [row.tok_per_s / shared_by[rates.streams.index(row.streams)] for row in rows]
        axes.plot([row.streams for row in rows], speeds, label=side, color=colour, linewidth=2, **marker)
        # where no line runs
        right = above == falls
        for row, speed in zip(rows, speeds, strict=True):
            offset = (12 if right else -12, 5 if above else -15)
            _note(
                axes,
                f"{speed:,.0f}",
                (row.streams, speed),
                offset,
                color=colour,
                ha="left" if right else "right",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates.streams, [str(count) for count in rates.streams])
    axes.minorticks_off()
    axes.set_xlim(rates.streams[0] / 2.5, rates.streams[-1] * 2.5)
    axes.set_xlabel("streams")
    axes.set_ylim(0, 1.12 * axes.dataLim.ymax)
    axes.yaxis.set_major_formatter("{x:,.0f}")


def _note(axes: Axes, text: str, place: tuple[float, float], offset: tuple[float, float], **how: Any) -> None:
    """A text beside a point; `offset` in points of type."""
    axes.annotate(text, place, offset, textcoords="offset points", **how)


def draw_gaps(rates: Rates) -> Figure:
    """Percentiles of the milliseconds between two tokens of a stream, over the number of streams."""
    figure, (axes,) = _figure(rates.caption, "Time between two tokens of a stream", columns=1)
    shown = sorted({share for row in rates.rows for share, _ in row.gaps_ms})
    sides = rates.sides
    for i, side in enumerate(sides):
        for row in rates.of(side):
            place = rates.streams.index(row.streams) + (i - (len(sides) - 1) / 2) * 0.36
            _range(axes, place, row, STYLES[side][0])
    _gap_legends(axes, sides, shown)
    axes.set_xticks(range(len(rates.streams)), [str(streams) for streams in rates.streams])
    axes.set_xlim(-0.6, len(rates.streams) - 0.4)
    axes.set_xlabel("streams")
    axes.set_ylabel("milliseconds")
    axes.set_ylim(0, None)
    return figure


def _gap_legends(axes: Axes, sides: Sequence[str], shares: Sequence[int]) -> None:
    """What the colours stand for, and beside it the marks."""
    from matplotlib.lines import Line2D

    colours = [
        Line2D([], [], color=STYLES[side][0], marker="s", markersize=10, linestyle="none") for side in sides
    ]
    marks = [
        Line2D([], [], color=INK, marker=_MARKS[share], markersize=8, markeredgewidth=2, linestyle="none",
               markerfacecolor=_fill(share, INK))
        for share in shares
    ]  # fmt: skip
    axes.add_artist(axes.legend(colours, sides, loc="upper left"))
    axes.legend(marks, [f"p{share}" for share in shares], loc="upper left", bbox_to_anchor=(0.2, 1))


_MARKS = {50: "o", 95: "^", 99: "_"}


def _fill(share: int, colour: str) -> str:
    return colour if share == PERCENTILES[0] else "white"


def _range(axes: Axes, place: float, row: Row, colour: str) -> None:
    values = [value for _, value in row.gaps_ms]
    axes.plot([place, place], [min(values), max(values)], color=colour, linewidth=2, zorder=1)
    for share, value in row.gaps_ms:
        axes.plot(place, value, _MARKS[share], color=colour, markersize=9, markeredgewidth=2,
                  markerfacecolor=_fill(share, colour))  # fmt: skip
    for value in (values[0], values[-1]):
        _note(axes, f"{value:.2f}", (place, value), (10, 0), va="center", color=colour)


def draw_step(step: StepTimes) -> Figure:
    """A bar for each part, the floor inside of it."""
    title = f"Where {step.title} goes: {step.span:,.0f} µs"
    figure, (axes,) = _figure(step.caption, title, columns=1, height=2.2 + 0.5 * len(step.bars))
    places = range(len(step.bars))
    times = [bar.microseconds for bar in step.bars]
    floors = [bar.floor or 0.0 for bar in step.bars]
    axes.barh(places, times, color=GREY, height=0.7, label="measured")
    axes.barh(
        places, floors, color=BLUE, height=0.7, label="its floor: the same bytes at the speed of a large copy"
    )
    for place, bar in zip(places, step.bars, strict=True):
        share = "" if bar.floor is None else f", floor {100 * bar.floor / bar.microseconds:.0f} %"
        _note(axes, f"{bar.microseconds:,.0f} µs{share}", (bar.microseconds, place), (6, 0), va="center")
    axes.set_yticks(places, [bar.label for bar in step.bars])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(times))
    axes.set_xlabel("microseconds a step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.grid(visible=False, axis="y")
    return figure


def _figure(caption: str, title: str, *, columns: int, height: float = 5.2) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, columns, figsize=(11, height), squeeze=False, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=17, fontweight="bold")
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=10)
    return figure, list(grid[0])


RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 13,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "grid.color": "#E3E6EA",
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxmoe",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Plot:
    """A plot: the file of the evidence that it shows, how that is read, and how it is drawn."""

    source: str
    read: Callable[[Mapping[str, Any], str], Any]
    draw: Callable[[Any], Figure]


PLOTS = {
    "speed.svg": Plot("h200/bench.json", read_rates, draw_speed),
    "gaps.svg": Plot("h200/bench.json", read_rates, draw_gaps),
    "step.svg": Plot("h200/trace-30b.json", read_step, draw_step),
    "step-8.svg": Plot("h200/trace-30b-8.json", read_step, draw_step),
}


def read_shown(plot: Plot, evidence: Path) -> Rates | StepTimes:
    """What a plot is to show; raises PlotError."""
    name = (EVIDENCE / plot.source).as_posix()
    try:
        return plot.read(json.loads((evidence / plot.source).read_text("utf-8")), name)
    except FileNotFoundError:
        raise PlotError(f"{name} is not there") from None


def draw(plot: Plot, shown: Rates | StepTimes, path: Path) -> None:
    """Draw into an SVG file, or another format that its name says."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(RC):
        figure = plot.draw(shown)
        # without a date and a version the same plot is the same file
        said = {"Date": None, "Creator": None, "Description": f"digest {digest(shown)}"}
        figure.savefig(path, metadata=said if path.suffix == ".svg" else None, dpi=100)
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.plots", description=__doc__.splitlines()[0])
    parser.add_argument("--evidence", type=Path, default=ROOT / EVIDENCE, metavar="DIR")
    parser.add_argument("--out", type=Path, help="by default plots/ in the evidence", metavar="DIR")
    asked = parser.parse_args(argv)
    out: Path = asked.out or asked.evidence / "plots"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, plot in PLOTS.items():
            draw(plot, read_shown(plot, asked.evidence), out / name)
            print(out / name)
    except (PlotError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
