import pytest

from megatrain.distributed.probe import neighbours, write_seconds


@pytest.mark.parametrize("size", [*range(1, 20), 4096])
def test_every_ring_link_is_probed_once_without_deadlock(size):
    turns = [neighbours(rank, size) for rank in range(size)]
    assert max(map(len, turns)) <= 2
    met = set()
    waiting = list(range(size))
    while waiting:  # ranks whose next partners are each other go on; if none does, all wait for ever
        ready = [rank for rank in waiting if turns[rank] and turns[turns[rank][0]][:1] == [rank]]
        assert ready or not any(turns), "they wait in a circle"
        pairs = {frozenset((rank, turns[rank][0])) for rank in ready}
        assert not pairs & met
        met |= pairs
        for rank in ready:
            turns[rank] = turns[rank][1:]
        waiting = [rank for rank in waiting if turns[rank]]
    assert met == {frozenset((rank, (rank + 1) % size)) for rank in range(size) if size > 1}


def test_the_written_file_is_removed_again(tmp_path):
    assert write_seconds(tmp_path, 3 << 20) > 0
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_a_disk_error(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_seconds(tmp_path / "gone", 1 << 20)
