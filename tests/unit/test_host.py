"""What this host has: memory under a container's limit, and the C++ compiler; the doctor sees the same."""

import os
import shutil

import pytest

from dlrm_scale import host
from tools.doctor import facts


@pytest.fixture
def container(tmp_path, monkeypatch):
    """Writes the files of a cgroup."""
    monkeypatch.setattr(host, "CGROUP", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(f"{text}\n")

    return write


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 1_000_000), ("max", None), (None, None)])
def test_a_container_s_limit_is_its_memory(container, limit, expected):
    if limit is not None:
        container(max=limit)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.host_bytes() == (expected or physical)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("1000000", "400000", 600_000), ("1000000", "1200000", 0), ("max", "400000", 5_000_000 * 1024)],
)
def test_what_a_container_may_still_take_is_what_is_available(container, tmp_path, monkeypatch, limit, used, expected):
    monkeypatch.setattr(host, "MEMINFO", tmp_path / "meminfo")
    host.MEMINFO.write_text("MemTotal:  9000000 kB\nMemAvailable:  5000000 kB\n")
    container(max=limit, current=used)
    assert host.available_bytes() == expected


@pytest.mark.parametrize(
    ("named", "words"), [(None, ["c++"]), ("", ["c++"]), ("ccache g++", ["ccache", "g++"]), ("g++ '", ["g++ '"])]
)
def test_the_compiler_is_the_one_that_cxx_names(monkeypatch, named, words):
    monkeypatch.delenv("CXX", raising=False)
    if named is not None:
        monkeypatch.setenv("CXX", named)
    assert host.cpp_compiler() == words


def test_the_doctor_finds_a_compiler_of_several_words(monkeypatch):
    monkeypatch.setenv("CXX", "env c++")
    assert facts._compiler() == f"{shutil.which('env')} c++"
    for named in ("no_such_compiler c++", "g++ '"):
        monkeypatch.setenv("CXX", named)
        assert facts._compiler() is None
