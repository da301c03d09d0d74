"""Where a rank's batches lie when they are handed out."""

from types import SimpleNamespace

import pytest
import torch

from dlrm_scale.data.batch import RecBatch
from dlrm_scale.data.loader import agree_alone
from dlrm_scale.training.readers import _batches
from tests.support.configs import tiny_config
from tests.support.rows import SCHEMA, rows_of


@pytest.mark.parametrize("device, expected", [("cuda", 2), ("cpu", 0)])
def test_batches_are_pinned_where_they_go_to_a_gpu(monkeypatch, device, expected):
    pinned = []
    monkeypatch.setattr(RecBatch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    of = SimpleNamespace(
        config=SimpleNamespace(features=SCHEMA, data=tiny_config().data),
        micro_batch_size=2,
        accumulate_steps=1,
        agree=agree_alone,
        device=torch.device(device),
    )
    with _batches(of, iter([rows_of([1, 2]), rows_of([3])])) as stream:
        made = list(stream)
    assert len(made) == 2 and len(pinned) == expected
    assert all(a is b for a, b in zip(pinned, made, strict=False))
