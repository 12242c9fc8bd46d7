"""The report page: whatever a run directory lacks, the page is whole, self-contained and safe; errors are one line."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from megatron_amd.config import config_to_yaml, load_config

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))  # the tools are scripts: their imports are relative to their own folder

import charts  # noqa: E402
import report  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
NASTY = '<script>alert("1")</script> & <b>'


def record(phase: str, iteration: int, *, amm: bool, value: float | None = 0.5) -> dict:
    names = ["distance/tv_off", "distance/kl_off", "distance/tv_on", "student/loss", "student/grad_norm"]
    names += ["time/rollout", "time/iteration", "memory/peak_gib", "throughput/tokens_per_second"]
    if amm:
        names += ["amm/d_mm_off", "amm/d_mm_on", "amm/tv_bound_off", "amm/tv_bound_on", "amm/tightness_off"]
        names += ["critic/f_min", "critic/f_max", "time/critic"]
    numbers = dict.fromkeys(names, value if value is None else value + iteration / 100)
    seconds = {name: number and abs(number) for name, number in numbers.items() if name.startswith("time/")}
    return {"phase": phase, "iteration": iteration, **numbers, **seconds}


def evaluation(when: str, iteration: int, tv: float) -> dict:
    sample = {"prompt": f"Hello {NASTY}", "teacher": NASTY, "student": f"answer {when}"}
    distances = {"tv_off": tv, "tv_on": tv, "kl_off": 2 * tv, "kl_on": None}
    return {"when": when, "phase": "main", "iteration": iteration, **distances, "prompts": 64, "samples": [sample]}


BEFORE_AFTER = [evaluation("before", 0, 0.5), evaluation("after", 30, 0.4)]
WARMUP = [record("warmup", i, amm=False) for i in range(1, 21)]
CRITIC = [record("critic", i, amm=True) for i in range(1, 11)]
MAIN = [record("main", i, amm=True) for i in range(1, 31)]
RUNS = {
    "whole": (WARMUP + MAIN, BEFORE_AFTER),
    "with critic-only steps": (WARMUP + CRITIC + MAIN, BEFORE_AFTER),
    "no warm-up": (MAIN, BEFORE_AFTER),
    "warm-up only": (WARMUP, BEFORE_AFTER[:1]),
    "no evaluation": (WARMUP + MAIN, None),
    "empty evaluation": (MAIN, []),
    "no critic": ([record("main", i, amm=False) for i in range(1, 31)], BEFORE_AFTER),
    "one iteration": (MAIN[:1], None),
    "one of each": (WARMUP[:1] + MAIN[:1], BEFORE_AFTER),
    "a hole": ([*MAIN[:5], record("main", 6, amm=True, value=None), *MAIN[6:]], None),
    "nothing but null": ([record("main", i, amm=True, value=None) for i in (1, 2)], None),
    "nothing but zero": ([record("main", 0, amm=True, value=0.0)], None),
    "negative": ([record("main", i, amm=True, value=-0.7) for i in range(1, 30)], None),
    "long": ([record("main", i, amm=True) for i in range(1, 1501)], None),
    "several evaluations": (MAIN, [*BEFORE_AFTER, *(evaluation("step", i, 0.45) for i in (10, 20, 30))]),
}


def make_run(folder: Path, records: list[dict], evaluations: list[dict] | None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    overrides = ["teacher.path=models/big", "student.path=models/big", "student.init.layers=[0,2]"]
    (folder / "config.yaml").write_text(config_to_yaml(load_config(None, overrides)))
    if evaluations is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluations))
    return folder


class Outline(HTMLParser):
    """Checks that elements nest, and keeps the tags, attributes and headings."""

    VOID = ("meta", "link", "img", "br", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.headings: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_whole_and_self_contained(tmp_path, name):
    page = report.page(report.read_run(make_run(tmp_path, *RUNS[name])))
    outline = Outline(page)
    assert outline.tags.count("script") == 1  # ours, and none from a generation
    assert not {"link", "img", "iframe", "object"} & set(outline.tags)
    assert not [value for key, value in outline.attributes if key in ("src", "href")]
    assert "url(" not in page
    assert "@import" not in page
    assert "/*light*/" not in page
    assert "<!--" not in page
    assert ("Moment-matching distance" in outline.headings) == (
        name not in ("no critic", "warm-up only", "nothing but null")
    )
    assert ("Before and after" in outline.headings) == bool(RUNS[name][1])


@pytest.mark.parametrize("name", RUNS)
def test_every_mark_lies_inside_its_chart(tmp_path, name):
    page = report.page(report.read_run(make_run(tmp_path, *RUNS[name])))
    for svg in re.findall(r"<svg.*?</svg>", page):
        root = ElementTree.fromstring(svg)  # raises where the SVG is not well formed
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        for path in root.iter(f"{SVG}path"):
            points = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"])
            assert len(points) == len(re.findall("[ML]", path.attrib["d"]))
            assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in points)


def test_generations_are_escaped(tmp_path):
    page = report.page(report.read_run(make_run(tmp_path, *RUNS["whole"])))
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &lt;b&gt;" in page
    assert "answer before" in page
    assert "answer after" in page


def test_the_table_shows_the_relative_change(tmp_path):
    page = report.page(report.read_run(make_run(tmp_path, *RUNS["whole"])))
    rows = re.findall(r"<tr>(.*?)</tr>", page)[1:]
    cells = [re.sub(r"<[^>]+>", "|", row).strip("|").split("||") for row in rows]
    assert cells[0] == ["Total variation", "teacher states", "0.5000", "0.4000", "▼ 20.0%"]
    assert cells[3] == ["KL(teacher ‖ student)", "student states", "–", "–", "–"]


def test_title_and_objective(tmp_path):
    page = report.page(report.read_run(make_run(tmp_path, *RUNS["whole"])))
    assert "<h1>big → 2 layers of big</h1>" in page
    assert "Adversarial moment matching · β = 0.5 · γ = 1.0 · K = 1" in page


def test_tooltips_hold_the_numbers(tmp_path):
    run = report.read_run(make_run(tmp_path, *RUNS["a hole"]))
    [svg, _] = charts.draw(report.figure3(run), run.track, width=540, height=300)
    tips = json.loads(ElementTree.fromstring(svg).find(f"{SVG}g").attrib["data-tips"])
    assert tips["x"] == list(range(1, 31))
    assert tips["series"][0]["values"][4:7] == ["0.55", None, "0.57"]


def positions(svg: str) -> list[float]:
    return json.loads(ElementTree.fromstring(svg).find(f"{SVG}g").attrib["data-tips"])["x"]


def names_of_phases(svg: str) -> list[str]:
    texts = [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    return [text for text in texts if text in ("warm-up", "critic", "main")]


def test_phases_follow_each_other_and_are_set_apart(tmp_path):
    run = report.read_run(make_run(tmp_path, *RUNS["with critic-only steps"]))
    distances = report.sections(run)["Distances"][:1]
    [drawn] = charts.draw(distances, run.track, width=540, height=300)
    assert positions(drawn) == list(range(1, 61))
    assert names_of_phases(drawn) == ["warm-up", "critic", "main"]
    breaks = [path.attrib["d"].count("M") for path in ElementTree.fromstring(drawn).iter(f"{SVG}path")]
    assert sum(breaks) > 2 * 3  # no curve runs from one phase into the next
    for figure in charts.draw(report.figure3(run), run.track, width=540, height=300):
        assert positions(figure) == list(range(1, 41))  # there is no d_MM in the warm-up
        assert names_of_phases(figure) == ["critic", "main"]


def test_a_single_phase_counts_from_one_without_a_rule(tmp_path):
    run = report.read_run(make_run(tmp_path, *RUNS["whole"]))
    for figure in charts.draw(report.figure3(run), run.track, width=540, height=300):
        assert positions(figure) == list(range(1, 31))
        assert names_of_phases(figure) == []


def test_an_evaluation_on_its_own_line_is_no_iteration(tmp_path):
    records = [{"phase": "main", "iteration": 0, "evaluation/tv_off": 0.5}, *MAIN]
    assert report.read_run(make_run(tmp_path, records, None)).track.x.tolist() == list(range(1, 31))


def test_a_half_written_last_line_is_ignored(tmp_path):
    folder = make_run(tmp_path, MAIN, None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "main", "iter')
    assert len(report.read_run(folder).track.x) == 30


def test_figure_3_alone(tmp_path, capsys):
    folder = make_run(tmp_path, *RUNS["whole"])
    assert report.main([str(folder), "--svg", str(tmp_path / "images" / "figure3.svg")]) == 0
    root = ElementTree.parse(tmp_path / "images" / "figure3.svg").getroot()
    assert len(root.findall(f"{SVG}g")) == 2
    used = set(re.findall(r"var\(--(\w+)\)", ElementTree.tostring(root, encoding="unicode")))
    defined = set(re.findall(r"--(\w+):", root.find(f"{SVG}style").text))
    assert used <= defined  # it carries its own colours
    assert root.find(f"{SVG}rect").attrib["fill"] == "var(--card)"  # and its own background
    assert capsys.readouterr().out.strip().endswith("figure3.svg")


def break_nothing(folder: Path) -> None:
    """For errors that come from the arguments."""


ERRORS = {
    "no directory": (lambda f: [str(f / "nowhere")], break_nothing, "is not a directory"),
    "no metrics": (lambda f: [str(f)], lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl: cannot be read"),
    "no config": (lambda f: [str(f)], lambda f: (f / "config.yaml").unlink(), "config.yaml: cannot be read"),
    "empty metrics": (lambda f: [str(f)], lambda f: (f / "metrics.jsonl").write_text(""), "holds no iteration yet"),
    "bad metrics": (
        lambda f: [str(f)],
        lambda f: (f / "metrics.jsonl").write_text('{"phase": "main", "iteration": 1, "a/b": "x"}\n'),
        "metrics.jsonl, line 1: is not a record",
    ),
    "bad config": (lambda f: [str(f)], lambda f: (f / "config.yaml").write_text("a: [b"), "is not a YAML mapping"),
    "bad evaluation": (lambda f: [str(f)], lambda f: (f / "evaluation.json").write_text("{"), "is not a JSON list"),
    "not text": (lambda f: [str(f)], lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\n"), "is not UTF-8 text"),
    "no room": (lambda f: [str(f), "-o", str(f / "config.yaml" / "x")], break_nothing, "cannot be written"),
    "no critic": (
        lambda f: [str(f), "--svg", str(f / "x.svg")],
        lambda f: make_run(f, *RUNS["no critic"]),
        "has no amm/d_mm metrics",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_one_line(tmp_path, capsys, name):
    arguments, damage, message = ERRORS[name]
    make_run(tmp_path, *RUNS["whole"])
    damage(tmp_path)
    assert report.main(arguments(tmp_path)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1


@pytest.mark.e2e
def test_command_line(tmp_path):
    folder = make_run(tmp_path, *RUNS["whole"])
    done = subprocess.run(
        [sys.executable, str(TOOLS / "report.py"), str(folder)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOLS.parent)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(folder / "report.html")
    assert (folder / "report.html").stat().st_size < 500_000


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 43.7, [0, 10, 20, 30, 40, 50]),
        (-0.3, 0.9, [-0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]),
        (0, 9.3e-5, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (3, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_nice_ticks(low, high, expected):
    assert charts.nice_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (-1.25, "-1.25"), (1234.5, "1234"), (123456, "123,456"), (2e-5, "2e-5"), (0.0005, "5e-4")],
)
def test_number_text(value, text):
    assert charts.number_text(value) == text


def test_smoothing_keeps_means_and_leaves_holes_out():
    flat = np.array([2.0] * 10 + [math.nan] + [2.0] * 10)
    assert charts.smooth(flat, 2.0) == pytest.approx(np.full(21, 2.0))  # a single hole is bridged
    missing = np.concatenate([np.full(20, math.nan), np.full(20, 3.0)])
    smoothed = charts.smooth(missing, 2.0)
    assert np.isnan(smoothed[:19]).all()  # a long one stays
    assert smoothed[21:] == pytest.approx(np.full(19, 3.0))
    noise = np.random.default_rng(0).normal(size=400)
    assert charts.smooth(noise, 4.0).std() < 0.5 * noise.std()


def test_long_runs_are_averaged_within_their_phase():
    track = charts.Track(np.arange(1.0, 1501.0), (charts.Phase("warm-up", 0.0), charts.Phase("main", 100.0)))
    values = np.where(track.x <= 100, 1.0, 5.0)
    short, [chart] = track.shortened([charts.Chart("", "", [charts.Series("", values, "off")])])
    assert short.bin_size == 3
    assert len(short.x) == 34 + 467
    assert set(chart.series[0].values) == {1.0, 5.0}  # no bin mixes the two
