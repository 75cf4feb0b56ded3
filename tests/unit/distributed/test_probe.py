import pytest

from megatrain.distributed.probe import neighbours, write_seconds


@pytest.mark.parametrize("size", [*range(1, 20), 4096])
def test_every_link_of_the_ring_is_used_once_and_nobody_waits_for_a_third_rank(size):
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


def test_a_folder_that_cannot_be_written_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        write_seconds(tmp_path / "gone", 1 << 20)
