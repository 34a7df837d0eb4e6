import pytest
import torch

from fitv2.data.texts import TextCache
from fitv2.errors import UserError
from fitv2.text_encoder import load_text_encoder

CAPTIONS = ["red apple", "", "owl", "red apple", "two owls side by side"]


@pytest.fixture(scope="module")
def encoder():
    return load_text_encoder("wordllama")


def test_captions_are_encoded_once_and_come_back_for_each_image(encoder):
    cache, direct = TextCache(encoder, CAPTIONS), encoder.encode(CAPTIONS)
    text = cache.of(CAPTIONS)
    assert text.lengths == direct.lengths == (2, 0, 2, 2, 6)
    torch.testing.assert_close(text.states_ME, direct.states_ME, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(text.pooled_BE, direct.pooled_BE, rtol=1e-3, atol=1e-3)
    assert text.held_B.tolist() == [True, False, True, True, True]
    assert len(cache.captions) == 3


def test_what_was_encoded_is_kept_and_read_again(encoder, tmp_path, monkeypatch):
    first = TextCache(encoder, CAPTIONS, tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(type(encoder), "encode", lambda *_: pytest.fail("encoded again"))
    again = TextCache(encoder, CAPTIONS, tmp_path)
    assert torch.equal(first.of(CAPTIONS).states_ME, again.of(CAPTIONS).states_ME)
    monkeypatch.undo()
    TextCache(encoder, [*CAPTIONS, "dog"], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-10])
    assert torch.equal(
        first.of(CAPTIONS).states_ME, TextCache(encoder, CAPTIONS, tmp_path).of(CAPTIONS).states_ME
    )


def test_a_folder_that_cannot_be_written_is_no_trouble(encoder, tmp_path):
    (tmp_path / "file").touch()
    assert TextCache(encoder, CAPTIONS, tmp_path / "file").of(["owl"]).lengths == (2,)


def test_a_dataset_without_captions_has_nothing_to_learn(encoder):
    with pytest.raises(UserError, match="no image of the dataset has a caption"):
        TextCache(encoder, ["", ""])
