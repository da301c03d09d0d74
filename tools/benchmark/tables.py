"""Tables of figures for terminals of 80 columns: titles and names fold where room is short, figures stay whole."""

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tools.commands import folded


def table_of(title: str, *figures: str) -> Table:
    """A column of names, and these of figures. No lines between them: these would take half as much room again."""
    grid = Table(title=folded(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    grid.add_column(overflow="fold")
    for figure in figures:
        grid.add_column(figure, justify="right", no_wrap=True)
    return grid


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def with_range(found: Mapping[str, float], form: str, repeats: int) -> str:
    """The median, and from the least to the most where there are several."""
    median = f"{found['median']:{form}}"
    return median if repeats == 1 else f"{median} ({found['least']:{form}}..{found['most']:{form}})"


def in_digits(value: float) -> str:
    """Three of them, or as many as stand before the point: 0.123, 12.3, 1,234."""
    return f"{value:,.{sum(value < bound for bound in (1, 10, 100))}f}"
