"""The stack of bits: the inverse of every step, and the length that entropy allows."""

import numpy as np
import pytest
from conftest import refused
from scipy import stats

from jaxvae.compression.ans import (
    BUCKETS,
    LEAST_HEAD,
    PRECISION,
    GaussianBuckets,
    Stack,
    Table,
    Uniform,
    centers,
    expect_gaussian,
)

RNG = np.random.default_rng(0)
TOTAL = 2**PRECISION


def empty(heads=16, below=None):
    return Stack(np.full(heads, LEAST_HEAD, np.uint64), np.zeros(0, np.uint32), below)


def bits(stack):
    return 32 * len(stack.words) + np.sum(np.log2(stack.heads / LEAST_HEAD))


def table_of(p):
    return Table.of_cdf(np.cumsum(p, axis=1)[:, :-1].astype(np.float32))


DISTRIBUTIONS = {
    "uniform over a power of two": Uniform(2**BUCKETS, 1000),
    "uniform": Uniform(7, 1000),
    "table": table_of(RNG.dirichlet(np.full(256, 0.05), 1000)),
    "of two values": table_of(RNG.dirichlet([0.1, 3], 1000)),
    "of one certain value": table_of(np.tile([0.0, 1.0, 0.0], (1000, 1))),
    "gaussian": GaussianBuckets(RNG.normal(size=1000), RNG.gamma(1, 0.5, 1000)),
    "gaussian far out": GaussianBuckets(np.full(1000, 40.0), np.full(1000, 1e-3)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_mass_is_at_least_1_and_all_of_them_fill_the_range(name):
    p = DISTRIBUTIONS[name].rows(slice(3, 4))
    values = {"uniform over a power of two": 2**BUCKETS, "uniform": 7}.get(name)
    if values is None:
        values = p.cumulative.shape[1] - 1 if isinstance(p, Table) else 2**BUCKETS
    each = [p.interval(np.array([k])) for k in range(values)]
    start, mass = (np.concatenate(x).astype(np.int64) for x in zip(*each, strict=True))
    assert mass.min() >= 1
    assert start[0] == 0
    np.testing.assert_array_equal(start + mass, [*start[1:], TOTAL])
    for k in (0, values // 2, values - 1):  # both ends of an interval are found
        for place in (start[k], start[k] + mass[k] - 1):
            assert p.find(np.array([place], np.uint64)) == k


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("seed", [(), (5, 1)])
def test_pop_is_the_inverse_of_push_and_push_that_of_pop(name, seed):
    p = DISTRIBUTIONS[name]
    words = np.random.default_rng(1).integers(0, 2**32, 3000, np.uint32)
    stack = Stack(np.full(16, LEAST_HEAD + 12345, np.uint64), words)
    popped = stack.pop(p, seed)
    assert len(popped) == 1000
    stack.push(p, popped, seed)
    np.testing.assert_array_equal(stack.words, words)
    assert np.all(stack.heads == LEAST_HEAD + 12345)

    symbols = np.random.default_rng(2).permutation(popped)
    stack.push(p, symbols, seed)
    np.testing.assert_array_equal(stack.pop(p, seed), symbols)
    np.testing.assert_array_equal(stack.words, words)


def test_the_length_is_the_entropy():
    p = np.random.default_rng(3).dirichlet(np.full(50, 0.3))
    symbols = np.random.default_rng(4).choice(50, 100_000, p=p)
    stack = empty()
    stack.push(table_of(np.tile(p, (100_000, 1))), symbols)
    information = -np.sum(np.log2(p[symbols]))
    assert bits(stack) == pytest.approx(information, rel=1e-3)


def test_popped_symbols_are_samples_of_the_gaussian_whatever_was_pushed_before():
    before = Uniform(2**BUCKETS, 20_000)
    stack = empty(below=lambda n: np.random.default_rng(5).integers(0, 2**32, n, np.uint32))
    stack.push(before, np.full(20_000, 3))  # always the same
    n = 20_000
    z = centers(stack.pop(GaussianBuckets(np.full(n, 0.3), np.full(n, 0.2)), seed=(1, 0)))
    assert stats.kstest((z - 0.3) / 0.2, "norm").pvalue > 1e-3


def test_buckets_have_equal_mass_under_the_prior():
    p = GaussianBuckets(np.zeros(2**BUCKETS), np.ones(2**BUCKETS))
    _, mass = p.interval(np.arange(2**BUCKETS))
    np.testing.assert_allclose(mass.astype(float), TOTAL / 2**BUCKETS, atol=1)
    ends = stats.norm.ppf(np.arange(2**BUCKETS + 1) / 2**BUCKETS)
    assert np.all(centers(np.arange(2**BUCKETS)) > ends[:-1])
    assert np.all(centers(np.arange(2**BUCKETS)) < ends[1:])


def test_an_empty_stack_and_nan_are_refused():
    with refused("it ends too early"):
        empty().pop(Uniform(256, 1000))
    with refused("NaN or infinity"):
        Table.of_cdf(np.array([[0.5, np.nan]], np.float32))
    with refused("NaN or infinity"):
        expect_gaussian(np.zeros(2), np.array([1, np.inf]))


def test_a_cdf_that_rounding_made_smaller_still_gives_every_value_a_mass():
    table = Table.of_cdf(np.array([[0.5, 0.5 - 1e-4, 1 + 1e-6]], np.float32))
    assert np.all(np.diff(table.cumulative.astype(np.int64)) >= 1)
