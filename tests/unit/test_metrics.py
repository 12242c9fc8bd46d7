"""MetricLog: the files survive kills, resumes and full disks; the line fits its terminal; every name is documented."""

import fcntl
import io
import json
import math
import os
import pty
import re
import select
import struct
import termios
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_amd.errors import InputError
from megatron_amd.training.metrics import METRICS, MetricLog, Timers, peak_memory_gib
from megatron_amd.training.progress import ResponsesLine

ITERATIONS = {"warmup": 3, "main": 4}
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
AMM = {
    "amm/d_mm_off": 24.3,
    "amm/d_mm_on": 20.9,
    "amm/tightness_off": 0.912,
    "amm/tightness_on": 0.881,
    "distance/kl_off": 1.372,
    "throughput/tokens_per_second": 1234.0,
    "time/iteration": 2.0,
}


@pytest.fixture
def open_log():
    """Opens logs of the toy run and closes them at the end of the test."""
    logs = []

    def open_one(directory: Path, **options) -> MetricLog:
        logs.append(MetricLog(directory, **{"iterations": ITERATIONS, "stream": io.StringIO(), **options}))
        return logs[-1]

    yield open_one
    for log in logs:
        log.close()


def run_from(log: MetricLog, start: tuple[str, int] = ("warmup", 0), stop: tuple[str, int] = ("main", 4)) -> MetricLog:
    """Log every iteration after `start` up to `stop`, with an evaluation before the main phase."""
    phases = list(ITERATIONS)
    for phase in phases:
        for iteration in range(0 if phase == "main" else 1, ITERATIONS[phase] + 1):
            place = (phases.index(phase), iteration)
            if (phases.index(start[0]), start[1]) < place <= (phases.index(stop[0]), stop[1]):
                name = "evaluation/tv_off" if iteration == 0 else "distance/tv_off"
                log.write(phase, iteration, {name: place[0] + iteration / 7})
    return log


def records(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    [tag] = [tag for tag in events.Tags()["tensors"] + events.Tags()["scalars"] if tag == name]
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_docs_list_exactly_the_metrics():
    documented = re.findall(r"^\|(.*?)\|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    names = [name for cell in documented for name in re.findall(r"`([a-z]+/[a-z0-9_]+)`", cell)]
    assert sorted(names) == sorted(METRICS)


def test_descriptions_are_one_filled_in_line():
    for name, description in METRICS.items():
        assert description.strip(), name
        assert not set(description) & set("{}\n"), name


def test_lines_are_sorted_valid_json_with_null_for_non_finite(tmp_path, open_log):
    log = open_log(tmp_path)
    log.write("main", 1, {"student/loss": math.nan, "critic/loss": -math.inf, "amm/d_mm_on": 0.1})
    text = (tmp_path / "metrics.jsonl").read_text()  # before close: the line has left the process
    expected = '{"phase": "main", "iteration": 1, "amm/d_mm_on": 0.1, "critic/loss": null, "student/loss": null}\n'
    assert text == expected


@pytest.mark.parametrize("enabled", [True, False])
def test_unknown_names_and_phases_are_refused_on_every_rank(tmp_path, enabled, open_log):
    log = open_log(tmp_path, enabled=enabled)
    with pytest.raises(ValueError, match="distance/hellinger"):
        log.write("main", 1, {"distance/hellinger": 1.0})
    with pytest.raises(ValueError, match="'training'"):
        log.write("training", 1, {})


def test_other_ranks_write_nothing(tmp_path, open_log):
    log = run_from(open_log(tmp_path / "run", enabled=False))
    log.message("hello")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_one_axis_for_both_phases(tmp_path, open_log):
    run_from(open_log(tmp_path)).close()
    assert [step for step, _ in scalars(tmp_path, "distance/tv_off")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in scalars(tmp_path, "evaluation/tv_off")] == [3]


def test_log_interval_thins_tensorboard_and_the_line_but_not_the_file(tmp_path, open_log):
    stream = io.StringIO()
    run_from(open_log(tmp_path, log_interval=2, stream=stream)).close()
    assert len(records(tmp_path)) == 8
    assert [step for step, _ in scalars(tmp_path, "distance/tv_off")] == [2, 3, 5, 7]  # 3 ends the warm-up
    assert [step for step, _ in scalars(tmp_path, "evaluation/tv_off")] == [3]
    shown = [line.split("|")[0].split() for line in stream.getvalue().splitlines()]
    assert shown == [["warmup", "2/3"], ["warmup", "3/3"], ["main", "2/4"], ["main", "4/4"]]


@pytest.mark.parametrize("checkpoint", [("warmup", 2), ("warmup", 3), ("main", 0), ("main", 2), ("main", 4)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, checkpoint, open_log):
    run_from(open_log(tmp_path / "whole")).close()
    run_from(open_log(tmp_path / "cut")).close()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "main", "itera')  # the kill came in the middle of a line
    run_from(open_log(tmp_path / "cut", resume_at=checkpoint), start=checkpoint).close()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert scalars(tmp_path / "cut", "distance/tv_off") == scalars(tmp_path / "whole", "distance/tv_off")


def test_an_evaluation_made_again_after_a_resume_is_written_once(tmp_path, open_log):
    """The checkpoint was written before the evaluation, and the process killed after it."""
    log = run_from(open_log(tmp_path), stop=("main", 2))
    log.write("main", 2, {"evaluation/tv_on": 0.5})
    log.close()
    resumed = open_log(tmp_path, resume_at=("main", 2))
    resumed.write("main", 2, {"evaluation/tv_on": 0.5})
    run_from(resumed, start=("main", 2)).close()
    evaluations = [r for r in records(tmp_path) if "evaluation/tv_on" in r]
    assert [(r["phase"], r["iteration"]) for r in evaluations] == [("main", 2)]
    assert [r["iteration"] for r in records(tmp_path)][-4:] == [2, 2, 3, 4]


def test_an_evaluation_before_the_checkpoint_stays(tmp_path, open_log):
    log = run_from(open_log(tmp_path), stop=("main", 2))
    log.write("main", 2, {"evaluation/tv_on": 0.5})
    log.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    resumed = open_log(tmp_path, resume_at=("main", 2))
    resumed.write("main", 3, {"evaluation/tv_on": 0.4})
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)


def test_resuming_at_the_checkpoint_drops_what_came_later(tmp_path, open_log):
    run_from(open_log(tmp_path)).close()
    open_log(tmp_path, resume_at=("main", 1)).close()
    assert (records(tmp_path)[-1]["phase"], records(tmp_path)[-1]["iteration"]) == ("main", 1)
    assert scalars(tmp_path, "distance/tv_off")[-1][0] == 4


def test_a_run_without_checkpoint_starts_a_new_log(tmp_path, open_log):
    run_from(open_log(tmp_path)).close()
    log = open_log(tmp_path)
    log.write("warmup", 1, {"distance/tv_off": 0.25})
    log.close()
    assert len(records(tmp_path)) == 1
    assert scalars(tmp_path, "distance/tv_off") == [(1, 0.25)]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"phase": "main"}', '{"phase": "other", "iteration": 1}'])
def test_a_foreign_line_is_named(tmp_path, line, open_log):
    (tmp_path / "metrics.jsonl").write_text(f'{{"phase": "warmup", "iteration": 1}}\n{line}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: is not a record of this run"):
        open_log(tmp_path, resume_at=("main", 4))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path, open_log):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = open_log(tmp_path)
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)") as caught:
        log.write("main", 1, {"student/loss": 1.0})
    assert "\n" not in str(caught.value)
    log.close()


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, open_log):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run/metrics\.jsonl: cannot be written \(Not a directory\)"):
        open_log(tmp_path / "file" / "run")


def test_no_permission_is_one_line(tmp_path, monkeypatch, open_log):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom no mode bit stops
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(Permission denied\)"):
        open_log(tmp_path)


def test_plain_lines_have_fixed_columns(tmp_path, open_log):
    stream = io.StringIO()
    log = open_log(tmp_path, stream=stream)
    log.write("main", 1, AMM)
    log.message("evaluated")
    log.write("main", 2, {**AMM, "amm/d_mm_off": -7.0, "distance/kl_off": 123.456})
    log.close()
    first, message, second = stream.getvalue().splitlines()
    assert message == "evaluated"
    assert first == (
        "main   1/4 | d_MM 24.300 off 20.900 on | tight  0.912 off  0.881 on | KL  1.372 off |  1,234 tok/s"
        " |    0:06 left"
    )
    assert [i for i, x in enumerate(first) if x == "|"] == [i for i, x in enumerate(second) if x == "|"]


def test_warm_up_shows_the_numbers_that_exist(tmp_path, open_log):
    stream = io.StringIO()
    log = open_log(tmp_path, stream=stream)
    log.write("warmup", 1, {"student/loss": 3.5, "distance/tv_off": 0.5})
    assert stream.getvalue() == "warmup 1/3 | loss  3.500 | TV  0.500 off |      -- left\n"


class GoneStream(io.StringIO):
    """A terminal or pipe whose other end was closed."""

    def __init__(self, method: str, is_terminal: bool) -> None:
        super().__init__()
        self._terminal = is_terminal
        setattr(self, method, self._refuse)

    def isatty(self) -> bool:
        return self._terminal

    @staticmethod
    def _refuse(*_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path, method, is_terminal, monkeypatch, open_log):
    monkeypatch.setenv("TERM", "xterm")
    log = open_log(tmp_path, stream=GoneStream(method, is_terminal))
    log.message("hello")
    run_from(log).close()
    assert len(records(tmp_path)) == 8
    assert [step for step, _ in scalars(tmp_path, "distance/tv_off")] == [1, 2, 3, 4, 5, 6, 7]


class Terminal:
    """A pseudo-terminal of a given width."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def read(self) -> str:
        """What has been written since the last read."""
        written = b""
        while select.select([self.master], [], [], 0.1)[0]:
            written += os.read(self.master, 1 << 16)
        return written.decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def open_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminals = []

    def open_one(columns: int) -> Terminal:
        terminals.append(Terminal(columns))
        return terminals[-1]

    yield open_one
    for terminal in terminals:
        terminal.close()


@pytest.mark.parametrize("columns", [200, 118, 100, 80, 40, 10])
def test_live_line_never_wraps(tmp_path, columns, open_terminal, open_log):
    terminal = open_terminal(columns)
    log = open_log(tmp_path, stream=terminal.stream)
    log.write("main", 1, {**AMM, "train/waiting": 1.0})
    log.message("evaluated")
    log.write("main", 2, AMM)
    written = terminal.read()
    drawn = re.sub(r"\x1b\[\d*[mK]", "", written)
    lines = [line for line in re.split(r"[\r\n]+", drawn) if line]
    assert lines[1] == "evaluated"
    assert lines[0] == lines[2]  # drawn again below the message
    assert all(len(line) < columns for line in lines if line != "evaluated")
    assert written.count("\n") == 1  # the message's: the live line stays on its own
    if columns >= 80:
        for number in ("24.300", "20.900", "0.912", "0.881", "1.372"):
            assert number in lines[0]
    log.write("main", 4, AMM)
    assert terminal.read().endswith("\n")  # the last iteration stays on the screen


def test_no_color(tmp_path, monkeypatch, open_terminal, open_log):
    terminal = open_terminal(120)
    monkeypatch.setenv("NO_COLOR", "1")
    open_log(tmp_path, stream=terminal.stream).write("main", 1, AMM)
    assert re.findall(r"\x1b\[\d*m", terminal.read()) == []


def test_timers_add_up_nest_and_restart():
    timers = Timers()
    with timers("iteration"):
        for _ in range(2):
            with timers("critic"):
                time.sleep(0.01)
    seconds = timers.collect()
    assert sorted(seconds) == ["time/critic", "time/iteration"]
    assert 0.02 <= seconds["time/critic"] <= seconds["time/iteration"] < 5
    assert timers.collect() == {}


def test_timers_count_a_phase_that_fails():
    timers = Timers()
    with pytest.raises(KeyError), timers("rollout"):
        raise KeyError
    assert "time/rollout" in timers.collect()


@pytest.mark.skipif(not Path("/proc/self/status").exists() or torch.cuda.is_available(), reason="needs Linux, no GPU")
def test_peak_memory_is_the_kernels_high_water_mark():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert peak_memory_gib() == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


class Clock:
    """In the place of the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("megatron_amd.training.progress.time", clock)
    return clock


def test_responses_are_counted_every_ten_seconds_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    line = ResponsesLine(stream, 8792, "replica 0 of 2")
    for now, count in ((100.5, 10), (109.9, 900), (110.0, 1234), (112.0, 2000), (300.0, 8792)):
        clock.now = now
        line.show(count, 5 * count)
    line.close()
    assert stream.getvalue() == (
        "replica 0 of 2 | responses 1,234/8,792 | 14% | 617 tok/s | 1:01 left\n"
        "replica 0 of 2 | responses 8,792/8,792 | 100% | 220 tok/s | 0:00 left\n"
    )


@pytest.mark.parametrize("columns", [100, 30])
def test_responses_have_a_live_line(clock, open_terminal, columns):
    terminal = open_terminal(columns)
    line = ResponsesLine(terminal.stream, 8792)
    for now, count in ((100.1, 10), (110.0, 1234), (110.1, 1300), (110.15, 8792)):
        clock.now = now
        line.show(count, 5 * count)
    line.close()
    drawn = [re.sub(r"\x1b\[\d*[mK]", "", text) for text in terminal.read().split("\r") if text]
    wide = ["responses 1,234/8,792  14%  617 tok/s  1:01 left", "responses 8,792/8,792  100%  4,331 tok/s  0:00 left"]
    narrow = ["responses 1,234/8,792  14%", "responses 8,792/8,792  100%"]
    assert drawn == [*(wide if columns == 100 else narrow), "\n"]


def test_a_long_generation_is_seen_on_the_live_line(tmp_path, clock, open_terminal, open_log):
    terminal = open_terminal(70)
    log = open_log(tmp_path, stream=terminal.stream)
    log.write("warmup", 1, {"student/loss": 2.0})
    terminal.read()
    report = log.generating("student", 64)
    assert report is not None
    for now, count in ((101.9, 1), (104.0, 10), (104.1, 11), (104.5, 64)):  # it began at 100
        clock.now = now
        report(count, 50 * count)
    log.message("hello")
    drawn = [re.sub(r"\x1b\[\d*[mK]", "", text) for text in terminal.read().split("\r") if text]
    first, last, *after = drawn
    assert first == "warmup 1/3  loss  2.000  student writes 10/64 at 125 tok/s"
    assert last.startswith("warmup 1/3  ━━━")
    assert "student" not in last, "all are complete"
    assert after == ["hello", "\n", last]


def test_generations_are_not_told_of_in_files(tmp_path, clock, open_log):
    stream = io.StringIO()
    report = open_log(tmp_path, stream=stream).generating("teacher", 2)
    for now, count in ((110.0, 1), (120.0, 2)):
        clock.now = now
        report(count, 9)
    assert stream.getvalue() == ""
    assert open_log(tmp_path / "other", enabled=False).generating("teacher", 2) is None
