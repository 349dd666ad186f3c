"""How is a run shown? rows.jsonl, table.md, a plot for each suite, and one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import rows, targets
from benchmarks.rows import Row
from benchmarks.suites import SUITES

CAVEATS = (
    "Times are of this machine under the load named below; compare programs within a case, by the minimum of "
    "interleaved rounds, and take differences below 3 % for none.",
    "Before it is timed, each program's loss and gradients are compared with plain autograd in float64, on the same "
    "weights and without dropout, whose masks differ between programs: with dropout nothing is compared here.",
    "A program without an adapter has other gradients: frozen and full fine-tuning are compared with each other.",
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
details { margin: .6rem 0 } summary { cursor: pointer }
"""


def write(directory: Path, found: Sequence[Row], environment: Mapping[str, str]) -> None:
    """All of the files, into a directory that is made."""
    directory.mkdir(parents=True, exist_ok=True)
    rows.write(directory / "rows.jsonl", found)
    with (directory / "rows.jsonl").open("a", encoding="utf-8") as file:
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


VERDICTS = ("suite", "what", "at most", "found at most", "in", "verdict")
HEAD = ("case", "program", "metric", "minimum", "median", "spread", "x frozen", "note")


def verdicts(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each target."""
    lines = []
    for one in targets.judge(found):
        target = one.target
        noise = f" (+{target.noise:.0%} noise)" if target.noise else ""
        limit = target.told if target.limit is None else f"{target.limit:g}{noise}"
        worst = "-" if one.worst is None else f"{one.worst:.3g}"
        where = f"{one.case} (of {one.cases})" if one.case else "-"
        lines.append((target.suite, target.what, limit, worst, where, one.verdict))
    return lines


def lines_of(suite: str, found: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each row of a suite."""
    ratios, lines = against_frozen(found), []
    for row in found:
        if row.suite != suite:
            continue
        ratio = f"{ratios[row]:.3f}" if row in ratios else "-"
        spread = number(row.spread, row.unit) if row.rounds else "-"
        numbers = (number(row.minimum, row.unit), number(row.median, row.unit), spread, ratio)
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


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, lines)])


def _suites(found: Sequence[Row]) -> list[str]:
    return [name for name in SUITES if any(row.suite == name for row in found)]


# -------------------------------------------------------------------------------------------------------- plots

COLOURS = {"frozen": "#9aa0a6", "ours": "#1f6feb", "PEFT": "#d1495b", "PEFT, no autocast": "#e79aa5"}
OTHERS = ("#edae49", "#66a182", "#8d6a9f")


def plot(directory: Path, found: Sequence[Row]) -> dict[str, bytes]:
    """{suite: PNG}, each written too: bars of every program, over the frozen model's where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ratios, made = against_frozen(found), dict[str, bytes]()
    for suite in _suites(found):
        chosen = [r for r in found if r.suite == suite and r.minimum is not None]
        compared = [r for r in chosen if r in ratios]
        values = {r: ratios[r] for r in compared} if compared else {r: float(r.minimum or 0) for r in chosen}
        if not values:
            continue
        programs = list(dict.fromkeys(r.program for r in values))
        colours = dict(zip([p for p in programs if p not in COLOURS], OTHERS * 9, strict=False)) | COLOURS
        height = 1.2 + 0.22 * len(values) + 0.2 * len({(r.case, r.metric) for r in values})
        figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
        place, ticks = 0.0, list[tuple[float, str]]()
        for case, metric in dict.fromkeys((r.case, r.metric) for r in values):
            group = [r for r in values if (r.case, r.metric) == (case, metric)]
            for at, row in enumerate(group):
                axes.barh(place + at, values[row], color=colours[row.program], height=0.85)
                axes.annotate(f" {values[row]:.3g}", (values[row], place + at), va="center", fontsize=7)
            ticks.append((place + (len(group) - 1) / 2, f"{case}\n{metric}"))
            place += len(group) + 0.8
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
        axes.invert_yaxis()
        if compared:
            axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel("minimum, over the frozen model's" if compared else "minimum")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{suite}: {SUITES[suite].title}", loc="left", fontsize=10)
        handles = [pyplot.Rectangle((0, 0), 1, 1, color=colours[p]) for p in programs]
        figure.legend(handles, programs, loc="outside lower center", ncols=len(programs), fontsize=7, frameon=False)
        path = directory / f"{suite}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        made[suite] = path.read_bytes()
    return made


# --------------------------------------------------------------------------------------------------------- HTML


def page(found: Sequence[Row], environment: Mapping[str, str], plots: Mapping[str, bytes]) -> str:
    """One file, with the plots in it."""
    body = ["<h1>What an adapter costs</h1>", f"<p>{html.escape(_summary(found))}</p>", "<h2>Targets</h2>"]
    body.append(_table(VERDICTS, verdicts(found)))
    for name in _suites(found):
        body.append(f"<h2>{name}: {html.escape(SUITES[name].title)}</h2>")
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
    return f"Of {len(said)} targets: " + ", ".join(f"{said.count(kind)} {kind}" for kind in kinds) + "."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cell(tag: str, text: str) -> str:
        kind = text.replace(" ", "-") if text in (targets.MET, targets.NOT_MET, rows.NOT_MEASURED) else ""
        kind = kind or ("number" if text[:1].isdigit() and len(text) < 12 else "")
        return f'<{tag} class="{kind}">{html.escape(text)}</{tag}>' if kind else f"<{tag}>{html.escape(text)}</{tag}>"

    made = ["<tr>" + "".join(cell("th", text) for text in head) + "</tr>"]
    made += ["<tr>" + "".join(cell("td", text) for text in line) + "</tr>" for line in lines]
    return "<table>\n" + "\n".join(made) + "\n</table>"
