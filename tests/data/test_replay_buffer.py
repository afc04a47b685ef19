"""The buffer keeps the newest transitions, in their order, and comes back from a checkpoint as it was."""

from __future__ import annotations

import pytest
import torch

from lit_diffrl.data.replay_buffer import ReplayBuffer
from lit_diffrl.errors import ConfigError


def insert(buffer: ReplayBuffer, first: int, count: int, epoch: int = 0) -> None:
    """Transitions whose state, reward and so on tell which they are."""
    n = torch.arange(first, first + count).float()
    buffer.insert(torch.stack([n, -n], 1), n[:, None] / 1000, 2 * n, torch.stack([n + 1, -n - 1], 1), n % 2 == 1, epoch)


def held(buffer: ReplayBuffer) -> list[int]:
    return [int(x) for x in buffer.rows()[:, 0]]


@pytest.mark.parametrize("parts", [(10,), (3, 3, 3, 1), (1,) * 10, (7, 3)])
def test_the_newest_are_kept_oldest_first_however_they_come(parts: tuple[int, ...]) -> None:
    buffer, first = ReplayBuffer(2, 1, 4), 0
    for epoch, count in enumerate(parts):
        insert(buffer, first, count, epoch)
        first += count
        assert held(buffer) == list(range(max(0, first - 4), first)) and len(buffer) == min(first, 4)
    assert sum(n for _, n in buffer.groups) == 4


def test_a_row_comes_back_with_all_its_parts() -> None:
    buffer = ReplayBuffer(2, 1, 5)
    insert(buffer, 0, 8)
    batch = buffer.transitions(torch.tensor([0, 4, 0]), torch.full((3,), 0.9))
    assert batch.obs.tolist() == [[3, -3], [7, -7], [3, -3]]
    assert batch.next_obs.tolist() == [[4, -4], [8, -8], [4, -4]]
    assert batch.reward.tolist() == [6, 14, 6] and batch.done.tolist() == [1, 1, 1]
    torch.testing.assert_close(batch.action[:, 0], torch.tensor([0.003, 0.007, 0.003]))
    assert batch.discount.tolist() == pytest.approx([0.9] * 3)


def test_the_age_is_that_of_the_rows_that_are_left() -> None:
    buffer = ReplayBuffer(2, 1, 6)
    assert buffer.age(3) == 0
    insert(buffer, 0, 4, epoch=0)
    insert(buffer, 4, 4, epoch=2)
    assert buffer.groups == [(0, 2), (2, 4)]
    assert buffer.age(5) == pytest.approx((2 * 5 + 4 * 3) / 6)


def test_only_the_newest_insertions_stay_where_asked() -> None:
    buffer = ReplayBuffer(2, 1, 100)
    for epoch in range(5):
        insert(buffer, 10 * epoch, 10, epoch)
        buffer.keep_newest(2)
    assert held(buffer) == list(range(30, 50)) and buffer.groups == [(3, 10), (4, 10)]


@pytest.mark.parametrize("capacity", [6, 3, 20])
def test_a_checkpoint_gives_the_same_rows_and_goes_on_like_the_buffer_it_is_of(capacity: int) -> None:
    buffer, again = ReplayBuffer(2, 1, 6), ReplayBuffer(2, 1, capacity)
    insert(buffer, 0, 4, 0)
    insert(buffer, 4, 5, 1)
    again.load_state_dict(buffer.state_dict(), torch.float32)
    assert held(again) == held(buffer)[-capacity:]
    assert sum(n for _, n in again.groups) == len(again)
    if capacity == 6:
        index = torch.arange(6)
        assert torch.equal(again.transitions(index, index).obs, buffer.transitions(index, index).obs)
        for b in (buffer, again):
            insert(b, 9, 4, 2)
        assert held(again) == held(buffer) and again.groups == buffer.groups


def test_numbers_that_are_not_finite_are_refused() -> None:
    buffer = ReplayBuffer(2, 1, 5)
    n = torch.ones(3)
    states = torch.ones(3, 2)
    states[1, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"1 of 3 synthetic transitions are not finite"):
        buffer.insert(torch.ones(3, 2), n[:, None], n, states, n, epoch=0)
    assert len(buffer) == 0


def test_what_a_checkpoint_held_moves_to_the_device() -> None:
    buffer = ReplayBuffer(2, 1, 5)
    insert(buffer, 0, 3)
    again = ReplayBuffer(2, 1, 5)
    again.to(torch.device("meta"))  # an empty one has nothing to move
    again.load_state_dict(buffer.state_dict(), torch.float64)
    assert again.rows().dtype == torch.float64
    again.to(torch.device("meta"))
    assert again.rows().device.type == "meta" and len(again) == 3


def test_an_empty_buffer_is_saved_and_takes_no_memory() -> None:
    buffer = ReplayBuffer(2, 1, 10**12)
    state = buffer.state_dict()
    assert state["rows"].shape == (0, 7)
    buffer.load_state_dict(state, torch.float32)
    assert len(buffer) == 0
    with pytest.raises(ConfigError, match="capacity"):
        ReplayBuffer(2, 1, 0)
