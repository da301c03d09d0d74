import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dlrm_scale.models.cross import Gate, SequenceSummary, recent_events
from dlrm_scale.models.inputs import valid_mask
from tests.support.model_inputs import run_config


def test_recent_are_the_last_events_of_each_sample():
    events = torch.randn(4, 5, 3)
    recent = recent_events(events, torch.tensor([5, 2, 1, 0]), num_recent=2)
    zero = torch.zeros(3)
    expected = [events[0, 3:5], events[1, 0:2], torch.stack((zero, events[2, 0])), torch.stack((zero, zero))]
    assert torch.equal(recent, torch.stack(expected))


def test_more_recent_than_slots():
    events = torch.randn(1, 2, 3)
    recent = recent_events(events, torch.tensor([2]), num_recent=4)
    assert torch.equal(recent, torch.cat((torch.zeros(1, 2, 3), events), dim=1))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [-3.0, 0.5]),
        ("mask", [-2.6423911, 0.4403985]),
        ("sigmoid", [0.0024726, 0.7310586]),
        ("tanh", [-0.9999877, 0.7615942]),
        ("identity", [-6.0, 1.0]),
        ("sigmoid_times_x", [-0.0074179, 0.3655293]),
    ],
)
def test_gate_readings(kind, expected):
    """With an MLP that always says 2."""
    gate = Gate(2, kind)
    for parameter in gate.parameters():
        torch.nn.init.zeros_(parameter)
    if kind != "none":
        torch.nn.init.constant_(gate.mlp[-1].bias, 2.0)
    torch.testing.assert_close(gate(torch.tensor([-3.0, 0.5])), torch.tensor(expected))


def test_one_graph_of_a_summary_serves_all_lengths():
    """torch.compile gives up after eight graphs, and each costs seconds; a batch has a chunk for each length."""
    counter = CompileCounter()
    summary = SequenceSummary(run_config().model)
    compiled = torch.compile(summary.forward, dynamic=True, backend=counter)
    for num_tokens in range(10, 30):
        lengths_B = torch.randint(1, num_tokens - 4, (5,))
        compiled(torch.randn(5, num_tokens, 8), valid_mask(lengths_B + 4, num_tokens), lengths_B)
    assert counter.frame_count == 1
