import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlrm_scale.config_io import load_config
from dlrm_scale.data.open import open_source, preflight
from tools import prepare_data

ROOT = Path(__file__).parents[2]
REVIEWS = Path(os.environ.get("DLRM_SCALE_DATA", ROOT / "../shared/data")) / "amazon_electronics_2023"
NUM_ITEMS = 20


@pytest.fixture
def reviews(tmp_path) -> dict[str, list[dict]]:
    """Random reviews of few users and items in few points of time, so that ties and repeats are many."""
    rng = random.Random(1)
    folder = tmp_path / "reviews"
    folder.mkdir()
    items = [
        {
            "item_id": f"i{n:02}",
            "category": f"c{n % 3}",
            "brand": None if n % 5 == 0 else f"b{n % 4}",
            "price": None if n % 7 == 0 else float(n),
        }
        for n in range(NUM_ITEMS)
    ]
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    splits = {}
    for split, times in (("train", (0, 10)), ("val", (10, 13)), ("test", (13, 16))):
        splits[split] = [
            {"user_id": f"u{rng.randrange(8)}", "item_id": f"i{rng.randrange(NUM_ITEMS - 8):02}", "timestamp": time}
            for time in sorted(rng.choices(range(*times), k=30))
        ]
        pq.write_table(pa.Table.from_pylist(splits[split]), folder / f"{split}.parquet")
    return splits


def run(tmp_path: Path, *options: str) -> dict[str, list[dict]]:
    output = tmp_path / "out"
    assert prepare_data.main(["amazon", "--input", str(tmp_path / "reviews"), "--output", str(output), *options]) == 0
    return {split: pq.read_table(output / f"{split}.parquet").to_pylist() for split in ("train", "val", "test")}


def test_samples_are_what_a_plain_loop_over_the_reviews_gives(reviews, tmp_path):
    samples = run(tmp_path, "--negatives", "2", "--max-history", "4")
    every = [review for split in reviews.values() for review in split]
    number = {name: n for n, name in enumerate(sorted({r["user_id"] for r in every}))}
    before: list[dict] = []
    for split, split_reviews in reviews.items():
        expected = []
        for review in split_reviews:
            own = [r for r in before if r["user_id"] == review["user_id"]]
            earlier = [int(r["item_id"][1:]) for r in own if r["timestamp"] < review["timestamp"]]
            before.append(review)
            if earlier and review["item_id"] not in [r["item_id"] for r in own]:
                expected.append((number[review["user_id"]], int(review["item_id"][1:]), earlier[-4:]))
        positives = [s for s in samples[split] if s["label"] == 1]
        assert [(s["user"], s["item"], s["history_item"]) for s in positives] == expected
        assert len(expected) > 3


def test_negatives_follow_their_positive_and_were_never_reviewed(reviews, tmp_path):
    seen = {(r["user_id"], int(r["item_id"][1:])) for split in reviews.values() for r in split}
    users = sorted({user for user, _ in seen})
    for split in run(tmp_path, "--negatives", "3").values():
        assert [s["label"] for s in split] == [1, 0, 0, 0] * (len(split) // 4)
        for at, sample in enumerate(split):
            positive = split[at - at % 4]
            assert (sample["user"], sample["history_item"]) == (positive["user"], positive["history_item"])
            assert ((users[sample["user"]], sample["item"]) in seen) == (sample["label"] == 1)


def test_attributes_are_those_of_the_item(reviews, tmp_path):
    for sample in run(tmp_path)["train"]:
        item = sample["item"]
        assert sample["category"] == item % 3
        assert sample["brand"] == (None if item % 5 == 0 else item % 4)
        assert sample["price"] == (None if item % 7 == 0 else item)
        assert sample["history_category"] == [i % 3 for i in sample["history_item"]]


def test_the_seed_decides_the_negatives_and_nothing_else(reviews, tmp_path):
    first, again, other = run(tmp_path), run(tmp_path), run(tmp_path, "--seed", "1")
    assert first == again != other
    assert [[s for s in split if s["label"]] for split in first.values()] == [
        [s for s in split if s["label"]] for split in other.values()
    ]


def test_faults_of_the_user(reviews, tmp_path, capsys):
    args = ["amazon", "--input", str(tmp_path / "reviews"), "--output", str(tmp_path / "out")]
    pq.write_table(
        pa.table({"user_id": ["u0"], "item_id": ["i99"], "timestamp": [16]}), tmp_path / "reviews/test.parquet"
    )
    assert prepare_data.main(args) == 1
    assert "test.parquet reviews item i99" in capsys.readouterr().err
    (tmp_path / "reviews/items.parquet").unlink()
    assert prepare_data.main(args) == 1
    assert "items.parquet is absent" in capsys.readouterr().err
    for wrong in (
        ["amazon"],
        [*args, "--negatives", "0"],
        ["criteo", "--input", "x", "--output", "y", "--format", "csv"],
    ):
        with pytest.raises(SystemExit) as e:
            prepare_data.main(wrong)
        assert e.value.code == 2


def test_no_item_left_for_a_negative_is_refused(reviews, tmp_path, capsys):
    everything = {"user_id": ["u0"] * NUM_ITEMS, "item_id": [f"i{n:02}" for n in range(NUM_ITEMS)]}
    pq.write_table(pa.table(everything | {"timestamp": [16] * NUM_ITEMS}), tmp_path / "reviews/test.parquet")
    assert prepare_data.main(["amazon", "--input", str(tmp_path / "reviews"), "--output", str(tmp_path / "out")]) == 1
    assert f"all {NUM_ITEMS} items" in capsys.readouterr().err


@pytest.mark.skipif(not REVIEWS.exists(), reason=f"no Amazon reviews at {REVIEWS}")
def test_the_configuration_fits_what_is_prepared_from_the_real_reviews(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepare_data.main(["amazon", "--input", str(REVIEWS), "--output", "prepared/amazon_electronics"]) == 0
    config = load_config(ROOT / "configs/amazon_electronics.yaml")
    checked = {}
    for split in ("train", "eval"):
        source = open_source(config.data, config.features, split, config.seed)
        checked[split] = preflight(source, 10**9)
        assert set(source.mended) <= {"rows of sequence history cut to the last 20 events"}
    assert checked == {"train": 190_752, "eval": 12_848}
