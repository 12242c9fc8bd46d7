"""One self-contained HTML page about a run: what it did, what it reached, how it got there.

    python tools/report.py runs/demo                      # writes runs/demo/report.html
    python tools/report.py runs/demo -o page.html
    python tools/report.py runs/demo --svg figure3.svg    # the paper's Figure 3 for this run, as an image file

Reads metrics.jsonl and config.yaml of the run directory, and evaluation.json where there is one. The page holds its
charts, style and the few lines of script for tooltips; it loads nothing, and works without script. Exit status: 0, or 2
with one line about what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from charts import DARK, LIGHT, Chart, Phase, Series, Track, draw, draw_standalone, variables

from megatron_amd import __version__
from megatron_amd.errors import InputError

_PHASES = {"warmup": "warm-up", "critic": "critic", "main": "main"}
_DISTANCES = {"tv": "Total variation", "kl": "KL(teacher ‖ student)"}
_STATES = {"off": "teacher states", "on": "student states"}


@dataclass(frozen=True)
class Run:
    """What a run directory says."""

    directory: Path
    config: Mapping[str, Any]
    config_text: str
    phases: Mapping[str, list[Mapping[str, float | None]]]
    """phase -> one record an iteration, in order."""
    evaluations: Sequence[Mapping[str, Any]]

    @property
    def track(self) -> Track:
        """The x axis of all phases that have begun."""
        positions, phases, start = [], [], 0.0
        for name, records in self.phases.items():
            if records:
                positions += [start + (record["iteration"] or 0) for record in records]
                phases.append(Phase(_PHASES[name], start))
                start = positions[-1]
        return Track(np.array(positions), tuple(phases))

    def metric(self, name: str) -> np.ndarray:
        """float [iterations of all phases]: NaN where the metric is absent or null."""
        return _numbers([record.get(name) for records in self.phases.values() for record in records])

    def evaluation(self, when: str) -> Mapping[str, Any] | None:
        """The last evaluation `before` or `after` the main phase."""
        return next((e for e in reversed(self.evaluations) if e.get("when") == when), None)


def read_run(directory: str | Path) -> Run:
    """Read a run directory.

    Raises:
        InputError: the directory or one of its files is missing, unreadable or holds nothing to show.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a directory; give the run.directory of a run")
    config_text = _read(folder / "config.yaml")
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.yaml'}: is not a YAML mapping; give the config that the run wrote")
    evaluations: Any = []
    if (folder / "evaluation.json").exists():
        try:
            evaluations = json.loads(_read(folder / "evaluation.json"))
        except ValueError:
            evaluations = None
        if not isinstance(evaluations, list) or not all(_is_evaluation(e) for e in evaluations):
            raise InputError(f"{folder / 'evaluation.json'}: is not a JSON list of evaluations; delete it to go on")
    return Run(folder, config, config_text, _read_metrics(folder / "metrics.jsonl"), evaluations)


def _is_evaluation(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("iteration"), int)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the run.directory of a run") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give the run.directory of a run") from None


def _read_metrics(path: Path) -> dict[str, list[Mapping[str, float | None]]]:
    """The records of metrics.jsonl by phase; lines of one iteration are merged, evaluations alone are left out."""
    merged: dict[str, dict[int, dict[str, float | None]]] = {phase: {} for phase in _PHASES}
    for number, line in enumerate(_read(path).splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # still being written, or cut by a kill
        try:
            record = json.loads(line)
            numbers = {name: _number(value) for name, value in record.items() if name != "phase"}
            merged[record["phase"]].setdefault(record["iteration"], {}).update(numbers)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path}, line {number}: is not a record of a run; delete the line") from None
    phases: dict[str, list[Mapping[str, float | None]]] = {
        phase: [record for _, record in sorted(records.items()) if not _is_evaluation_alone(record)]
        for phase, records in merged.items()
    }
    if not any(phases.values()):
        raise InputError(f"{path}: holds no iteration yet; wait until the run has logged one")
    return phases


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _is_evaluation_alone(record: Mapping[str, Any]) -> bool:
    return all(name.startswith("evaluation/") for name in record if name != "iteration")


# ---------------------------------------------------------------------------------------------------- charts


def figure3(run: Run) -> list[Chart]:
    """d_MM under its bound on teacher states and on student states; empty for a run without a critic."""
    charts = [
        Chart(
            f"{policy} d_MM",
            _STATES[side],
            [
                Series("d_MM", run.metric(f"amm/d_mm_{side}"), side),
                Series("bound 2c·TV", run.metric(f"amm/tv_bound_{side}"), side, dashed=True),
            ],
            shade=True,
        )
        for side, policy in (("off", "Off-policy"), ("on", "On-policy"))
    ]
    return [chart for chart in charts if chart.drawable().any()]


def sections(run: Run) -> dict[str, list[Chart]]:
    """Heading -> the charts below it, those without a number left out."""

    def both(name: str, title: str, unit: str, **options: Any) -> Chart:
        return Chart(title, unit, [Series(_STATES[s], run.metric(f"{name}_{s}"), s) for s in _STATES], **options)

    def roles(name: str, title: str, unit: str, **options: Any) -> Chart:
        series = [
            Series("student", run.metric(f"student/{name}"), "on"),
            Series("critic", run.metric(f"critic/{name}"), "c2"),
        ]
        return Chart(title, unit, series, **options)

    def one(name: str, title: str, unit: str, **options: Any) -> Chart:
        return Chart(title, unit, [Series(title.lower(), run.metric(name), "c1")], **options)

    entropies = [
        Series(f"{role}, {side}", run.metric(f"distance/entropy_{role}_{side}"), side, dashed=role == "teacher")
        for side in _STATES
        for role in ("student", "teacher")
    ]
    gains = [
        Series(f"{when}, {side}", run.metric(f"amm/{name}_{side}"), side, dashed=when == "after")
        for side in _STATES
        for when, name in (("before", "d_mm"), ("after", "d_mm_trained"))
    ]
    critic_range = [
        Series("largest", run.metric("critic/f_max"), "c2"),
        Series("smallest", run.metric("critic/f_min"), "c1"),
    ]
    not_taken = [
        Series("student waits (0 or 1)", run.metric("train/waiting"), "c4"),
        Series("student skipped", run.metric("train/skipped_student_steps"), "on"),
        Series("critic skipped", run.metric("train/skipped_critic_steps"), "c2"),
    ]
    charts = {
        "The game": [
            both("amm/tightness", "Tightness", "d_MM / 2c·TV", include=(0.0, 1.0), rule=1.0),
            Chart("What the critic steps gain", "d_MM of a batch before and after them", gains),
            Chart("Critic range", "over states and vocabulary", critic_range, include=(-1.0, 1.0), rule=0.0),
            roles("loss", "Loss", "as each player sees it"),
        ],
        "Distances": [
            both("distance/tv", "Total variation", "per token"),
            both("distance/kl", "KL(teacher ‖ student)", "nats per token"),
            both("distance/rkl", "KL(student ‖ teacher)", "nats per token"),
            both("distance/js", "Jensen–Shannon", "nats per token"),
            both("distance/top1_agreement", "Same likeliest token", "share of states"),
            both("distance/teacher_mass", "Teacher's probability of the written token", "per token"),
            Chart("Entropy", "nats per token", entropies),
        ],
        "Optimisation": [
            roles("grad_norm", "Gradient norm", "before clipping", log=True),
            roles("learning_rate", "Learning rate", "", smoothed=False),
            Chart("Steps not taken", "skips are counted from the start", not_taken, smoothed=False),
        ],
        "Rollouts": [
            both("rollout/response_length", "Response length", "tokens"),
            both("rollout/eos_fraction", "Responses that end", "share", include=(0.0, 1.0)),
        ],
        "Cost": [
            Chart("Time of an iteration", "seconds", _time_series(run), stacked=True),
            one("throughput/tokens_per_second", "Speed", "response tokens per second"),
            one("memory/peak_gib", "Peak memory", "GiB, worst rank", smoothed=False),
        ],
    }
    if not any(np.nansum(series.values) for series in not_taken):
        charts["Optimisation"].pop()
    kept = {heading: [chart for chart in group if chart.drawable().any()] for heading, group in charts.items()}
    return {heading: group for heading, group in kept.items() if group}


def _time_series(run: Run) -> list[Series]:
    parts = {"rollout": "off", "hidden": "c1", "critic": "c2", "student": "on"}
    series = [Series(name, run.metric(f"time/{name}"), colour) for name, colour in parts.items()]
    known = np.sum([np.nan_to_num(s.values) for s in series], axis=0)
    rest = Series("other", np.maximum(run.metric("time/iteration") - known, 0.0), "c4")
    return [*series, rest]


def write_figure3(run: Run, path: Path) -> None:
    """Write Figure 3 as an SVG file.

    Raises:
        InputError: the run has no critic, or the file cannot be written.
    """
    charts = figure3(run)
    if not charts:
        raise InputError(
            f"{run.directory}: has no amm/d_mm metrics to draw; --svg needs a run with objective.name: amm"
        )
    heading = f"Moment-matching distance · {_title(run)}"
    _write(path, draw_standalone(charts, run.track, heading=heading, width=1040, height=400))


# ------------------------------------------------------------------------------------------------------ page


def page(run: Run) -> str:
    """The whole report as HTML."""
    title = escape(_title(run))
    figure = figure3(run)
    parts = [
        f'<header><h1>{title}</h1><p class="sub">{escape(_subtitle(run))}</p></header>',
        _tiles(run),
        _table(run),
    ]
    if figure:
        caption = (
            "Solid: the moment-matching distance that the critic finds. Dashed: the most that any critic could find, "
            "2c·TV. The shaded gap is what the critic misses; the student lowers both. Faint: unsmoothed."
        )
        drawn = "".join(draw(figure, run.track, width=540, height=340))
        parts.append(
            '<section><h2>Moment-matching distance</h2><figure class="card">'
            f'<div class="grid">{drawn}</div><figcaption>{caption}</figcaption></figure></section>'
        )
    for heading, group in sections(run).items():
        parts.append(_section(heading, [(chart, run.track) for chart in group]))
    parts.append(_held_out(run))
    parts += [_samples(run), _config(run), f"<footer>{escape(_versions())}</footer>"]
    html = Path(__file__).with_name("report_page.html").read_text(encoding="utf-8")
    html = html.replace("/*light*/", variables(LIGHT)).replace("/*dark*/", variables(DARK))
    return html.replace("<!--title-->", title).replace("<!--body-->", "".join(parts))


def _section(heading: str, charts: Sequence[tuple[Chart, Track]]) -> str:
    drawn = [draw([chart], track, width=540, height=290)[0] for chart, track in charts]
    cards = "".join(f'<figure class="card">{svg}</figure>' for svg in drawn)
    return f'<section><h2>{heading}</h2><div class="grid">{cards}</div></section>'


def _held_out(run: Run) -> str:
    """Curves of the evaluations, where there were some between the first and the last."""
    points = {0 if e.get("when") == "before" else e["iteration"]: e for e in run.evaluations}
    evaluations = [points[iteration] for iteration in sorted(points)]
    if len(evaluations) < 3:
        return ""
    track = Track(np.array(sorted(points), dtype=float))
    charts = []
    for key, distance in _DISTANCES.items():
        numbers = {side: [e.get(f"{key}_{side}") for e in evaluations] for side in _STATES}
        series = [Series(_STATES[side], _numbers(numbers[side]), side) for side in _STATES]
        charts.append((Chart(distance, "held-out prompts, per token", series, smoothed=False), track))
    return _section("Held-out distances", [(chart, track) for chart, track in charts if chart.drawable().any()])


def _numbers(values: Sequence[Any]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _title(run: Run) -> str:
    return f"{_model_name(run.config.get('teacher'))} → {_model_name(run.config.get('student'))}"


def _model_name(model: Any) -> str:
    model = model or {}
    architecture = model.get("architecture") or {}
    if architecture:
        family = architecture.get("model_type", "model")
        layers = architecture.get("num_hidden_layers") or architecture.get("n_layer")
        return f"{family} from scratch" + (f", {layers} layers" if layers else "")
    name = Path(model.get("path") or "unnamed").name
    layers = (model.get("init") or {}).get("layers")
    return f"{len(layers)} layers of {name}" if layers else name


def _subtitle(run: Run) -> str:
    objective = run.config.get("objective") or {}
    name = str(objective.get("name", "?"))
    parts = [{"amm": "Adversarial moment matching"}.get(name, name.upper()), f"β = {objective.get('beta')}"]
    if name == "amm":
        parts += [f"γ = {objective.get('gamma')}", f"K = {objective.get('critic_steps')}"]
        parts.append(f"critic on {(run.config.get('critic') or {}).get('features')} features")
    warmup = run.config.get("warmup") or {}
    if run.phases["warmup"]:
        parts.append(f"after a warm-up with {str(warmup.get('name', '?')).upper()}")
    return " · ".join(parts)


def _tiles(run: Run) -> str:
    tiles = []
    begun = {_PHASES[name]: len(records) for name, records in run.phases.items() if records}
    counts = " + ".join(str(count) for count in begun.values())
    split = " + ".join(begun) if len(begun) > 1 or "main" not in begun else ""
    tiles.append((counts, "iteration" if counts == "1" else "iterations", split))
    tightness = [_late_mean(run.metric(f"amm/tightness_{side}")) for side in _STATES]
    if any(math.isfinite(t) for t in tightness):
        values = " / ".join("–" if math.isnan(t) else f"{t:.2f}" for t in tightness)
        tiles.append((values, "tightness at the end", "teacher / student states"))
    seconds = np.nansum(run.metric("time/iteration"))
    if seconds > 0:
        tiles.append((_duration(seconds), "in iterations", "without evaluations"))
    speed = run.metric("throughput/tokens_per_second")
    if np.isfinite(speed).any():
        tiles.append((f"{np.nanmedian(speed):,.0f}", "tokens per second", "median"))
    memory = run.metric("memory/peak_gib")
    if np.isfinite(memory).any():
        tiles.append((f"{np.nanmax(memory):.2f} GiB", "peak memory", "worst rank"))
    cells = "".join(
        f'<div class="tile"><b>{value}</b><span>{name}{f"<i>{note}</i>" if note else ""}</span></div>'
        for value, name, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _late_mean(values: np.ndarray) -> float:
    """Mean of the last tenth of the finite numbers."""
    finite = values[np.isfinite(values)]
    return float(finite[-max(1, len(finite) // 10) :].mean()) if len(finite) else math.nan


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _table(run: Run) -> str:
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is None and after is None:
        return '<p class="note">This run has no evaluation on held-out prompts (evaluation.prompts).</p>'
    rows = []
    for side, states in _STATES.items():
        for key, distance in _DISTANCES.items():
            old, new = ((e or {}).get(f"{key}_{side}") for e in (before, after))
            rows.append(
                f"<tr><th>{distance}</th><td class='states {side}'>{states}</td><td>{_cell(old)}</td>"
                f"<td class='new'>{_cell(new)}</td>{_change(old, new)}</tr>"
            )
    prompts = (after or before or {}).get("prompts")
    count = f"{prompts} held-out prompts" if prompts else "held-out prompts"
    return (
        '<section><h2>Before and after</h2><div class="card scroll"><table>'
        f"<thead><tr><th>{escape(count)}, mean per token</th><th></th>"
        "<th>before</th><th>after</th><th>change</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) and math.isfinite(value) else "–"


def _change(old: Any, new: Any) -> str:
    if _cell(old) == "–" or _cell(new) == "–" or old == 0:
        return "<td>–</td>"
    change = (new - old) / old
    kind, arrow = ("better", "▼") if change < 0 else ("worse", "▲")
    return f'<td class="{kind}">{arrow} {abs(change):.1%}</td>' if change else "<td>0.0%</td>"


def _samples(run: Run) -> str:
    before, after = ((run.evaluation(when) or {}).get("samples") or [] for when in ("before", "after"))
    earlier = {sample.get("prompt"): sample for sample in before}
    later = {sample.get("prompt"): sample for sample in after}
    cards = []
    for prompt in {**earlier, **later}:
        old, new = earlier.get(prompt, {}), later.get(prompt, {})
        answers = (
            ("Teacher", new.get("teacher", old.get("teacher"))),
            ("Student before", old.get("student")),
            ("Student after", new.get("student")),
        )
        columns = "".join(f"<div><h4>{who}</h4>{_answer(text)}</div>" for who, text in answers)
        cards.append(
            f'<article class="card"><p class="prompt">{escape(str(prompt))}</p>'
            f'<div class="answers">{columns}</div></article>'
        )
    return f"<section><h2>Sample answers</h2>{''.join(cards)}</section>" if cards else ""


def _answer(text: Any) -> str:
    if text is None:
        return '<p class="empty">not sampled</p>'
    return f"<p>{escape(str(text))}</p>" if str(text).strip() else '<p class="empty">(empty)</p>'


def _config(run: Run) -> str:
    return (
        "<section><details class='card'><summary>Resolved configuration</summary>"
        f"<pre>{escape(run.config_text)}</pre></details></section>"
    )


def _versions() -> str:
    names = [f"Python {sys.version.split()[0]}"]
    for package in ("torch", "megatron-core", "transformers"):
        try:
            names.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Made by megatron_amd {__version__}, on a machine with {', '.join(names)}."


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); choose another file with -o or --svg"
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN_DIR", help="the run.directory of a run")
    parser.add_argument("-o", "--output", metavar="FILE", help="the page; by default RUN_DIR/report.html")
    parser.add_argument("--svg", metavar="FILE", help="write only Figure 3, as an SVG image")
    options = parser.parse_args(arguments)
    try:
        run = read_run(options.run)
        if options.svg:
            path = Path(options.svg)
            write_figure3(run, path)
        else:
            path = Path(options.output or run.directory / "report.html")
            _write(path, page(run))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
