import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.distributed.fragment import FlatShard, ShardSpec, TensorSlice, copy_overlap, shard_views


def values_of(whole: np.ndarray, tensor_slice: TensorSlice) -> np.ndarray:
    return whole[tuple(slice(o, o + n) for o, n in zip(tensor_slice.offset, tensor_slice.extent, strict=True))]


SPECS = [
    ShardSpec.whole("w", (6, 8)),
    ShardSpec("w", (6, 8), (TensorSlice((2, 0), (3, 8)),)),
    ShardSpec("w", (6, 8), (TensorSlice((0, 4), (6, 2)),), dim=1),
    ShardSpec(
        "w", (6, 8), (TensorSlice((0, 0), (6, 2)), TensorSlice((0, 4), (6, 1)), TensorSlice((0, 7), (6, 1))), dim=1
    ),
    ShardSpec("w", (6, 8), (TensorSlice((1, 0), (2, 8)), TensorSlice((4, 0), (2, 8))), dim=0),
    ShardSpec("w", (6, 8), (TensorSlice((4, 0), (2, 8)),), padding=3),
    ShardSpec("w", (4, 3, 4), (TensorSlice((0, 1, 0), (4, 1, 4)), TensorSlice((0, 2, 0), (4, 1, 4))), dim=1),
]


def local_part(whole: np.ndarray, spec: ShardSpec) -> np.ndarray:
    parts = [values_of(whole, part) for part in spec.slices]
    if spec.padding:
        shape = list(spec.local_shape)
        shape[spec.dim] = spec.padding
        parts.append(np.full(shape, -1))
    return np.concatenate(parts, axis=spec.dim)


@pytest.mark.parametrize("spec", SPECS)
def test_windows_cover_exactly_the_elements_held(spec: ShardSpec) -> None:
    whole = np.arange(np.prod(spec.global_shape)).reshape(spec.global_shape)
    local = local_part(whole, spec)
    assert local.shape == spec.local_shape
    flat = local.reshape(-1)
    for start in range(flat.size):
        for stop in range(start, flat.size + 1):
            held = flat[start:stop]
            seen = 0
            for shard, where in shard_views(spec, start, stop):
                expected = values_of(whole, shard.tensor_slice).reshape(-1)[shard.start : shard.stop]
                np.testing.assert_array_equal(held[where], expected)
                seen += shard.length
            assert seen == (held >= 0).sum()


@st.composite
def tensor_slices(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorSlice:
    offset = tuple(draw(st.integers(0, n - 1)) for n in shape)
    extent = tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    return TensorSlice(offset, extent)


@st.composite
def pieces(draw: st.DrawFn, shape: tuple[int, ...]) -> FlatShard:
    tensor_slice = draw(tensor_slices(shape))
    start = draw(st.integers(0, tensor_slice.numel - 1))
    return FlatShard("w", shape, tensor_slice, start, draw(st.integers(1, tensor_slice.numel - start)))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=st.sampled_from([(7,), (5, 6), (3, 4, 5)]))
def test_copying_moves_exactly_what_pieces_share(data: st.DataObject, shape: tuple[int, ...]) -> None:
    wanted, held = data.draw(pieces(shape)), data.draw(pieces(shape))
    whole = np.arange(np.prod(shape)).reshape(shape)
    source = values_of(whole, held.tensor_slice).reshape(-1)[held.start : held.stop]
    expected = values_of(whole, wanted.tensor_slice).reshape(-1)[wanted.start : wanted.stop]
    target = np.full(wanted.length, -1)
    copied = copy_overlap(target, wanted, source, held)
    np.testing.assert_array_equal(target, np.where(np.isin(expected, source), expected, -1))
    assert copied == np.isin(expected, source).sum()
