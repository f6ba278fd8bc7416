from itertools import pairwise

import numpy as np
import pytest

from nldist.estimate.blocks import Blocks, common, cut, places

# Where each rank's ids end: one rank, even, one without any, one with nearly all, more ranks than blocks.
SHARES = ([1.0], [0.5, 1.0], [0.0, 0.4, 0.4, 1.0], [0.01, 0.99, 1.0], [number / 23 for number in range(1, 24)])


def owned_by(num_ids: int, shares: list[float]) -> list[range]:
    ends = [0, *(round(share * num_ids) for share in shares)]
    return [range(*pair) for pair in pairwise(ends)]


@pytest.mark.parametrize("shares", SHARES, ids=len)
@pytest.mark.parametrize("num_ids", [0, 1, 2, 19, 20, 60, 207, 700])
def test_every_pair_meets_once_on_any_ranks(num_ids: int, shares: list[float]) -> None:
    blocks, ranks = Blocks(num_ids, least=10, part=7), owned_by(num_ids, shares)
    met = np.zeros((num_ids, num_ids), np.int64)
    for step in range(blocks.num_meetings):
        distance, part = divmod(step, blocks.num_parts)
        for turn in range(blocks.num_turns(ranks)):
            for owned in ranks:
                for meeting in blocks.meetings(owned, turn, distance, part):
                    assert common(meeting.rows, owned) == meeting.rows
                    here = (
                        slice(meeting.rows.start, meeting.rows.stop),
                        slice(meeting.columns.start, meeting.columns.stop),
                    )
                    met[here] += 1
                    met.T[here] += distance > 0
    np.testing.assert_array_equal(met, 1)


@pytest.mark.parametrize("shares", SHARES, ids=len)
@pytest.mark.parametrize("num_ids", [0, 1, 60, 207, 700])
def test_the_parts_of_all_blocks_are_all_ids(num_ids: int, shares: list[float]) -> None:
    blocks = Blocks(num_ids, least=10, part=7)
    seen = np.zeros(num_ids, np.int64)
    for part in range(blocks.num_parts):
        for owned in owned_by(num_ids, shares):
            for ids in blocks.part_of_each(owned, part):
                seen[ids.start : ids.stop] += 1
    np.testing.assert_array_equal(seen, 1)


def test_what_a_rank_meets_at_a_turn_is_bounded_and_even() -> None:
    blocks, ranks = Blocks(2_400_000), owned_by(2_400_000, [number / 64 for number in range(1, 65)])
    assert blocks.num_parts == 19
    for step in range(blocks.num_meetings):
        everyone = [blocks.meetings(owned, 0, *divmod(step, blocks.num_parts)) for owned in ranks]
        columns = [sum(len(meeting.columns) for meeting in meetings) for meetings in everyone]
        products = [sum(len(meeting.rows) * len(meeting.columns) for meeting in meetings) for meetings in everyone]
        assert max(columns) <= 2 * 4096
        assert min(products) > 0.99 * max(products)


def test_places_and_pieces() -> None:
    np.testing.assert_array_equal(places([range(3, 9), range(20, 30)], range(5, 22)), [0, 1, 2, 3, 15, 16])
    assert len(places([range(3, 5)], range(5, 22))) == 0
    for size in (64, 100, 1024):
        for num_ids in (0, 1, 63, 64, 65, 1000, 3175):
            pieces = cut(range(7, 7 + num_ids), size)
            assert [number for ids in pieces for number in ids] == list(range(7, 7 + num_ids))
            assert all(0 < len(ids) <= size for ids in pieces)
    for among in (2, 3, 16):
        for num_ids in (3175, 6451, 77_419):
            pieces = cut(range(7, 7 + num_ids), 1024, among)
            assert [number for ids in pieces for number in ids] == list(range(7, 7 + num_ids))
            assert max(map(len, pieces)) <= 1024
            most = -(-len(pieces) // among) * len(pieces[0])  # of one thread
            assert most < 1.15 * num_ids / among + 64
