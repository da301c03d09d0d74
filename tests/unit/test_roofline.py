"""What counts as this machine's peak."""

import torch

from tools.benchmark import roofline

CPU = torch.device("cpu")


def test_products_are_of_random_numbers(monkeypatch):
    """Of ones or zeros, hardware may take less power, and be faster."""
    seen = []
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((a, b)))
    roofline.peak_cases(CPU)["fp32"].call()
    assert all(len(matrix.unique()) > 1000 for matrix in seen[0])


def test_the_slowest_rank_of_the_best_round_counts(monkeypatch):
    """A round that was disturbed on any rank is none in which the machine was as fast as it can be."""
    other = torch.tensor([[2.0, 4.0, 5.0], [1.0, 1.0, 3.0]], dtype=torch.float64)
    mine = {"fp32": [9.0, 3.0, 6.0], "copy": [2.0, 2.0, 2.0]}
    monkeypatch.setattr(roofline, "time_interleaved", lambda *_, **__: mine)
    monkeypatch.setattr(roofline.dist, "all_reduce", lambda t, op: t.copy_(torch.maximum(t, other)))
    monkeypatch.setattr(roofline.dist, "get_world_size", lambda: 2)
    peaks = roofline.measure_peaks(CPU)
    assert peaks.flops_per_s == {"fp32": 2 * 2 * roofline.MATRIX["cpu"] ** 3 / 4.0}
    assert peaks.copy_bytes_per_s == 2 * 2 * roofline.COPY_BYTES["cpu"] / 2.0
