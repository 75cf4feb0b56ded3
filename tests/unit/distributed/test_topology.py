from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatrain.distributed.topology import AXES, Axis, Coordinate, Topology

degrees = st.builds(Topology, pipeline=st.integers(1, 5), data=st.integers(1, 5), tensor=st.integers(1, 5))
axis_sets = st.sampled_from([axes for count in range(4) for axes in itertools.combinations(AXES, count)])


def groups(mesh: Topology, *axes: Axis) -> list[list[int]]:
    """Each group once, in the order of its first rank."""
    return [ranks for rank in range(mesh.world_size) if (ranks := mesh.group(rank, *axes))[0] == rank]


def test_the_named_example_has_tensor_innermost() -> None:
    mesh = Topology.of(8, tensor=2, pipeline=2)
    assert mesh.data == 2
    assert mesh.coordinate(5) == Coordinate(pipeline=1, data=0, tensor=1)
    assert groups(mesh, "tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups(mesh, "data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert groups(mesh, "pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert groups(mesh, "pipeline", "tensor") == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), [(7, 2, 1), (8, 3, 1), (2, 2, 2)])
def test_degrees_not_dividing_the_ranks_are_refused(world_size: int, tensor: int, pipeline: int) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        Topology.of(world_size, tensor, pipeline)


@given(degrees)
def test_ranks_and_places_map_one_to_one(mesh: Topology) -> None:
    places = [mesh.coordinate(rank) for rank in range(mesh.world_size)]
    assert len(set(places)) == mesh.world_size
    assert [mesh.rank(place) for place in places] == list(range(mesh.world_size))


@given(degrees, axis_sets)
def test_groups_along_axes_partition_the_ranks_evenly(mesh: Topology, axes: tuple[Axis, ...]) -> None:
    found = groups(mesh, *axes)
    assert sorted(itertools.chain(*found)) == list(range(mesh.world_size))
    size = 1
    for axis in axes:
        size *= getattr(mesh, axis)
    assert {len(group) for group in found} == {size}
    for group in found:
        assert group == sorted(group)
        assert all(mesh.group(rank, *axes) == group for rank in group)
        fixed = [axis for axis in AXES if axis not in axes]
        assert len({tuple(getattr(mesh.coordinate(rank), axis) for axis in fixed) for rank in group}) == 1
