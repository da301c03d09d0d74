"""What `model` times: the dense arch as training builds it, on random inputs; and what is counted of it."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dlrm_scale.models.compiled import compile_arch
from dlrm_scale.models.dense_trace import Inputs, input_tensors, lookups
from dlrm_scale.models.kernels import choose_kernels
from dlrm_scale.models.ranking_model import DensePart, build_arch
from dlrm_scale.training.device import check_device, set_product_precision
from dlrm_scale.training.ranks import this_rank
from tools.benchmark.bandwidth import finish_of
from tools.benchmark.dense_work import DenseWork, count_dense, limits_ms
from tools.benchmark.model_cells import BASE, Cell
from tools.benchmark.peaks import GPU_CLASSES, precision_of
from tools.benchmark.roofline import peak_cases, peaks_of
from tools.benchmark.timing import Case, spread, time_interleaved

PROFILED_STEPS, ROWS_OF_PROFILE = 5, 20


class Built:
    """The dense arch of a cell on a device, as training builds it, and random inputs."""

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.train, self.device = cell.config.train, device
        arch = build_arch(cell.config).to(device)
        choose_kernels(arch, cell.config, device)
        if self.train.compile:
            compile_arch(arch, on_cpu=device.type == "cpu")
        self.dense = DensePart(arch, self.train.precision)
        with torch.device(device):
            self.inputs: Inputs = lookups(cell.config.features, cell.batch_size)
        self.leaves = [*self.dense.parameters(), *(t for t in input_tensors(self.inputs) if t.is_floating_point())]
        with torch.no_grad():  # a GPU multiplies zeros faster than numbers
            for values in self.leaves[len(list(self.dense.parameters())) :]:
                values.normal_()

    def forward(self) -> torch.Tensor:
        set_product_precision(self.train, self.device)
        return self.dense(*self.inputs)

    def step(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.forward().sum().backward()

    def peak_bytes(self) -> int | None:
        """Of one step, above parameters and inputs; None on a CPU, whose allocator does not count."""
        if self.device.type != "cuda":
            return None
        self.step()
        for leaf in self.leaves:
            leaf.grad = None
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step()
        return torch.cuda.max_memory_allocated(self.device) - before

    def costliest(self) -> str:
        on_cuda = self.device.type == "cuda"
        self.step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
            finish_of(self.device)()
        sort = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort, row_limit=ROWS_OF_PROFILE, max_name_column_width=50)
        return f"{PROFILED_STEPS} steps\n{table}"


def expected(cell: Cell, classes: Sequence[str]) -> list[dict[str, Any]]:
    work, precision = count_dense(cell.config, cell.batch_size, "cuda"), precision_of(cell.config.train)
    return [
        {**_told(cell, work), "gpu": name, "limits_ms": limits_ms(work, GPU_CLASSES[name], precision)}
        for name in classes
    ]


def _told(cell: Cell, work: DenseWork) -> dict[str, Any]:
    return {
        "variant": cell.name,
        "sizes": cell.sizes,
        "batch_size": cell.batch_size,
        "precision": precision_of(cell.config.train),
        "work": asdict(work),
    }


def measured(
    cells: Sequence[Cell], built: Sequence[Built], device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    cases: dict[tuple[str, str], Case] = {}
    for cell, each in zip(cells, built, strict=True):
        each.step()  # compiles
        cases[cell.name, "forward"] = Case(each.forward, finish=finish_of(device))
        cases[cell.name, "step"] = Case(each.step, finish=finish_of(device))
    cases |= {("machine", name): case for name, case in peak_cases(device).items()}
    times = time_interleaved(cases, seconds)
    # as in `train`, peaks are of the best round
    machine = {name: min(s) for (of, name), s in times.items() if of == "machine"}
    peaks = peaks_of(machine, device, num_ranks=1)
    rows = []
    for cell, each in zip(cells, built, strict=True):
        work, precision = count_dense(cell.config, cell.batch_size, device.type), precision_of(cell.config.train)
        ratios = [own / base for own, base in zip(times[cell.name, "step"], times[BASE, "step"], strict=True)]
        flops_per_s = peaks.flops_per_s.get(precision)
        rows.append(
            {
                **_told(cell, work),
                "forward_ms": _ms(times[cell.name, "forward"]),
                "step_ms": _ms(times[cell.name, "step"]),
                "step_over_base": asdict(spread(ratios)),
                "mfu": work.flops / statistics.median(times[cell.name, "step"]) / flops_per_s if flops_per_s else None,
                "peak_bytes": each.peak_bytes(),
                "peaks": asdict(peaks),
                "limits_ms": limits_ms(work, peaks, precision),
            }
        )
    return rows


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in asdict(spread(seconds)).items()}


def chosen_device(name: str, threads: int | None, cells: Sequence[Cell]) -> torch.device:
    """Raises ConfigError: it lacks what a configuration asks for."""
    if threads:
        torch.set_num_threads(threads)
    device = this_rank(name).device
    for cell in cells:
        check_device(cell.config, device)
    return device


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
