import time
from dataclasses import asdict

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import randomized
from fitv2.conditioning import Condition
from fitv2.model import FiT
from fitv2.presets import PRESETS
from fitv2.tokens import Layout
from fitv2.training.optim import freeze
from fitv2.training.throughput import ByTime, MultiplyAdds, Rates, TrainingFlops, memory_gib, peak_flops


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


SHAPE = {"depth": 3, "width": 32, "heads": 2, "patch_size": 1, "in_channels": 8, "num_classes": 5}


@pytest.mark.parametrize("trainable", ["all", "post-training"])
@pytest.mark.parametrize("changes", [{}, {"adaln": "full", "mlp_width": 70, "qk_norm": False}], ids=str)
def test_as_many_as_torch_counts(changes, trainable):
    """Of the very products; attention by two plain ones, since the counter does not know the CPU's kernel."""
    model = randomized(FiT(**SHAPE | changes))
    freeze(model, trainable)
    layout = Layout.of([(2, 3), (2, 3), (4, 5)])
    condition = Condition.of(label=torch.tensor([1, 2, 3]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        output = model(torch.zeros(layout.tokens, 8), layout, torch.rand(3), condition)
        output.square().sum().backward()
    assert TrainingFlops(model)(layout.lengths) == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("name", "gflops", "parameters"), [
    ("fitv2-b", 27.3, 128_149_072), ("fitv2-xl", 147, 671_045_776), ("fitv2-3b", 653, 2_971_928_080),
    ("fit-b", 29.1, 158_664_224), ("fit-xl", 153, 823_599_392),
])  # fmt: skip
def test_multiply_adds_are_those_of_the_paper(name, gflops, parameters):
    """To half a percent: the paper's counter adds some for each norm."""
    with torch.device("meta"):
        model = FiT(**asdict(PRESETS[name].model))
    assert MultiplyAdds.of(model, 256).linear == pytest.approx(1e9 * gflops, rel=0.005)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_multiply_adds_are_those_that_torch_counts():
    model = randomized(FiT(**SHAPE))
    layout = Layout.of([(4, 5)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(20, 8), layout, torch.rand(1), Condition.of(label=torch.tensor([1])))
    found = MultiplyAdds.of(model, 20)
    assert 2 * (found.linear + found.attention) == counter.get_total_flops()


def test_a_longer_image_costs_more_a_token():
    flops = TrainingFlops(FiT(**SHAPE))
    assert flops([64]) < 2 * flops([32, 32])
    assert flops([1024]) / 1024 > flops([64] * 16) / 1024


def test_the_peak_is_measured_where_no_sheet_says_it():
    assert 1e8 < peak_flops(torch.device("cpu")) < 1e14


@pytest.mark.parametrize(("name", "rate"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12), ("NVIDIA H100 NVL", 835e12),
])  # fmt: skip
def test_accelerators_by_name(monkeypatch, name, rate):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak_flops.cache_clear()
    assert peak_flops(torch.device("cuda", 0)) == rate
    peak_flops.cache_clear()
