"""Rules that form sequences, against the same rules on Python sets and against examples computed by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmum.data.rules import CHUNK, angle_chains, count_shared, cut_into_chunks, nearest_of_anchor, overlap_chains

scenes = st.lists(st.sets(st.integers(0, 15)), min_size=1, max_size=10)
# Multiples of 7 degrees up to 343: no two cameras differ by the 10 degrees where rounding would decide.
headings = st.lists(st.integers(0, 49).map(lambda k: 7 * k), min_size=10, max_size=10)


def overlap_of(seen):
    pairs = np.array([(i, p) for i, points in enumerate(seen) for p in points], np.int64).reshape(-1, 2)
    return count_shared(*pairs.T, len(seen))


def drawn(rule, seen, *options):
    """Sequences that a rule with random anchors makes of the points that images see."""
    return [chain.tolist() for chain in rule(overlap_of(seen), np.random.default_rng(0), *options)]


def chains_of(seen, degrees, *options, **bounds):
    t = np.radians(degrees)
    zero, one = np.zeros(len(t)), np.ones(len(t))
    rotations = np.array([[np.cos(t), zero, np.sin(t)], [zero, one, zero], [-np.sin(t), zero, np.cos(t)]]).transpose(
        2, 0, 1
    )
    return [chain.tolist() for chain in angle_chains(overlap_of(seen), rotations, *options, **bounds)]


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(1, 120), st.booleans())
def test_every_frame_is_in_one_chunk(frames, size, rest):
    chunks = cut_into_chunks(frames, size, rest)
    assert [i for chunk in chunks for i in chunk] == list(range(frames))
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(len(chunk) <= size for chunk in chunks[: -1 if rest else None])
    assert CHUNK == 100
    if rest and frames:  # the released scripts give the rest to the last chunk
        assert len(chunks) == max(1, (frames - 1) // size)
        assert min(frames, size + 1) <= len(chunks[-1]) <= 2 * size


@settings(deadline=None)
@given(scenes, st.randoms())
def test_overlap_equals_intersections_of_sets(seen, random):
    """Repeated observations count once, and their order does not matter."""
    observations = [(i, p) for i, points in enumerate(seen) for p in points]
    observations += random.sample(observations, len(observations) // 2)
    random.shuffle(observations)
    overlap = count_shared(*np.array(observations, np.int64).reshape(-1, 2).T, len(seen))
    assert overlap.points.tolist() == [len(points) for points in seen]
    for i, points in enumerate(seen):
        expected = {j: len(points & other) / len(points) for j, other in enumerate(seen) if j != i and points & other}
        neighbours, share = overlap.row(i)
        assert neighbours.tolist() == sorted(expected)
        assert share.tolist() == [expected[j] for j in sorted(expected)]
        assert overlap.ranked(i).tolist() == sorted(expected, key=lambda j: (-expected[j], j))


@settings(deadline=None)
@given(scenes, st.integers(2, 12))
def test_chains_of_overlap_equal_the_rule_on_sets(seen, length):
    for chain in drawn(overlap_chains, seen, 5, length):
        expected = chain[:1]
        while len(expected) < length:
            last = seen[expected[-1]]
            left = [j for j in range(len(seen)) if j not in expected and last & seen[j]]
            if not left:
                break
            expected.append(max(left, key=lambda j: (len(last & seen[j]) / len(last), -j)))
        assert chain == expected
        assert len(chain) >= 2


@settings(deadline=None)
@given(scenes, st.integers(2, 10), st.lists(st.booleans(), min_size=10, max_size=10), st.booleans())
def test_nearest_of_an_anchor_equals_the_rule_on_sets(seen, length, present, whole):
    """An anchor whose file is missing costs a sequence; other missing files are left out."""
    present = [whole or each for each in present[: len(seen)]]
    found = drawn(nearest_of_anchor, seen, 5, length, None if whole else np.array(present))
    drawn_from_all = drawn(nearest_of_anchor, seen, 5, 1)
    assert [anchor for anchor, *_ in found] == [
        i for (i, *_) in drawn_from_all if present[i] and sum(present) >= length
    ]
    for anchor, *others in found:
        images = [j for j in range(len(seen)) if present[j] and j != anchor]
        assert others == sorted(images, key=lambda j: (-len(seen[anchor] & seen[j]), j))[: length - 1]


def test_chains_of_angles_by_hand():
    seen, degrees = [set(range(10)), {0, *range(20, 29)}], [0, 10]  # a tenth, either way
    assert chains_of(seen, degrees, 2, min_overlap=0.10, min_angle=10 - 1e-9) == [[0, 1]]
    assert chains_of(seen, degrees, 2, min_overlap=0.10, min_angle=10 + 1e-9) == []
    assert chains_of(seen, degrees, 2, min_overlap=0.11, min_angle=10 - 1e-9) == []
    # Images of a short chain are free again: 2 is in reach of 3, and 1 of 2; from 1, which has 100 points, 2 is not.
    seen = [set(range(101)), set(range(81, 181)), {*range(176, 181), *range(200, 205)}, set(range(200, 230))]
    assert chains_of(seen, [0, 30, 60, 90], 2) == [[0, 1], [3, 2]]
    assert chains_of(seen, [0, 30, 60, 90], 3) == [[3, 2, 1, 0]]


@settings(deadline=None)
@given(scenes, headings, st.integers(1, 4))
def test_chains_of_angles_follow_the_rule_on_sets(seen, degrees, min_views):
    chains, used = chains_of(seen, degrees[: len(seen)], min_views), set()

    def scores(i, barred):
        result = {}
        for j in range(len(seen)):
            turn = abs(degrees[i] - degrees[j])
            turn = min(turn, 360 - turn)
            if j != i and j not in barred and turn >= 10 and seen[i] and len(seen[i] & seen[j]) / len(seen[i]) >= 0.1:
                cosine = math.cos(math.radians(turn))
                result[j] = len(seen[i] & seen[j]) / len(seen[i]) * 4 * cosine * (1 - cosine)
        return result

    for chain in chains:
        assert len(chain) >= min_views
        assert not used & set(chain)
        for k, (i, j) in enumerate(pairwise(chain)):
            left = scores(i, used | set(chain[: k + 1]))
            assert left[j] == pytest.approx(max(left.values()), abs=1e-9)
        assert not scores(chain[-1], used | set(chain))
        used |= set(chain)
    if min_views == 1:
        assert used == set(range(len(seen)))
        starts = [len(seen[chain[0]]) for chain in chains]
        assert starts == sorted(starts, reverse=True)
