import pytest
import torch

from fitv2.conditioning import EMBEDDERS, Condition, LabelEmbedding, Text, TextEmbedding
from fitv2.config import Architecture
from fitv2.errors import UserError

ARCHITECTURE = Architecture(depth=1, width=8, heads=2, num_classes=5, text_channels=3, pooled_channels=2)


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


def texts(*lengths):
    """Texts of so many tokens, each token with a number of its own."""
    numbers = torch.arange(sum(lengths) * 3.0).reshape(-1, 3)
    pooled = torch.arange(len(lengths) * 2.0).reshape(-1, 2)
    return Text.of(list(zip(numbers.split(lengths), pooled, strict=True)))


def test_texts_are_selected_dropped_and_concatenated():
    text = texts(2, 0, 3)
    chosen = text[torch.tensor([2, 0])]
    assert chosen.lengths == (3, 2)
    assert torch.equal(chosen.states_ME, text.states_ME[[2, 3, 4, 0, 1]])
    assert torch.equal(chosen.pooled_BE, text.pooled_BE[[2, 0]])
    left = text.drop([True, False, False])
    assert left.lengths == (0, 0, 3)
    assert torch.equal(left.states_ME, text.states_ME[2:])
    both = Text.concatenate([left, text])
    assert (len(both), both.lengths) == (6, (0, 0, 3, 2, 0, 3))
    assert len(both.states_ME) == 8


def test_a_condition_of_texts_loses_their_tokens_with_them():
    condition = Condition.of(text=texts(2, 1), label=torch.tensor([1, 2]))
    assert condition.null().values["text"].lengths == (0, 0)
    dropped = condition.drop(torch.tensor([False, True]))
    assert dropped.values["text"].lengths == (2, 0)
    assert dropped.present_B.tolist() == [True, False]
    both = Condition.concatenate([condition, condition.null()])
    assert both.values["text"].lengths == (2, 1, 0, 0)
    assert both.select([3, 1]).values["text"].lengths == (0, 1)


def test_what_a_text_is_as_a_whole_and_what_stands_for_none():
    embedding = TextEmbedding(ARCHITECTURE)
    embedding.reset()
    text = texts(2, 1)
    rows = embedding(text, torch.tensor([True, False]))
    assert torch.equal(rows[0], embedding.pooled(text.pooled_BE)[0])
    assert torch.equal(rows[1], embedding.none)
    assert torch.equal(embedding(None, torch.tensor([False] * 2)), embedding.none.expand(2, -1))
    assert embedding.tokens(text).shape == (3, 8)


def test_a_label_below_zero_is_none():
    embedding = LabelEmbedding(ARCHITECTURE)
    rows = embedding(torch.tensor([4, -1]), torch.tensor([True, True]))
    assert torch.equal(rows, embedding.weight[[4, 5]])


def test_a_model_of_texts_needs_the_width_of_their_states():
    with pytest.raises(UserError, match="needs `text_channels`"):
        TextEmbedding(Architecture(depth=1, width=8, heads=2))
