import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastmum.data.rules.overlap import count_shared

images_and_points = st.integers(1, 9).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, 20)), max_size=80))
)


def overlap_of(num_images, observations):
    images, points = np.array(observations, np.int64).reshape(-1, 2).T
    return count_shared(images, points, num_images)


def test_three_images_by_hand():
    # 0 sees points 1 2 3 4, 1 sees 3 4, 2 sees 4 twice.
    overlap = overlap_of(4, [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (2, 4), (2, 4)])
    assert overlap.points.tolist() == [4, 2, 1, 0]
    assert [row.tolist() for row in overlap.row(0)] == [[1, 2], [2 / 4, 1 / 4]]
    assert [row.tolist() for row in overlap.row(1)] == [[0, 2], [2 / 2, 1 / 2]]
    assert [row.tolist() for row in overlap.row(2)] == [[0, 1], [1, 1]]
    assert [row.tolist() for row in overlap.row(3)] == [[], []]


def test_equal_neighbours_are_ranked_by_number():
    overlap = overlap_of(4, [(0, 1), (0, 2), (0, 3), (3, 1), (1, 2), (2, 1), (2, 3)])
    assert overlap.ranked(0).tolist() == [2, 1, 3]


@given(images_and_points)
def test_equals_intersections_of_sets(scene):
    num_images, observations = scene
    seen = [{point for image, point in observations if image == i} for i in range(num_images)]
    overlap = overlap_of(num_images, observations)
    assert overlap.points.tolist() == [len(points) for points in seen]
    for i in range(num_images):
        expected = {j: len(seen[i] & seen[j]) / len(seen[i]) for j in range(num_images) if j != i and seen[i] & seen[j]}
        neighbours, share = overlap.row(i)
        assert neighbours.tolist() == sorted(expected)
        assert share.tolist() == [expected[j] for j in sorted(expected)]
        assert overlap.ranked(i).tolist() == sorted(expected, key=lambda j: (-expected[j], j))


@given(images_and_points, st.randoms())
def test_order_of_observations_does_not_matter(scene, random):
    num_images, observations = scene
    shuffled = random.sample(observations, len(observations))
    for a, b in zip(overlap_of(num_images, observations), overlap_of(num_images, shuffled), strict=True):
        assert np.array_equal(a, b)


def test_a_scene_without_images_or_points():
    assert overlap_of(0, []).num_images == 0
    assert overlap_of(2, []).points.tolist() == [0, 0]
