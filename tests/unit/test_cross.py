import pytest
import torch

from dlrm_scale.models.cross import Gate, recent_events


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
