"""What cannot be compiled runs as it is, be it forward or backward that does not compile."""

import pytest
import torch
from torch import nn
from torch._inductor import compile_fx
from torch._inductor.utils import fresh_cache

from dlrm_scale.models.compiled import compile_arch


class Regions(nn.Module):
    """Of one kind: `sequences` are compiled for any length."""

    def __init__(self, of_sequences: bool) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.SiLU())
        self.regions = ([], [self.layer]) if of_sequences else ([self.layer], [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).sum()


@pytest.mark.parametrize("of_sequences", [False, True])
@pytest.mark.parametrize("graph", ["forward", "backward"])
def test_a_graph_that_does_not_compile_leaves_the_arch_as_it_is(monkeypatch, graph, of_sequences):
    def fail(*args, **kwargs):
        raise RuntimeError(f"no code for the {graph} graph")

    monkeypatch.setattr(compile_fx, f"compile_fx_{graph}", fail)
    torch._dynamo.reset()
    arch, x = Regions(of_sequences), torch.randn(5, 3)
    arch(x).backward()
    expected = [p.grad.clone() for p in arch.parameters()]
    arch.zero_grad()
    compile_arch(arch, on_cpu=True)
    told = f"Regions runs as it is, since it cannot be compiled: RuntimeError: no code for the {graph} graph"
    with fresh_cache(), pytest.warns(UserWarning, match=told):
        loss = arch(x)
    loss.backward()
    for parameter, gradient in zip(arch.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
