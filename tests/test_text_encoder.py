import json

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from fitv2.errors import UserError
from fitv2.text_encoder import LONGEST_CAPTION, MOST_TOKENS, caption_of, load_text_encoder

CAPTIONS = ["red apple", "", "two owls side by side", "日本の犬", "word " * 1000]


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A tiny CLIP as transformers saves it: letters are its tokens."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["wordllama", "clip"])
def encoder(request, tiny_clip):
    return load_text_encoder("wordllama" if request.param == "wordllama" else str(tiny_clip))


def test_captions_become_as_many_states_as_they_have_tokens(encoder):
    text = encoder.encode(CAPTIONS)
    assert len(text) == len(CAPTIONS)
    assert text.states_ME.shape == (sum(text.lengths), encoder.channels)
    assert text.pooled_BE.shape == (len(CAPTIONS), encoder.pooled_channels)
    assert text.lengths[0] < text.lengths[2] < text.lengths[4] == MOST_TOKENS
    assert text.states_ME.dtype == text.pooled_BE.dtype == torch.float32
    assert text.states_ME.isfinite().all()
    assert text.pooled_BE.isfinite().all()


def test_a_caption_is_the_same_whatever_is_beside_it(encoder):
    together = encoder.encode(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone, part = encoder.encode([caption]), together[torch.tensor([i])]
        torch.testing.assert_close(alone.states_ME, part.states_ME, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.pooled_BE, part.pooled_BE, rtol=1e-5, atol=1e-5)


def test_a_table_of_words_knows_words():
    text = load_text_encoder("wordllama").encode(["cat", "kitten", "railway station"])
    assert text.lengths == (1, 2, 2)
    whole = torch.nn.functional.normalize(text.pooled_BE)
    assert whole[0] @ whole[1] > 0.3 > whole[0] @ whole[2]


def test_the_states_of_a_clip_are_its_penultimate_ones(tiny_clip):
    encoder = load_text_encoder(str(tiny_clip))
    text = encoder.encode(["ab"])
    ids = torch.tensor([[52, 0, 27, 53]])  # start, a, b at the end of its word, end
    out = CLIPTextModel.from_pretrained(tiny_clip)(input_ids=ids, output_hidden_states=True)
    torch.testing.assert_close(text.states_ME, out.hidden_states[-2][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(text.pooled_BE, out.pooler_output, rtol=1e-5, atol=1e-5)


def test_the_released_layout_has_77_states_of_each_text(tiny_clip):
    encoder = load_text_encoder(f"{tiny_clip}:padded")
    assert encoder.name == f"{tiny_clip}:padded"  # that a card holds
    padded = encoder.encode(["ab", ""])
    assert padded.lengths == (77, 77)
    packed = load_text_encoder(str(tiny_clip)).encode(["ab"])
    torch.testing.assert_close(padded.states_ME[:4], packed.states_ME)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/clip", "there is no such folder"),
        ("organization/no-such-clip", "to fetch it from the hub, `allow_download`"),
    ],
)
def test_an_encoder_that_is_not_there_is_one_line(name, said):
    with pytest.raises(UserError, match=said) as raised:
        load_text_encoder(name)
    assert "\n" not in str(raised.value)


def test_a_folder_that_holds_no_clip_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('"openai/clip-vit-large-patch14"')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_text_encoder(str(tmp_path))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'fitv2\[text\]'"):
        load_text_encoder("wordllama")


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        (" a\n red\t apple ", "a red apple"),
        ("cafe\u0301", "caf\u00e9"),
        ("x" * 99_999, "x" * LONGEST_CAPTION),
        (["", "one", "two"], "one"),
        (b"caf\xc3\xa9", "caf\u00e9"),
        *((nothing, "") for nothing in (None, 3, float("nan"), [], {}, "  ", True)),
    ],
)
def test_captions_are_stored_as_people_read_them(value, caption):
    assert caption_of(value) == caption
