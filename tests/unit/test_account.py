"""The data account and its audit: readers' own positions over attempts and world sizes, and every kind of fault."""

import json
from itertools import pairwise

import pytest

from dlrm_scale.data.loader import Reader
from dlrm_scale.data.order import Order
from dlrm_scale.errors import DataError
from dlrm_scale.resilience.account import Account, Attempt, next_attempt
from dlrm_scale.resilience.audit import audit
from tests.support.rows import BlockSource
from tools import audit_data

NUM_ROWS, LANES, ACCUMULATE = 101, 4, 2


def attempt_of(folder, number: int, world_size: int, first_step: int, last_step: int, skipped=(), ranks=None) -> None:
    """What `world_size` ranks write down that resume at `first_step` and train up to `last_step` (exclusive)."""
    source = BlockSource([20, 30, 51])
    whole = Order(source, lanes=LANES, global_batch_size=16, shuffle_window_blocks=2, seed=0)  # 7 steps an epoch
    for rank in range(world_size) if ranks is None else ranks:
        lanes = LANES // world_size
        reader = Reader(source, whole, range(rank * lanes, (rank + 1) * lanes), ACCUMULATE)
        header = Attempt(
            number,
            rank,
            world_size,
            first_step,
            whole.steps_per_epoch,
            whole.lane_batch_size,
            [(r.start, r.stop) for r in map(whole.lane_range, range(LANES))],
        )
        account = Account(folder, header, ACCUMULATE)
        reader.on_read = account.read
        micro_batch = first_step * ACCUMULATE
        for epoch in range(first_step // whole.steps_per_epoch, 2):
            start = max(0, first_step - epoch * whole.steps_per_epoch)
            for _ in reader.steps(epoch, start):
                if micro_batch >= last_step * ACCUMULATE:
                    break
                account.trained(skipped=micro_batch in skipped)
                micro_batch += 1
                if micro_batch % (3 * ACCUMULATE) == 0:
                    account.flush()
        account.close()


def test_consecutive_steps_are_one_line(tmp_path):
    attempt_of(tmp_path, 0, 2, 0, 6)
    header, *lines = map(json.loads, (tmp_path / "rank_1_attempt_0.jsonl").read_text().splitlines())
    assert header["rank"] == 1 and header["resumed_at_step"] == 0 and len(header["lane_ranges"]) == LANES
    assert [(line["first_step"], line["last_step"]) for line in lines] == [(0, 2), (3, 5)]
    lane_2, lane_3 = header["lane_ranges"][2:]
    assert lines[0]["ranges"] == [[lane_2[0], lane_2[0] + 12], [lane_3[0], lane_3[0] + 12]]
    assert lines[1]["ranges"] == [[lane_2[0] + 12, lane_2[0] + 24], [lane_3[0] + 12, lane_3[0] + 24]]


def test_nothing_is_promised_before_a_flush_and_everything_after(tmp_path):
    header = Attempt(0, 0, 1, 0, 5, 2, [(0, 10)])
    account = Account(tmp_path, header, 1)
    account.read(0, 0, [(0, 2)])
    account.read(0, 1, [(2, 4)])
    account.trained()
    path = tmp_path / "rank_0_attempt_0.jsonl"
    assert len(path.read_text().splitlines()) == 1
    account.flush()
    assert json.loads(path.read_text().splitlines()[1])["ranges"] == [[0, 2]]
    account.flush()
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "attempts",
    [
        [(2, 0, 14)],
        [(1, 0, 7)],
        [(2, 0, 9), (4, 5, 11), (1, 8, 14)],  # each resumed before the last one's end, at another world size
        [(2, 0, 9), (2, 0, 14)],  # started over
        [(2, 0, 9), (2, 9, 9), (1, 9, 14)],  # one trained on nothing
        [(4, 0, 10), (2, 3, 4), (1, 2, 12)],  # one went back behind another's start
    ],
    ids=str,
)
def test_attempts_of_any_world_sizes_add_up_to_each_sample_once(tmp_path, attempts):
    for number, (world_size, first, last) in enumerate(attempts):
        attempt_of(tmp_path, number, world_size, first, last)
    result = audit(tmp_path)
    assert result.faults == []
    epochs, steps = divmod(attempts[-1][2], 7)
    lane_sizes = [stop - start for start, stop in pairwise(lane * NUM_ROWS // LANES for lane in range(LANES + 1))]
    assert result.num_samples == epochs * NUM_ROWS + sum(min(size, steps * 4) for size in lane_sizes)
    assert result.num_steps == attempts[-1][2]


def test_steps_done_again_are_counted_as_such(tmp_path):
    attempt_of(tmp_path, 0, 2, 0, 9)
    attempt_of(tmp_path, 1, 2, 5, 14)
    assert audit(tmp_path).thrown_away_steps == 4


def test_skipped_micro_batches_are_accounted_for_and_count_for_nothing(tmp_path):
    attempt_of(tmp_path, 0, 2, 0, 6, skipped=(3, 4))
    result = audit(tmp_path)
    assert result.faults == [] and result.skipped == 2 * 8 and result.num_samples == 6 * 16 - 16


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lost_lines_double_lines_and_lost_files_are_named(tmp_path):
    attempt_of(tmp_path, 0, 2, 0, 9)
    attempt_of(tmp_path, 1, 2, 6, 14)
    path = tmp_path / "rank_0_attempt_0.jsonl"
    whole = lines_of(path)
    rewrite(path, [whole[0], *whole[2:]])
    faults = audit(tmp_path).faults
    assert len(faults) == 2 and all("epoch 0, lane" in f and "are missing" in f for f in faults)
    rewrite(path, [*whole, whole[1]])
    faults = audit(tmp_path).faults
    assert len(faults) == 2 and all("counted twice (attempts 0 and 0)" in f for f in faults)
    rewrite(path, whole)
    assert audit(tmp_path).faults == []
    path.unlink()
    faults = audit(tmp_path).faults
    assert "attempt 0: no file of rank 0" in faults and len(faults) == 3


def test_a_resume_behind_what_was_trained_on_leaves_a_hole(tmp_path):
    attempt_of(tmp_path, 0, 2, 0, 5)
    attempt_of(tmp_path, 1, 2, 6, 14)
    faults = audit(tmp_path).faults
    assert len(faults) == LANES and all("are missing" in f for f in faults)


def test_a_line_cut_short_by_a_kill_is_none(tmp_path):
    attempt_of(tmp_path, 0, 1, 0, 7)
    attempt_of(tmp_path, 1, 1, 3, 14)
    path = tmp_path / "rank_0_attempt_0.jsonl"
    path.write_text(path.read_text() + '{"epoch": 0, "first')
    assert audit(tmp_path).faults == []


def test_the_next_attempt_has_the_first_free_number(tmp_path):
    assert next_attempt(tmp_path) == 0
    attempt_of(tmp_path, 0, 1, 0, 1)
    attempt_of(tmp_path, 7, 4, 0, 1, ranks=[3])
    assert next_attempt(tmp_path) == 8


def test_the_tool_says_what_it_found_and_its_exit_code_is_the_verdict(tmp_path, capsys):
    attempt_of(tmp_path / "account", 0, 2, 0, 14)
    assert audit_data.main([str(tmp_path)]) == 0
    assert "202 samples" in capsys.readouterr().out
    (tmp_path / "account" / "rank_1_attempt_0.jsonl").unlink()
    assert audit_data.main([str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["faults"]
    assert audit_data.main([str(tmp_path / "elsewhere")]) == 1
    assert "holds no account" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "rank_0_attempt_0.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(DataError, match="not a rank's account"):
        audit(tmp_path)
