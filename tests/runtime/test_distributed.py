import time
from threading import Thread

import pytest
import torch
import torch.distributed as dist

from conftest import together
from fitv2.errors import UserError
from fitv2.runtime.distributed import World, divide_work, fresh, join, ranks


def test_ranks_are_those_of_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks() == (2, 3)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK=3 and WORLD_SIZE=3"):
        ranks()


def test_a_world_of_one_needs_nobody():
    with join() as world:
        assert (world, world.first) == (World(0, 1), True)
        value = torch.ones(2)
        world.add_up([value])
        world.wait()
        assert value.tolist() == [1, 1]
        assert world.any(True)
        assert not world.any(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_is_divided_and_all_have_the_whole_of_it(dtype):
    stack = torch.arange(5.0)[:, None, None].expand(5, 2, 3).to(dtype)
    assert torch.equal(divide_work(lambda x: x + 1, stack), stack + 1)  # alone

    def work(rank):
        done = []

        def add_one(x):
            done.append(len(x))
            return x + 1

        with join():
            assert torch.equal(divide_work(add_one, stack), stack + 1)
            assert torch.equal(divide_work(add_one, stack[:1]), stack[:1] + 1)
        assert done == {0: [2, 1], 1: [2], 2: [1]}[rank]

    assert together(3, work) == [None] * 3


def test_ranks_that_torchrun_did_not_give_cannot_train_together(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="only under torchrun"), join():
        pass


def meet(store, size, seconds=10.0):
    """What each of so many processes gets as its part of the store."""
    found = {}

    def come(rank):
        time.sleep(0.05 * (size - rank))
        found[rank] = fresh(store, rank, size, seconds).underlying_store, fresh_prefix(store)

    def fresh_prefix(store):
        return store.get("fitv2/go").decode()

    threads = [Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == size
    return {prefix for _, prefix in found.values()}


def test_each_attempt_meets_in_a_part_of_its_own():
    """Also after one in which a process came and went before the others."""
    store = dist.HashStore()
    (first,) = meet(store, 3)
    store.set("fitv2/here/1", "gone")
    store.set("fitv2/seen/2", "something old")
    (second,) = meet(store, 3)
    assert first != second
    assert "gone" not in second


def test_one_that_nobody_meets_gives_up():
    with pytest.raises(UserError, match="did not come in time"):
        fresh(dist.HashStore(), 0, 2, 0.2)
