import numpy as np

from dlrm_scale.data.hashing import hash64, normal, permutation, stream, uniform


def test_hash_is_splitmix64():
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # the generator's first outputs, seed 0
    assert hash64(np.uint64(0), np.arange(1, 4)).tolist() == reference


def test_a_counter_is_not_changed():
    counter = np.arange(4, dtype=np.uint64)
    hash64(np.uint64(1), counter)
    assert counter.tolist() == [0, 1, 2, 3]


def test_streams_differ_by_every_part_and_not_by_the_kind_of_integer():
    parts = [("a", "bc"), ("ab", "c"), ("a", "b", "c"), ("1",), (1,), (1, "a"), (2, "a")]
    assert len({int(stream(*p)) for p in parts}) == len(parts)
    assert stream("epoch", 3) == stream("epoch", np.int64(3))


def test_uniform_and_normal_have_their_moments():
    counter = np.arange(200_000)
    u, z = uniform(stream("u"), counter), normal(stream("z"), counter)
    assert 0 <= u.min() and u.max() < 1
    histogram = np.histogram(u, bins=20, range=(0, 1))[0]
    assert abs(histogram - 10_000).max() < 4 * np.sqrt(10_000)
    error = 1 / np.sqrt(len(z))
    assert abs(z.mean()) < 4 * error and abs(z.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96) * error
    assert abs(np.corrcoef(z, normal(stream("other"), counter))[0, 1]) < 4 * error


def test_permutation_holds_each_place_once():
    for n in (0, 1, 2, 1000):
        assert sorted(permutation(stream("p"), n)) == list(range(n))
    assert permutation(stream("p"), 1000).tolist() != permutation(stream("q"), 1000).tolist()
