"""Numbers of views that fill a batch exactly, with a given distribution.

A batch of F frames is a multiset of sequence lengths S with sum F. How often each length occurs, c(S), is drawn from
independent Poisson variables of means w(S), conditioned on the sum and, where the cost of attention is bounded, on

    pairs = sum of S (S - 1) / 2 <= budget          (sum of S squared = F + 2 pairs).

With Z(r, b) the weight of all multisets of r frames and at most b pairs, everything is a look-up:

    r Z(r, b)     = sum over S of S w(S) Z(r - S, b - S (S - 1) / 2),    Z(0, b) = 1
    E[c(S)]       = w(S) Z(F - S, ...) / Z(F, budget)
    P(the sequence of a random frame has S views) = S w(S) Z(F - S, ...) / (F Z(F, budget)).

The second line, and its like for pairs of lengths, are gradient and Hessian of a convex function, so that Newton's
method finds the w(S) for which the expected share of frames in sequences of S views is exactly the one wanted; the
third line draws a batch, one sequence after another. (Conditioned Poisson structures: Arratia, Barbour and Tavaré,
"Logarithmic Combinatorial Structures", 2003.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NEWTON_STEPS = 60
TOLERANCE = 1e-8  # of shares of frames, their absolute differences added up
BACKTRACKS = 30
# Curvature added to Newton's problem: none, and where that has no solution, as little as can be computed.
RIDGES = (0.0, 1e-3, 1e-2, 1e-1)
ROUNDING = 1e-13  # of the value: near the end it falls by less than that, and how it is rounded differs by machine
LARGEST_STEP = 3.0  # of a log weight: where the shares cannot be met, they diverge


class Totals(NamedTuple):
    """How many frames the sequences of a batch have together: one number, or one of two.

    Args:
        frames: (2,) the totals, ascending; equal where there is one.
        chances: (2,) their probabilities.
    """

    frames: tuple[int, int]
    chances: tuple[float, float]

    @property
    def mean(self) -> float:
        """Expected frames."""
        return float(np.dot(self.frames, self.chances))

    @property
    def filled(self) -> list[tuple[int, float]]:
        """Totals other than 0 that occur, with their probabilities."""
        return [(t, c) for t, c in zip(self.frames, self.chances, strict=True) if t and c]


class Packing:
    """Draws lengths with an exact sum.

    Args:
        sizes: (n,) the lengths S, ascending.
        weights: (n,) w(S).
        total: most frames to fill.
        budget: most pairs; none: any number.
    """

    def __init__(self, sizes: np.ndarray, weights: np.ndarray, total: int, budget: int | None = None) -> None:
        self.sizes = sizes
        self.weights = weights
        self._frame_weights = sizes * weights
        self.budget = 0 if budget is None else budget
        self.pairs = np.zeros_like(sizes) if budget is None else sizes * (sizes - 1) // 2
        # Room for negative indices, whose weight is 0: two sequences may be taken from any state.
        self._row, self._column = 2 * int(sizes.max()), 2 * int(self.pairs.max())
        self._table = self._weights_of_multisets(total)
        self._flat = self._table.reshape(-1)
        self._back = -sizes * self._table.shape[1] - self.pairs  # from a state to that without a sequence of S

    def _weights_of_multisets(self, total: int) -> np.ndarray:
        width = self._column + self.budget + 1
        table = np.zeros((self._row + total + 1, width))
        table[self._row, self._column :] = 1
        flat = table.reshape(-1)
        before = (-self.sizes * width - self.pairs)[:, None] + np.arange(self._column, width)
        for frames in range(1, total + 1):
            smaller = flat.take(before + (self._row + frames) * width)
            table[self._row + frames, self._column :] = (self._frame_weights / frames) @ smaller
        return table

    def _state(self, frames: int, budget: int) -> int:
        return (self._row + frames) * self._table.shape[1] + self._column + budget

    def in_range(self, totals: Totals) -> bool:
        """Whether the weights of these totals, and what is computed of them, are positive and finite numbers."""
        total_weights = [self._flat[self._state(total, self.budget)] for total, _ in totals.filled]
        return min(total_weights) > 0 and bool(self._frame_weights.max() * self._flat.max() < np.inf)

    def log_weight(self, total: int) -> float:
        """log Z of a total; -inf where nothing sums to it."""
        with np.errstate(divide="ignore"):
            return float(np.log(self._flat[self._state(total, self.budget)]))

    def counts(self, total: int) -> np.ndarray:
        """(n,) expected number of sequences of each length."""
        state = self._state(total, self.budget)
        return self.weights * self._flat[state + self._back] / self._flat[state]

    def covariance(self, total: int) -> np.ndarray:
        """(n, n) covariance of the numbers of sequences of each length."""
        state, mean = self._state(total, self.budget), self.counts(total)
        without_two = self._flat[state + self._back[:, None] + self._back] / self._flat[state]
        return np.outer(self.weights, self.weights) * without_two + np.diag(mean) - np.outer(mean, mean)

    def shares(self, sizes: np.ndarray, totals: Totals) -> np.ndarray:
        """(n,) expected share of frames in sequences of the lengths `sizes`, ascending; 0 for those never drawn."""
        shares = np.zeros(len(sizes))
        frames = sum(chance * self.sizes * self.counts(total) for total, chance in totals.filled)
        shares[np.searchsorted(sizes, self.sizes)] = frames / totals.mean
        return shares

    def draw(self, total: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths with the sum `total`, int64."""
        lengths, budget = [], self.budget
        uniform = 1 - rng.random(total // int(self.sizes[0]))  # in (0, 1]: never the edge of a length that is not left
        while total:
            chances = np.cumsum(self._frame_weights * self._flat[self._state(total, budget) + self._back])
            i = int(np.searchsorted(chances, uniform[len(lengths)] * chances[-1]))
            lengths.append(self.sizes[i])
            total -= int(self.sizes[i])
            budget -= int(self.pairs[i])
        return np.array(lengths, dtype=np.int64)


def fit(sizes: np.ndarray, shares: np.ndarray, totals: Totals, budget: int | None = None) -> Packing | None:
    """The packing whose expected share of frames in sequences of each length is the one wanted.

    Lengths that no multiset of these totals contains are dropped; where the shares cannot be met, the numbers of
    sequences are near those wanted in the sense of least squares.

    Args:
        sizes: (n,) lengths, ascending.
        shares: (n,) share of frames wanted for each, all positive.
        totals: frames to fill.
        budget: most pairs.

    Returns:
        None where nothing of at most `budget` pairs has one of the totals.
    """
    most, filled = totals.frames[1], totals.filled
    packing = Packing(sizes, totals.mean * shares / sizes, most, budget)
    if not packing.in_range(totals):
        return None
    possible = sum(packing.counts(total) for total, _ in filled) > 0
    sizes, shares = sizes[possible], shares[possible] / shares[possible].sum()
    wanted = totals.mean * shares / sizes
    for ridge in RIDGES:
        packing, missed = _newton(sizes, wanted, totals, budget, ridge)
        if missed <= TOLERANCE:
            break
    return packing


def _newton(
    sizes: np.ndarray, wanted: np.ndarray, totals: Totals, budget: int | None, ridge: float
) -> tuple[Packing, float]:
    """Weights for the wanted numbers of sequences (n,), and the share of frames by which the equations are not solved.

    Minimises sum of chance * log Z(total) - wanted * x + ridge / 2 * (x - start)^2 over the log weights x.
    """
    most, filled, start = totals.frames[1], totals.filled, np.log(wanted)

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray, Packing]:
        packing = Packing(sizes, np.exp(x), most, budget)
        value = sum(chance * packing.log_weight(total) for total, chance in filled)
        gradient = sum(chance * packing.counts(total) for total, chance in filled)
        away = x - start
        return value - wanted @ x + ridge / 2 * away @ away, gradient - wanted + ridge * away, packing

    x = start
    # Weights that diverge, where the shares cannot be met, end in a step that cannot be computed.
    with np.errstate(all="ignore"):
        value, gradient, packing = evaluate(x)
        for _ in range(NEWTON_STEPS):
            if np.abs(gradient * sizes).sum() < TOLERANCE * most:
                break
            hessian = sum(chance * packing.covariance(total) for total, chance in filled) + ridge * np.eye(len(sizes))
            if not ridge:
                # The totals are fixed, so weights times a^S change nothing: that direction gets a curvature of its
                # own, and keeps the numbers of the table near 1.
                hessian += 1e-3 * np.outer(sizes, sizes) + 1e-12 * np.eye(len(sizes))
                x = x - sizes * packing.log_weight(most) / most
            step = -np.linalg.solve(hessian, gradient)
            step *= min(1.0, LARGEST_STEP / np.abs(step).max())
            for shorter in range(BACKTRACKS):
                trial = evaluate(x + step / 2**shorter)
                allowed = value + 0.25 * (gradient @ step) / 2**shorter + ROUNDING * max(1.0, abs(value))
                if trial[0] <= allowed and trial[2].in_range(totals):
                    break
            else:
                break
            x, (value, gradient, packing) = x + step / 2**shorter, trial
    return packing, float(np.abs(gradient * sizes).sum() / most)
