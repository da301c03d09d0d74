import pytest

from dlrm_scale.whole_files import write_whole


def test_what_was_there_stays_where_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_whole(file, "first")
    assert file.read_text() == "first"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"] and file.read_text() == "first"
