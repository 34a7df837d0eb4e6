import pytest
import torch

from fitv2.conditioning import EMBEDDERS, Condition, LabelEmbedding
from fitv2.config import Architecture

ARCHITECTURE = Architecture(depth=1, width=8, heads=2, num_classes=5)


def labelled(*labels):
    return Condition.of(label=torch.tensor(labels))


def test_images_are_selected_and_concatenated():
    both = Condition.concatenate([labelled(1, 2), labelled(3).null()])
    assert len(both) == 3
    chosen = both.select([2, 0])
    assert chosen.values["label"].tolist() == [3, 1]
    assert chosen.present_B.tolist() == [False, True]


def test_what_is_dropped_stays_dropped():
    condition = labelled(1, 2, 3).drop(torch.tensor([True, False, False]))
    assert condition.drop(torch.tensor([False, False, True])).present_B.tolist() == [False, True, False]
    assert condition.null().present_B.tolist() == [False] * 3
    assert labelled(1, 2, 3).present_B.all()


def test_a_label_that_is_not_there_has_the_last_row():
    embedding = LabelEmbedding(ARCHITECTURE)
    rows = embedding(torch.tensor([4, 4]), torch.tensor([True, False]))
    assert torch.equal(rows, embedding.weight[[4, 5]])


@pytest.mark.parametrize("name", EMBEDDERS)
def test_every_embedder_can_be_reset(name):
    torch.manual_seed(0)
    embedder = EMBEDDERS[name](ARCHITECTURE)
    before = [parameter.clone() for parameter in embedder.parameters()]
    embedder.reset()
    after = embedder.parameters()
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_is_said_of_images_without_a_kind():
    assert len(Condition.nothing(3)) == 3
    assert not Condition.nothing(3).present_B.any()


def test_it_moves_between_devices():
    moved = labelled(1).to("meta")
    assert moved.values["label"].device.type == moved.present_B.device.type == "meta"
