"""Asymmetric numeral systems: a stack of bits, and the distributions by which symbols are coded.

A head s is a whole number from 2^32 to 2^64 - 1. To push a symbol whose mass is f of 2^28, after
symbols whose masses sum to c, is to compute

    s <- (s // f) 2^28 + c + s mod f

after the low 32 bits of s have been moved to the stack of words, if s would become too large. It
takes log2(2^28 / f) bits. To pop is the exact inverse, and a symbol that is popped from random bits
is a sample. Many heads, which share the words, take the symbols in turn, so that NumPy computes on
arrays.

The low bits of a head tell of the symbol pushed last, so they are not random. For a sample, whole
numbers from a generator are added to them (modulo 2^28), which decompression subtracts.

References:
  Duda (2013), Asymmetric numeral systems: range variant. Giesen (2014), Interleaved entropy coders.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt32, UInt64
from scipy import special

from jaxvae.errors import InputError

PRECISION = 28  # of probabilities: they are whole multiples of 2^-28
BUCKETS = 14  # log2 of the number of buckets of a latent
_TOTAL = 2**PRECISION
LEAST_HEAD = 2**32

Symbols = Int64[np.ndarray, " symbols"]
Masses = UInt64[np.ndarray, " symbols"]


class Distribution(Protocol):
    """Independent symbols, each with masses that are at least 1 and sum to 2^28."""

    def __len__(self) -> int:
        """The number of symbols."""

    def interval(self, symbols: Symbols) -> tuple[Masses, Masses]:
        """Return the sum of the masses before each symbol, and its own mass."""

    def rows(self, rows: slice) -> "Distribution":
        """Return some of the symbols' distributions."""

    def find(self, place: Masses) -> Symbols:
        """Return the symbol whose interval holds each whole number below 2^28."""


class Stack:
    """A stack of bits onto which symbols are pushed and from which they are popped.

    Attributes:
      heads: the heads.
      words: the words below the heads, the last one on top.
    """

    def __init__(
        self,
        heads: UInt64[np.ndarray, " heads"],
        words: UInt32[np.ndarray, " words"],
        below: Callable[[int], UInt32[np.ndarray, " n"]] | None = None,
    ) -> None:
        """Make a stack.

        Args:
          heads: the heads.
          words: the words.
          below: returns n more words for a stack that is empty; None: that is an error.
        """
        self.heads = heads.copy()
        self._buffer, self._size = words.copy(), len(words)
        self._below = below

    @property
    def words(self) -> UInt32[np.ndarray, " words"]:
        """The words below the heads, the last one on top."""
        return self._buffer[: self._size]

    def push(
        self, distribution: Distribution, symbols: Symbols, seed: tuple[int, ...] = ()
    ) -> None:
        """Push symbols, such that `pop` returns them.

        Args:
          distribution: of the symbols.
          symbols: from 0, one for each distribution.
          seed: as of `pop`.
        """
        start, mass = distribution.interval(symbols)
        added = _added(seed, len(symbols))
        heads = len(self.heads)
        for row in reversed(range(0, len(symbols), heads)):
            c, f = start[row : row + heads], mass[row : row + heads]
            s = self.heads[: len(f)]
            full = (s >> (64 - PRECISION)) >= f
            self._push_words(s[full].astype(np.uint32))
            s = np.where(full, s >> 32, s)
            quotient, rest = np.divmod(s, f)
            place = (rest + c - added[row : row + heads]) & (_TOTAL - 1)
            self.heads[: len(f)] = (quotient << PRECISION) + place

    def pop(self, distribution: Distribution, seed: tuple[int, ...] = ()) -> Symbols:
        """Pop symbols.

        Args:
          distribution: of the symbols.
          seed: of the whole numbers that make the symbols samples; (): none are added.

        Returns:
          The symbols.

        Raises:
          InputError: the stack is empty.
        """
        symbols = np.empty(len(distribution), np.int64)
        heads = len(self.heads)
        added = _added(seed, len(symbols))
        for row in range(0, len(symbols), heads):
            some = distribution.rows(slice(row, row + heads))
            s = self.heads[: len(some)]
            place = (s + added[row : row + heads]) & (_TOTAL - 1)
            found = some.find(place)
            c, f = some.interval(found)
            s = f * (s >> PRECISION) + place - c
            low = s < LEAST_HEAD
            s[low] = (s[low] << 32) | self._pop_words(int(np.count_nonzero(low)))
            self.heads[: len(some)] = s
            symbols[row : row + heads] = found
        return symbols

    def _push_words(self, words: UInt32[np.ndarray, " n"]) -> None:
        end = self._size + len(words)
        if end > len(self._buffer):
            self._buffer = np.concatenate([self.words, np.empty(end, np.uint32)])
        self._buffer[self._size : end] = words
        self._size = end

    def _pop_words(self, n: int) -> UInt32[np.ndarray, " n"]:
        if n > self._size:
            if self._below is None:
                raise InputError("it is damaged: it ends too early")
            self._buffer = np.concatenate([self._below(n - self._size), self.words])
            self._size = n
        self._size -= n
        return self._buffer[self._size : self._size + n]


@dataclass(frozen=True)
class Uniform:
    """Symbols of equal probability.

    Attributes:
      symbols: K, the number of values of a symbol.
      n: the number of symbols.
    """

    symbols: int
    n: int

    def __len__(self) -> int:
        """The number of symbols."""
        return self.n

    def interval(self, symbols: Symbols) -> tuple[Masses, Masses]:
        """Return ceil(2^28 k / K) and the difference to the next."""
        return _interval(lambda k: -(-k * _TOTAL // self.symbols), symbols)

    def rows(self, rows: slice) -> "Uniform":
        """Return some of the symbols' distributions."""
        return Uniform(self.symbols, len(range(*rows.indices(self.n))))

    def find(self, place: Masses) -> Symbols:
        """Return floor(K place / 2^28)."""
        return (place * self.symbols >> PRECISION).astype(np.int64)


class Table(NamedTuple):
    """Symbols with tables of their cumulative masses.

    Attributes:
      cumulative: for each symbol 0, the sums of the masses of the first k values, and 2^28.
    """

    cumulative: UInt32[np.ndarray, "symbols values+1"]

    @classmethod
    def of_cdf(cls, cdf: Float32[np.ndarray, "symbols ends"]) -> "Table":
        """Quantise cumulative probabilities.

            c_k = floor(F(k - 1) (2^28 - K)) + k

        so that each of the K values has a mass of at least 1.

        Args:
          cdf: the probabilities F(k) of at most k, of all values k but the last. Where rounding
            has made one of them smaller than the one before, it counts as equal.

        Returns:
          The table.

        Raises:
          InputError: a probability is NaN.
        """
        n, values = len(cdf), cdf.shape[1] + 1
        f = np.maximum.accumulate(np.clip(cdf, 0, 1), axis=1).astype(np.float64)
        _expect_numbers(f)
        cumulative = np.zeros((n, values + 1), np.uint32)
        cumulative[:, 1:-1] = f * (_TOTAL - values) + np.arange(1, values)
        cumulative[:, -1] = _TOTAL
        return cls(cumulative)

    def __len__(self) -> int:
        """The number of symbols."""
        return len(self.cumulative)

    def interval(self, symbols: Symbols) -> tuple[Masses, Masses]:
        """Return the sum of the masses before each symbol, and its own mass."""
        rows = np.arange(len(symbols))
        return _interval(lambda k: self.cumulative[rows, k], symbols)

    def rows(self, rows: slice) -> "Table":
        """Return some of the symbols' distributions."""
        return Table(self.cumulative[rows])

    def find(self, place: Masses) -> Symbols:
        """Return the number of values that end at or before each place."""
        ends = self.cumulative[:, 1:]
        return np.count_nonzero(ends <= place[:, None].astype(np.uint32), axis=1)


class GaussianBuckets(NamedTuple):
    """Gaussian variables, rounded to buckets of equal mass under N(0, 1).

    Bucket k is between the quantiles k / K and (k + 1) / K of N(0, 1), and

        c_k = floor(Phi((e_k - mean) / sd) (2^28 - K)) + k,    e_k = Phi^-1(k / K)

    Attributes:
      mean: means.
      sd: standard deviations.

    References:
      Townsend, Bird and Barber (2019), Practical lossless compression with latent variables using
      bits back coding, section 2.5.1.
    """

    mean: Float64[np.ndarray, " symbols"]
    sd: Float64[np.ndarray, " symbols"]

    def __len__(self) -> int:
        """The number of symbols."""
        return len(self.mean)

    def interval(self, symbols: Symbols) -> tuple[Masses, Masses]:
        """Return the sum of the masses before each bucket, and its own mass."""
        return _interval(self._cumulative, symbols)

    def rows(self, rows: slice) -> "GaussianBuckets":
        """Return some of the symbols' distributions."""
        return GaussianBuckets(self.mean[rows], self.sd[rows])

    def find(self, place: Masses) -> Symbols:
        """Return the bucket that holds each place, by bisection."""
        found = np.zeros(len(place), np.int64)
        for bit in reversed(range(BUCKETS)):
            later = found + 2**bit
            found = np.where(self._cumulative(later) <= place, later, found)
        return found

    def _cumulative(self, k: Symbols) -> Int64[np.ndarray, " symbols"]:
        ends, _ = _buckets()
        below = special.ndtr((ends[k] - self.mean) / self.sd)
        return (below * (_TOTAL - 2**BUCKETS)).astype(np.int64) + k


def centers(symbols: Int64[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Return the median of N(0, 1) within each bucket, Phi^-1((k + 1/2) / K)."""
    return _buckets()[1][symbols]


def expect_gaussian(mean: np.ndarray, sd: np.ndarray) -> GaussianBuckets:
    """Return Gaussians of any shape, flat.

    Raises:
      InputError: means or standard deviations are NaN or infinite.
    """
    flat = [np.asarray(x, np.float64).reshape(-1) for x in (mean, sd)]
    for x in flat:
        _expect_numbers(x)
    return GaussianBuckets(flat[0], np.maximum(flat[1], 1e-30))


def _expect_numbers(x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise InputError(
            "the model returns NaN or infinity for these images: expected a model whose training "
            "did not diverge"
        )


def _added(seed: tuple[int, ...], n: int) -> Masses:
    return np.random.PCG64(seed).random_raw(n) if seed else np.zeros(n, np.uint64)


def _interval(cumulative: Callable[[Symbols], np.ndarray], k: Symbols) -> tuple[Masses, Masses]:
    start, end = (cumulative(x).astype(np.uint64) for x in (k, k + 1))
    return start, end - start


@cache
def _buckets() -> tuple[Float64[np.ndarray, " ends"], Float32[np.ndarray, " buckets"]]:
    """Return the ends of the buckets of N(0, 1), from -inf to inf, and their medians."""
    quantiles = np.arange(2 ** (BUCKETS + 1) + 1) / 2 ** (BUCKETS + 1)
    x = special.ndtri(quantiles)
    return x[::2], x[1::2].astype(np.float32)
