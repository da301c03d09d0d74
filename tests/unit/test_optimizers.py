"""The learning-rate schedule, the cadence predicate, and the plain twins of the fused rules."""

from itertools import pairwise

import pytest
import torch

from dlrm_scale.config import Schedule, SparseOptimizer
from dlrm_scale.errors import ConfigError
from dlrm_scale.training.optimizers import ReplicatedTableOptimizer, learning_rate_factor
from dlrm_scale.training.trainer import due


def test_due_at_zero_at_one_at_each_and_never():
    assert [step for step in range(13) if due(step, 4)] == [4, 8, 12]
    assert [step for step in range(4) if due(step, 1)] == [1, 2, 3]
    assert not any(due(step, 0) for step in range(5))


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_schedule_warms_up_then_decays_to_its_last_factor_at_the_last_step(decay):
    schedule = Schedule(warmup_steps=4, decay=decay, final_factor=0.1)
    factors = [learning_rate_factor(step, schedule, total_steps=21) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and factors[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[4:]))
    assert factors[12] == pytest.approx(0.55)  # half-way both shapes are half-way


def test_schedule_without_decay_or_with_one_step():
    assert {learning_rate_factor(step, Schedule(), 10) for step in range(10)} == {1.0}
    assert learning_rate_factor(0, Schedule(decay="linear"), 1) == 1.0


def table_with_gradients(rule, **options):
    table = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    optimizer = ReplicatedTableOptimizer([table], SparseOptimizer(name=rule, lr=0.5, eps=1e-8, **options))
    for _ in range(2):
        table.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]])
        optimizer.step()
    return table.detach()


def test_row_wise_adagrad_by_hand():
    # row 0: mean square 12.5, then 25; row 2: 2, then 4; row 1 is not touched
    first, second = 12.5**0.5, 25**0.5
    expected = torch.tensor(
        [
            [1 - 1.5 / first - 1.5 / second, 2 - 2 / first - 2 / second],
            [3, 4],
            [5, 6 - 1 / 2**0.5 - 1 / 2],
        ]
    )
    torch.testing.assert_close(table_with_gradients("rowwise_adagrad"), expected)


def test_weight_decay_touches_only_rows_with_a_gradient():
    plain, decayed = (table_with_gradients("rowwise_adagrad", weight_decay=w) for w in (0.0, 0.3))
    assert torch.equal(plain[1], decayed[1])
    assert (decayed[0] != plain[0]).all()


def test_a_rule_without_twin_is_refused():
    with pytest.raises(ConfigError, match=r"data_parallel.*adam"):
        table_with_gradients("adam")
