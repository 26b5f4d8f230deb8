"""Line and bar charts as inline SVG: no script, colours from the page's style sheet, a text for screen readers."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 268
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 42
_MAX_POINTS = 240
_DAY = 86400.0
_STEPS = (
    *(1.0, 2.0, 5.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0),
    *(_DAY * n for n in (1, 2, 4, 7, 14, 28, 56, 91, 182, 365, 730, 1825, 3650)),
)


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        style: ``a`` or ``b`` (the two colours), ``ref`` (a thin dashed reference).
        step: draw it as stairs.
        dots: mark its points.
    """

    label: str
    points: Sequence[Point]
    style: str = "a"
    step: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """What to draw; :meth:`svg` draws it.

    Attributes:
        text: what a reader who does not see the chart should know.
        log_y: logarithmic vertical axis (values below 1e-12 are left out).
        low, high: limits of the vertical axis; by default from the data.
        bars: heights by x, drawn behind the lines.
        whole_x, whole_y: ticks at whole numbers only.
        dates: the horizontal axis is in seconds since 1970, and its ticks are dates or times of day.
    """

    title: str
    x_label: str
    y_label: str
    text: str
    series: Sequence[Series] = ()
    bars: Sequence[Point] = ()
    log_y: bool = False
    low: float | None = None
    high: float | None = None
    whole_x: bool = False
    whole_y: bool = False
    dates: bool = False

    def svg(self) -> str:
        """The chart as one ``<svg>`` element; every text in it is escaped."""
        lines = [(s, [p for p in thin(s.points) if not self.log_y or p[1] >= 1e-12]) for s in self.series]
        bars = thin(self.bars)
        every = [p for _, points in lines for p in points] + list(bars)
        if not every:
            every = [(0.0, 1.0), (1.0, 1.0)]
        pad = 0.5 if bars else 0.0
        moments = Moments(min(x for x, _ in every), max(x for x, _ in every)) if self.dates else None
        frame = _Frame(
            (min(x for x, _ in every) - pad, max(x for x, _ in every) + pad), self._y_range(every), self.log_y
        )
        parts = [
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(self.title)}">',
            f"<title>{escape(self.title)}</title><desc>{escape(self.text)}</desc>",
            *frame.axes(self.x_label, self.y_label, self.whole_x, self.whole_y, moments),
            *frame.bars(bars),
        ]
        for s, points in lines:
            parts += frame.line(s, points)
        return "".join([*parts, "</svg>"])

    def _y_range(self, points: Sequence[Point]) -> tuple[float, float]:
        ys = [y for _, y in points]
        if self.log_y:
            shown = [y for y in ys if y > 0] or [1.0]
            low_exponent = math.floor(math.log10(min(shown)))
            return low_exponent, max(low_exponent + 1, math.ceil(math.log10(max(shown))))
        low = min(ys) if self.low is None else self.low
        high = max(ys) if self.high is None else self.high
        if high <= low:
            low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
        gap = 0.08 * (high - low)
        return (low if self.low is not None else low - gap), (high if self.high is not None else high + gap)


class _Frame:
    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], log: bool) -> None:
        self.x0, self.x1 = xs if xs[1] > xs[0] else (xs[0] - 0.5, xs[1] + 0.5)
        self.y0, self.y1 = ys
        self.log = log

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return HEIGHT - _BOTTOM - (at - self.y0) / (self.y1 - self.y0) * (HEIGHT - _TOP - _BOTTOM)

    def axes(
        self, x_label: str, y_label: str, whole_x: bool, whole_y: bool, moments: Moments | None = None
    ) -> list[str]:
        bottom, out = HEIGHT - _BOTTOM, list[str]()
        if self.log:
            step = max(1, round((self.y1 - self.y0) / 5))
            ticks = [(10.0**e, f"1e{e}" if e else "1") for e in range(int(self.y0), int(self.y1) + 1, step)]
        else:
            ticks = [(t, _short(t)) for t in nice(self.y0, self.y1, 5, whole_y)]
        for value, label in ticks:
            y = self.y(value)
            out.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.6:.1f}" text-anchor="end">{label}</text>')
        at = moments.ticks() if moments else [(x, _short(x)) for x in nice(self.x0, self.x1, 6, whole_x)]
        for value, label in at:
            x = self.x(value)
            out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            out.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
        out.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
        middle, across = (_LEFT + WIDTH - _RIGHT) / 2, (_TOP + bottom) / 2
        out.append(
            f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
            f'<text class="label" transform="translate(12 {across}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_label)}</text>"
        )
        return out

    def bars(self, bars: Sequence[Point]) -> list[str]:
        if not bars:
            return []
        width = max(0.8, 0.72 * (WIDTH - _LEFT - _RIGHT) / max(len(bars), 1))
        width, base = min(width, 34), self.y(max(self.y0, 0.0))
        return [
            f'<rect class="bar" x="{self.x(x) - width / 2:.1f}" y="{self.y(y):.1f}" width="{width:.1f}" '
            f'height="{max(0.0, base - self.y(y)):.1f}"/>'
            for x, y in bars
        ]

    def line(self, s: Series, points: Sequence[Point]) -> list[str]:
        if not points:
            return []
        path = [f"M{self.x(points[0][0]):.1f} {self.y(points[0][1]):.1f}"]
        for x, y in points[1:]:
            path.append(f"H{self.x(x):.1f}V{self.y(y):.1f}" if s.step else f"L{self.x(x):.1f} {self.y(y):.1f}")
        out = [f'<path class="line {s.style}" d="{"".join(path)}"/>']
        if s.dots and len(points) <= 40:
            out += [
                f'<circle class="dot {s.style}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="2.6"/>' for x, y in points
            ]
        return out


class Moments:
    """Ticks between two times (seconds since 1970): at most five whole days, minutes or seconds, named in UTC."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def ticks(self) -> list[tuple[float, str]]:
        """``(time, text)`` of every tick, at least one."""
        span = self.high - self.low
        step = next((s for s in _STEPS if span / s < 4.5), max(span, 1.0))
        first = math.ceil(self.low / step)
        at = [i * step for i in range(first, math.floor(self.high / step) + 1)][:5] or [self.low]
        form = "%Y-%m-%d" if step >= _DAY else "%m-%d %H:%M" if step >= 60 else "%H:%M:%S"
        return [(x, moment(x, form)) for x in at]


def moment(seconds: float, form: str = "%Y-%m-%d") -> str:
    """A time in UTC; one that no calendar has (a foreign ledger may claim it) as the nearest that one has."""
    return time.strftime(form, time.gmtime(min(max(seconds, 0.0), 253402300799.0)))


def nice(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points: Sequence[Point]) -> list[Point]:
    """At most about 240 of ``points``, evenly spaced, the last one kept."""
    every = max(1, -(-len(points) // _MAX_POINTS))
    return [p for i, p in enumerate(points) if (len(points) - 1 - i) % every == 0]


def _short(x: float) -> str:
    return f"{0.0 if abs(x) < 1e-12 else x:.6g}"
