"""One live line that says how a run is going."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, TextIO

_BAR_CELLS = 20
_TIMED_ITERATIONS = 20  # time left follows the pace of this many iterations
_WORDS = ((" off", True), (" on", True))  # on a narrow terminal these go before any number does
_WORDS_DROP = 7
_MOMENT = 2.0  # seconds
_LIVE_SECONDS, _PLAIN_SECONDS = 0.2, 10.0  # between two updates of a line that could be updated all the time


class _Field(NamedTuple):
    """A column of the line: pieces of (text, is a label), and when it goes if the terminal is narrow (high: first)."""

    pieces: list[tuple[str, bool]]
    drop: int

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


class LiveLine:
    """A line of fields that rewrites itself in place, cut to the terminal's width.

    Where the stream is no terminal (a file, a pipe, TERM=dumb) each update is a line of its own. NO_COLOR turns dim
    labels off.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._colour = self._live and not os.environ.get("NO_COLOR")
        self._unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()
        self._fields: list[_Field] = []
        self._passing: list[_Field] = []  # at the end, until the next update

    def message(self, text: str) -> None:
        """Print `text` above the live line."""
        if not self._live:
            self._put(text + "\n")
            return
        self._put(f"\r\x1b[K{text}\n")
        if self._fields or self._passing:
            self._draw()

    def close(self) -> None:
        """Leave the live line as it is and go on below it."""
        if self._live and (self._fields or self._passing):
            self._put("\n")
        self._fields, self._passing = [], []

    def _update(self, fields: list[_Field]) -> None:
        self._fields, self._passing = fields, []
        if self._live:
            self._draw()
        else:
            self._put(" | ".join(field.text for field in fields) + "\n")

    def _draw(self) -> None:
        gap = 2
        room = _terminal_width(self._stream) - 1  # a full last column would wrap on some terminals
        fields = [*self._fields, *self._passing]
        while len(fields) > 1 and sum(len(field.text) + gap for field in fields) - gap > room:
            first = max(fields, key=lambda field: field.drop)
            if first.drop <= _WORDS_DROP and any(piece in _WORDS for field in fields for piece in field.pieces):
                fields = [field._replace(pieces=[p for p in field.pieces if p not in _WORDS]) for field in fields]
            else:
                fields.remove(first)
        pieces = [piece for field in fields for piece in [*field.pieces, (" " * gap, False)]][:-1]
        line, used = "", 0
        for text, is_label in pieces:
            text = text[: max(room - used, 0)]
            used += len(text)
            line += f"\x1b[2m{text}\x1b[22m" if is_label and self._colour else text
        self._put(f"\r{line}\x1b[K")  # written at once and erased only to the right of the text: no flicker

    def _put(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):  # a terminal or pipe that is gone is no reason to end a run
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()


class ProgressLine(LiveLine):
    """Phase, iteration, d_MM, tightness, KL, speed and time left, in fixed columns."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._phase = ""
        self._stamps: deque[tuple[int, float]] = deque(maxlen=_TIMED_ITERATIONS + 1)

    def tick(self, phase: str, iteration: int) -> None:
        """Note that `iteration` has ended now; the time left is estimated from these notes."""
        if phase != self._phase:
            self._phase = phase
            self._stamps.clear()
        self._stamps.append((iteration, time.monotonic()))

    def show(self, phase: str, iteration: int, total: int, values: Mapping[str, float]) -> None:
        """Show the numbers of one iteration. Absent ones have no column."""
        self._update(self._columns(phase, iteration, total, values))
        if iteration >= total:
            self.close()

    def generating(self, whose: str, total: int) -> Callable[[int, int], None]:
        """A function to be told how many responses are complete, and their tokens. It shows that at the line's end, on
        a terminal, while a generation takes longer than a moment.

        Args:
            whose: responses, such as `student`.
            total: responses that there will be.
        """
        began = shown = time.monotonic()

        def report(count: int, tokens: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if not self._live or now - began < _MOMENT or (now - shown < _LIVE_SECONDS and count < total):
                return
            shown = now
            text = f"{whose} writes {count:,}/{total:,} at {tokens / (now - began):,.0f} tok/s"
            self._passing = [_Field([(text, False)], drop=0)] if count < total else []
            self._draw()

        return report

    def _columns(self, phase: str, iteration: int, total: int, values: Mapping[str, float]) -> list[_Field]:
        digits = len(str(total))
        fields = [_Field([(f"{phase:<6}", False), (f" {iteration:>{digits}}/{total}", False)], drop=0)]
        if self._live:
            fields.append(_Field(self._bar(iteration / max(total, 1)), drop=8))
        if "amm/d_mm_off" in values or "amm/d_mm_on" in values:
            fields.append(_off_and_on("d_MM", "amm/d_mm", values, drop=1))
            fields.append(_off_and_on("tight", "amm/tightness", values, drop=3))
        else:
            if "student/loss" in values:
                fields.append(_Field([("loss", True), (f" {_fixed(values['student/loss'])}", False)], drop=1))
            fields.append(_off_and_on("TV", "distance/tv", values, drop=3))
        if "distance/kl_off" in values:
            fields.append(
                _Field([("KL", True), (f" {_fixed(values['distance/kl_off'])}", False), (" off", True)], drop=4)
            )
        if "throughput/tokens_per_second" in values:
            speed = values["throughput/tokens_per_second"]
            fields.append(_Field([(f"{speed:>6,.0f}", False), (" tok/s", True)], drop=7))
        left = _clock(self._seconds_left(iteration, total, values))
        fields.append(_Field([(f"{left:>7}", False), (" left", True)], drop=5))
        if values.get("train/waiting"):
            fields.append(_Field([("student waits", False)], drop=9))
        return [field for field in fields if field.pieces]

    def _bar(self, fraction: float) -> list[tuple[str, bool]]:
        full, rest = ("━", "─") if self._unicode else ("#", "-")
        done = round(min(fraction, 1.0) * _BAR_CELLS)
        return [(full * done, False), (rest * (_BAR_CELLS - done), True)]

    def _seconds_left(self, iteration: int, total: int, values: Mapping[str, float]) -> float:
        if len(self._stamps) < 2:
            return (total - iteration) * values.get("time/iteration", math.nan)
        (first, began), (last, ended) = self._stamps[0], self._stamps[-1]
        return (total - iteration) * (ended - began) / max(last - first, 1)


class ResponsesLine(LiveLine):
    """How far a replica is with its responses: `responses 1,234/8,792  14%  512 tok/s  3:20 left`.

    Args:
        total: the replica's responses.
        place: said before it all, such as `replica 0 of 2`; empty: nothing.
    """

    def __init__(self, stream: TextIO, total: int, place: str = "") -> None:
        super().__init__(stream)
        self._total, self._place = total, place
        self._interval = _LIVE_SECONDS if self._live else _PLAIN_SECONDS
        self._began = self._shown = time.monotonic()

    def show(self, count: int, tokens: int) -> None:
        """Note how many responses are complete, and their tokens; shown from time to time."""
        now = time.monotonic()
        is_last = self._live and count == self._total
        if now - self._shown < self._interval and not is_last:
            return
        self._shown = now
        seconds = max(now - self._began, 1e-3)
        texts = [
            self._place,
            f"responses {count:,}/{self._total:,}",
            f"{100 * count // self._total}%",
            f"{tokens / seconds:,.0f} tok/s",
            f"{_clock(seconds / count * (self._total - count))} left",
        ]
        self._update([_Field([(text, False)], drop) for drop, text in enumerate(texts) if text])


def _off_and_on(label: str, name: str, values: Mapping[str, float], drop: int) -> _Field:
    """`label` followed by those of name_off and name_on that exist; empty without either."""
    pieces: list[tuple[str, bool]] = []
    for side in ("off", "on"):
        if f"{name}_{side}" in values:
            pieces += [(f" {_fixed(values[f'{name}_{side}'])}", False), (f" {side}", True)]
    return _Field([(label, True), *pieces] if pieces else [], drop)


def _fixed(value: float, width: int = 6) -> str:
    """At most three decimals, fewer for large numbers, always `width` characters."""
    if not math.isfinite(value):
        return f"{value:>{width}}"
    for decimals in (3, 2, 1, 0):
        text = f"{value:{width}.{decimals}f}"
        if len(text) <= width:
            return text
    return f"{value:{width}.0e}"


def _clock(seconds: float) -> str:
    """hours:minutes:seconds, hours only where there are some; -- where unknown."""
    if not math.isfinite(seconds):
        return "--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _terminal_width(stream: TextIO) -> int:
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return columns or 80
