import numpy as np
import pytest

from dlrm_scale.data.files import SAMPLE_BYTES, SAMPLES_PER_FILE, Piece, cut, digest, expand
from dlrm_scale.errors import DataError


def test_globs_expand_in_sorted_order_and_patterns_in_theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b_10", "b_2", "a_1"):
        (tmp_path / name).touch()
    assert [f.name for f in expand(["b_*", "a_1"])] == ["b_10", "b_2", "a_1"]


def test_a_pattern_without_a_match_names_itself_and_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for pattern in ("day_*.parquet", "day_0.parquet"):
        with pytest.raises(DataError) as e:
            expand([pattern])
        assert pattern in str(e.value) and str(tmp_path) in str(e.value)


def test_a_folder_and_a_file_named_twice_are_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match="is a folder"):
        expand([str(tmp_path)])
    with pytest.raises(DataError, match="twice"):
        expand([str(tmp_path / "a"), str(tmp_path / "*")])


def test_pieces_end_at_bounds_files_and_fractions_and_none_is_empty():
    bounds = [np.array([0, 4, 4, 10]), np.array([0, 10])]
    assert cut(bounds, (0.0, 1.0)) == [Piece(0, 0, 4), Piece(0, 4, 6), Piece(1, 0, 10)]
    assert cut(bounds, (0.1, 0.55)) == [Piece(0, 2, 2), Piece(0, 4, 6), Piece(1, 0, 1)]
    assert cut(bounds, (0.5, 1.0)) == [Piece(1, 0, 10)]
    assert cut(bounds, (0.0, 0.2)) == [Piece(0, 0, 4)]
    assert cut(bounds, (0.01, 0.02)) == []


def test_digest_sees_each_byte_of_a_small_file_and_the_tail_of_a_large_one(tmp_path):
    file = tmp_path / "data"
    small, large = SAMPLE_BYTES * SAMPLES_PER_FILE, 4 * SAMPLE_BYTES * SAMPLES_PER_FILE

    def digest_with(size: int, changed: int, tail_bytes: int) -> str:
        content = bytearray(size)
        content[changed] = 1
        file.write_bytes(content)
        return digest(file, tail_bytes)

    places = range(0, small, 9973)
    assert len({digest_with(small, place, 0) for place in places}) == len(places)
    tail = 3 * SAMPLE_BYTES  # longer than the last sample
    assert digest_with(large, large - tail, tail) != digest_with(large, large - tail + 1, tail)
    assert digest_with(small, 0, 0) != digest_with(small + 1, 0, 0)
