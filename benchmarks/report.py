"""How is a run shown? rows.jsonl, table.md, a plot for each suite, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import growth, rows, targets
from benchmarks.rows import Row
from benchmarks.suites import SUITES
from lora_fn import FileError

CAVEATS = (
    "Times are of this machine under the load named below; compare programs within a case, by the minimum of "
    "interleaved rounds, and take differences below 3 % for none.",
    "What is counted has no rounds: it is the same each time. What writes files has fewer rounds than a step.",
    "Before it is timed, each program's loss and gradients are compared with plain autograd in float64, on the same "
    "weights and without dropout, whose masks differ between programs: with dropout nothing is compared here.",
    "A program without an adapter has other gradients: those of the input, and of the weights in full fine-tuning, are "
    "compared with plain autograd in float64, too.",
    "Peak memory on the CPU is the growth of the process's resident set in a step.",
    "The frozen model's gradient goes through to its input, as in every layer but the first.",
    "Full fine-tuning trains the same linear layers; its step has no optimizer, nor has that of any other.",
    "What was not measured says so. The harness was published without a run on a Neuron device.",
)
STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --none: #808080 }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.number, th.number { text-align: right; white-space: nowrap }
.met { color: var(--good); font-weight: 600 } .not-met { color: var(--bad); font-weight: 600 }
.not-measured { color: var(--none) }
img { max-width: 100%; background: white; border-radius: 6px; margin: .6rem 0 }
.headline { font-size: 1.15rem } nav { margin: 1.2rem 0; font-size: .87rem; line-height: 1.9 }
tr:hover td { background: #8881 }
details { margin: .6rem 0 } summary { cursor: pointer }
"""


def prepare(directory: Path) -> None:
    """Make a directory with a file for rows in it, before anything is measured that could not be written or drawn.

    Raises:
        FileError: Nothing can be written there, or there is nothing to draw with.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise FileError("matplotlib: is not installed, and draws the plots; pip install 'lora-fn[plot]'.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        rows.write(directory / rows.FILE, [])
    except OSError as error:
        raise FileError(f"--output {directory}: takes no files ({error.strerror}); name another directory.") from error


def write(directory: Path, found: Sequence[Row], environment: Mapping[str, str]) -> None:
    """All of the files, into a directory that `prepare` made."""
    rows.write(directory / rows.FILE, found)
    with (directory / rows.FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"environment": dict(environment)}) + "\n")
    (directory / "table.md").write_text(table(found, environment), encoding="utf-8")
    plots = plot(directory, found)
    (directory / "report.html").write_text(page(found, environment, plots), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- numbers

SCALES = {"s": (1e3, "ms"), "bytes": (1 / 1e6, "MB"), "FLOPs": (1e-9, "GFLOP")}
SCALES |= {"bytes/s": (1e-9, "GB/s"), "FLOP/s": (1e-9, "GFLOP/s")}


def number(value: float | None, unit: str) -> str:
    """With its unit."""
    if value is None:
        return rows.NOT_MEASURED
    scale, short = SCALES.get(unit, (1.0, "" if unit == "x" else unit))
    text = f"{value:.0f}" if short == unit and float(value).is_integer() else f"{value * scale:.4g}"
    return f"{text} {short}".strip()


def against_frozen(found: Iterable[Row]) -> dict[Row, float]:
    """Rows of a metric that the frozen model has too, over its."""
    found = list(found)
    base = {(r.suite, r.case, r.metric): r.minimum for r in found if r.program == "frozen" and r.minimum}
    return {
        r: r.minimum / base[r.suite, r.case, r.metric]
        for r in found
        if r.minimum is not None and (r.suite, r.case, r.metric) in base
    }


VERDICTS = ("verdict", "suite", "what", "at most", "found at most", "in")
NUMBERS = ("at most", "found at most", "minimum", "median", "spread", "rounds", "x frozen")
HEAD = ("case", "program", "metric", "minimum", "median", "spread", "rounds", "x frozen", "note")


def verdicts(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each target."""
    lines = []
    for one in targets.judge(found):
        target = one.target
        noise = f" (+{target.noise:.0%} noise)" if target.noise else ""
        worst = "-" if one.worst is None else f"{one.worst:.3g}"
        where = f"{one.case} (of {one.cases})" if one.case else "-"
        lines.append((one.verdict, target.suite, target.what, f"{target.limit:g}{noise}", worst, where))
    return lines


def lines_of(suite: str, found: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each row of a suite."""
    ratios, lines = against_frozen(found), []
    for row in found:
        if row.suite != suite:
            continue
        ratio = f"{ratios[row]:.3f}" if row in ratios else "-"
        spread = number(row.spread, row.unit) if row.rounds else "-"
        median = number(row.median, row.unit) if row.rounds else "-"
        rounds = str(row.rounds) if row.rounds else "-"
        numbers = (number(row.minimum, row.unit), median, spread, rounds, ratio)
        lines.append((row.case, row.program, row.metric, *numbers, row.note))
    return lines


# ----------------------------------------------------------------------------------------------------- Markdown


def table(found: Sequence[Row], environment: Mapping[str, str]) -> str:
    """All of it in Markdown."""
    parts = ["# Benchmarks", "## Targets", _markdown(VERDICTS, verdicts(found))]
    for name in _suites(found):
        parts += [f"## {name}: {SUITES[name].title}", _markdown(HEAD, lines_of(name, found))]
    parts += ["## Environment", _markdown(("", ""), list(environment.items()))]
    parts += ["## Caveats", "\n".join(f"- {caveat}" for caveat in CAVEATS)]
    return "\n\n".join(parts) + "\n"


def aligned(lines: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines whose columns stand below each other.

    Args:
        lines: Of as many cells each.
        right: The columns whose cells end below each other.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(_padded(line, widths, right)).rstrip() for line in lines]


def _padded(line: Sequence[str], widths: Sequence[int], right: Collection[int]) -> list[str]:
    return [
        cell.rjust(w) if at in right else cell.ljust(w) for at, (cell, w) in enumerate(zip(line, widths, strict=True))
    ]


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns stand below each other, but for the last, whose cells may be long."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in (head, *lines)]
    right = {at for at, name in enumerate(head) if name in NUMBERS}
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    widths[-1] = min(widths[-1], 40)
    rule = ["-" * (w - 1) + ":" if at in right else "-" * w for at, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(_padded(line, widths, right))} |" for line in (cells[0], rule, *cells[1:]))


def _suites(found: Sequence[Row]) -> list[str]:
    return [name for name in SUITES if any(row.suite == name for row in found)]


# -------------------------------------------------------------------------------------------------------- plots

COLOURS = {
    "frozen": "#9aa0a6",
    "ours": "#1f6feb",
    "PEFT": "#d1495b",
    "PEFT, no autocast": "#e79aa5",
    "ours, recompute": "#79a8f5",
}
OTHERS = ("#edae49", "#66a182", "#8d6a9f")


LINES = (("B14", growth.OPERATIONS),)  # what is drawn over the number in the case


def plot(directory: Path, found: Sequence[Row]) -> dict[str, bytes]:
    """{suite: PNG}, each written too: a panel for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios, made = against_frozen(found), dict[str, bytes]()
    for suite in _suites(found):
        panels = dict[tuple[str, str], list[Row]]()
        for row in found:
            if row.suite == suite and row.minimum is not None and math.isfinite(row.minimum):
                what = row.case.partition(" ")[0] if (suite, row.metric) in LINES else ""
                panels.setdefault((row.metric, what), []).append(row)
        if not panels:
            continue
        shown = {key: [r for r in of if r in ratios] or of for key, of in panels.items()}
        heights = [_height(what, of) for (_, what), of in shown.items()]
        figure, axes = pyplot.subplots(
            len(panels), 1, figsize=(10, sum(heights) + 0.8), height_ratios=heights, squeeze=False, layout="constrained"
        )
        programs = list(dict.fromkeys(r.program for of in shown.values() for r in of))
        colours = dict(zip([p for p in programs if p not in COLOURS], OTHERS * 9, strict=False)) | COLOURS
        for ((metric, what), of), place in zip(shown.items(), axes[:, 0], strict=True):
            if what:
                _lines(place, of, what, colours)
            else:
                _bars(place, of, ratios, colours)
            place.set_title(metric, loc="left", fontsize=9)
            place.spines[["top", "right"]].set_visible(False)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[p]) for p in programs]
        figure.legend(handles, programs, loc="outside lower center", ncols=min(4, len(programs)), frameon=False)
        path = directory / f"{suite}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        made[suite] = path.read_bytes()
    return made


def _height(what: str, of: Sequence[Row]) -> float:
    """Inches."""
    return 2.6 if what else 0.8 + 0.2 * len(of) + 0.16 * len({r.case for r in of})


def _bars(axes: Any, of: Sequence[Row], ratios: Mapping[Row, float], colours: Mapping[str, str]) -> None:
    """One for each row: its minimum, over the frozen model's where there is one."""
    compared, unit = of[0] in ratios, of[0].unit
    scale, short = (1.0, "") if compared else SCALES.get(unit, (1.0, unit))
    place, ticks = 0.0, list[tuple[float, str]]()
    for case in dict.fromkeys(r.case for r in of):
        group = [r for r in of if r.case == case]
        for at, row in enumerate(group):
            value = ratios[row] if compared else float(row.minimum or 0) * scale
            axes.barh(place + at, value, color=colours[row.program], height=0.85)
            axes.annotate(f" {value:.3g}", (value, place + at), va="center", fontsize=7)
        ticks.append((place + (len(group) - 1) / 2, case))
        place += len(group) + 0.8
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(bar.get_width() for bar in axes.patches) or 1)
    axes.tick_params(axis="x", labelsize=7)
    if compared:
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("x the frozen model; shorter is better" if compared else short.replace("x", "ratio"), fontsize=7)


def _lines(axes: Any, of: Sequence[Row], what: str, colours: Mapping[str, str]) -> None:
    """One for each program, over what grows."""
    for program in dict.fromkeys(r.program for r in of):
        points = sorted((int(r.case.split(" ")[1]), r.minimum) for r in of if r.program == program)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colours[program])
    axes.set_xlabel(what, fontsize=8)
    axes.set_xticks(sorted({int(r.case.split(" ")[1]) for r in of}))
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)


# --------------------------------------------------------------------------------------------------------- HTML


def page(found: Sequence[Row], environment: Mapping[str, str], plots: Mapping[str, bytes]) -> str:
    """One file, with the plots in it."""
    body = ["<h1>What an adapter costs</h1>", f'<p class="headline">{_summary(found)}</p>', "<h2>Targets</h2>"]
    contents = [f'<a href="#{name}">{name} {html.escape(SUITES[name].title)}</a>' for name in _suites(found)]
    body += [_table(VERDICTS, verdicts(found)), f"<nav>{' · '.join(contents)}</nav>"]
    for name in _suites(found):
        body.append(f"<h2 id={name}>{name}: {html.escape(SUITES[name].title)}</h2>")
        if name in plots:
            data = base64.b64encode(plots[name]).decode("ascii")
            body.append(f'<img alt="bars of {name}" src="data:image/png;base64,{data}">')
        rows_of = _table(HEAD, lines_of(name, found))
        body.append(f"<details{'' if name in plots else ' open'}><summary>all numbers</summary>{rows_of}</details>")
    body += ["<h2>Environment</h2>", _table(("", ""), list(environment.items()))]
    body += ["<h2>Caveats</h2>", "<ul>", *(f"<li>{html.escape(caveat)}</li>" for caveat in CAVEATS), "</ul>"]
    head = f'<meta charset="utf-8"><title>Benchmarks of lora-fn</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _summary(found: Sequence[Row]) -> str:
    said = [one.verdict for one in targets.judge(found)]
    kinds = (targets.MET, targets.NOT_MET, rows.NOT_MEASURED)
    counts = [f'<span class="{kind.replace(" ", "-")}">{said.count(kind)} {kind}</span>' for kind in kinds]
    return f"Of {len(said)} targets {', '.join(counts)}."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, text: str) -> str:
        kind = text.replace(" ", "-") if text in (targets.MET, targets.NOT_MET, rows.NOT_MEASURED) else ""
        kind = kind or ("not-measured" if text.startswith(rows.NOT_MEASURED) else "")
        kind = kind or ("number" if text[:1].isdigit() and len(text) < 12 else "")
        return f'<{tag} class="{kind}">{html.escape(text)}</{tag}>' if kind else f"<{tag}>{html.escape(text)}</{tag}>"

    made = ["<tr>" + "".join(cell("th", text) for text in head) + "</tr>"]
    made += ["<tr>" + "".join(cell("td", text) for text in line) + "</tr>" for line in lines]
    return "<table>\n" + "\n".join(made) + "\n</table>"
