"""Pages of HTML that need nothing else, and charts as SVG text: points, lines and bars on linear or logarithmic axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP = 760, 360, 70, 40, 15, 10
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759")
MOST_TICKS = 8
PAD = 0.05  # of an axis's length, around what it shows

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:left}td.n,th.n{text-align:right}
.scroll{max-height:32em;overflow:auto;border:1px solid #ddd}.key span{display:inline-block;margin-right:1.2em}
.key i{display:inline-block;width:.9em;height:.9em;margin-right:.35em;vertical-align:-.1em}
svg{width:100%;height:auto;background:#fafafa}pre{background:#f4f4f4;padding:1em;overflow:auto}
"""


def page(title: str, parts: Sequence[str]) -> str:
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<body>{''.join(parts)}</body></html>\n"


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    told: str
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    name: str
    low: float
    high: float
    log: bool = False
    marked: tuple[float, ...] = ()  # where its ticks are; else they are chosen

    @staticmethod
    def around(name: str, values: Sequence[float], log: bool = False, marked: Sequence[float] = ()) -> "Axis":
        low, high = min(values), max(values)
        if log:
            pad = max(math.log(high / low) * PAD, 0.02)
            return Axis(name, low * math.exp(-pad), high * math.exp(pad), log, tuple(marked))
        pad = (high - low) * PAD or abs(high) * PAD or 1.0
        return Axis(name, low - pad, high + pad)

    def part(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> Sequence[float]:
        if self.marked:
            return self.marked
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 5), (1,)):
                values = [digit * 10.0**power for power in powers for digit in digits]
                found = [value for value in values if self.low <= value <= self.high]
                if 2 <= len(found) <= MOST_TICKS:
                    return found
            return [self.low * (self.high / self.low) ** (i / 4) for i in range(5)]
        return [self.low + (self.high - self.low) * i / 4 for i in range(5)]


def chart(
    x: Axis, y: Axis, dots: Sequence[Dot] = (), lines: Sequence[tuple[Sequence[tuple[float, float]], int]] = ()
) -> str:
    """`lines`: corners, and the number of a colour."""
    shapes = [_frame(x, y)]
    for corners, colour in lines:
        path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in corners)
        shapes.append(f"<polyline points='{path}' fill='none' stroke='{COLOURS[colour]}' stroke-width='1.5'/>")
    for dot in dots:
        shapes.append(
            f"<circle cx='{_x(x, dot.x):.1f}' cy='{_y(y, dot.y):.1f}' r='4' fill='{COLOURS[dot.colour]}' fill-opacity='0.75'>"
            f"<title>{escape(dot.told)}</title></circle>"
        )
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}'>{''.join(shapes)}</svg>"


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.part(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.part(value) * (HEIGHT - BOTTOM - TOP)


def _frame(x: Axis, y: Axis) -> str:
    shapes = []
    for tick in x.ticks():
        at = _x(x, tick)
        shapes.append(f"<line x1='{at:.1f}' x2='{at:.1f}' y1='{TOP}' y2='{HEIGHT - BOTTOM}' stroke='#e4e4e4'/>")
        shapes.append(
            f"<text x='{at:.1f}' y='{HEIGHT - BOTTOM + 14}' font-size='11' text-anchor='middle'>{_number(tick)}</text>"
        )
    for tick in y.ticks():
        at = _y(y, tick)
        shapes.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{at:.1f}' y2='{at:.1f}' stroke='#e4e4e4'/>")
        shapes.append(f"<text x='{LEFT - 5}' y='{at + 4:.1f}' font-size='11' text-anchor='end'>{_number(tick)}</text>")
    middle = (TOP + HEIGHT - BOTTOM) / 2
    shapes.append(
        f"<text x='{(LEFT + WIDTH) / 2}' y='{HEIGHT - 6}' font-size='12' text-anchor='middle'>{escape(x.name)}</text>"
    )
    shapes.append(
        f"<text x='14' y='{middle}' font-size='12' text-anchor='middle' transform='rotate(-90 14 {middle})'>{escape(y.name)}</text>"
    )
    return "".join(shapes)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def bars(values: dict[str, float], unit: str) -> str:
    """One line each, the longest first."""
    top = max([*values.values(), 1e-12])
    rows = []
    for name, value in sorted(values.items(), key=lambda item: -item[1]):
        width = max(0.0, value) / top * 400
        rows.append(
            f"<tr><td>{escape(name)}</td><td><svg style='width:410px;height:14px;background:none' viewBox='0 0 410 14'>"
            f"<rect width='{width:.1f}' height='14' fill='{COLOURS[0]}'/></svg></td><td class='n'>{value:.3f} {escape(unit)}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table>"
