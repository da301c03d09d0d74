"""The one line (or, without a terminal, the lines) that rank 0 shows while it trains."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dlrm_scale.training.monitor import Metrics


def summary(metrics: Metrics) -> str:
    """NE and AUC of each label, short enough for one line."""
    parts = [
        f"{label + ' ' if len(metrics) > 1 else ''}NE {m['ne']:.4f} AUC {m['auc']:.4f}" for label, m in metrics.items()
    ]
    return "  ".join(parts)


class Progress:
    """A bar on a terminal, one line for each log elsewhere, nothing on other ranks than the first."""

    def __init__(self, console: Console | None, num_steps: int) -> None:
        self.console, self.num_steps = console, num_steps
        self.bar = None
        if console is not None and console.is_terminal:
            self.bar = RichProgress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self.task = self.bar.add_task("", total=num_steps)

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, step: int) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step)

    def log(self, step: int, loss: float, metrics: Metrics, samples_per_second: float | None) -> None:
        speed = f"{samples_per_second:,.0f} samples/s" if samples_per_second else "warming up"
        text = f"loss {loss:.4f}  {summary(metrics)}  {speed}"
        if self.bar:
            self.bar.update(self.task, description=text)
        elif self.console:
            self.console.print(f"step {step}/{self.num_steps}  {text}", highlight=False)

    def note(self, text: str) -> None:
        if self.console:
            self.console.print(f"note: {text}", highlight=False)

    def log_eval(self, step: int, metrics: Metrics) -> None:
        if self.console:
            self.console.print(f"step {step}/{self.num_steps}  held-out {summary(metrics)}", highlight=False)
