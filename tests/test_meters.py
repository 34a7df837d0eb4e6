import time

import pytest
import torch

from fitv2.meters import ByTime, Rates, memory_gib


def test_losses_by_time():
    losses = ByTime(torch.device("cpu"))
    assert losses.means("loss") == {}
    losses.add(torch.tensor([0.0, 0.19, 0.5]), torch.tensor([1.0, 3.0, 5.0]))
    losses.add(torch.tensor([1.0]), torch.tensor([7.0]))  # the end belongs to the last
    assert losses.means("loss") == {
        "loss": 4.0, "loss_by_time/0.0-0.2": 2.0, "loss_by_time/0.4-0.6": 5.0, "loss_by_time/0.8-1.0": 7.0
    }  # fmt: skip


def test_rates_of_the_time_spent_in_steps():
    rates = Rates(peak=1e6)
    for _ in range(2):
        with rates.step():
            with rates.waiting():
                time.sleep(0.02)
            time.sleep(0.02)
        rates.count([4, 6], images=4, flops=1000)
        time.sleep(0.05)  # validation, say
    values = rates.values(ranks=2)
    seconds = 8 / values["speed/images_per_second"]
    assert 0.08 <= seconds < 0.1 + 0.08
    assert values["speed/tokens_per_second"] == pytest.approx(40 / seconds)
    assert values["speed/share_of_peak_flops"] == pytest.approx(2000 / seconds / 1e6)
    assert 0.2 < values["speed/data_wait_share"] < 0.8
    assert 0.04 <= rates.latest < seconds


def test_memory():
    assert 0.05 < memory_gib(torch.device("cpu")) < 100
