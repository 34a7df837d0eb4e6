import math

import pytest
import torch

from fitv2.config import Rope
from fitv2.errors import UserError
from fitv2.kernels import rotate
from fitv2.rope import METHODS, absolute, frequencies, mscale, rotation, scaled_frequencies
from fitv2.tokens import Layout

GRID = Layout.of([(8, 13)])  # position (row, column) is token 13·row + column


def turned(positions, head_dim=8, seed=0):
    x = torch.randn(1, 2, head_dim, generator=torch.Generator().manual_seed(seed))
    tokens = [13 * row + column for row, column in positions]
    return rotate(x.expand(len(positions), -1, -1), rotation(GRID, head_dim, Rope())[tokens])


def test_frequencies_are_those_of_the_paper():
    torch.testing.assert_close(frequencies(8), torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_rows_turn_the_first_half_and_columns_the_second():
    still, by_row, by_column = turned([[0, 0], [1, 0], [0, 1]])
    assert torch.equal(by_row[:, 4:], still[:, 4:])
    assert torch.equal(by_column[:, :4], still[:, :4])
    assert not torch.allclose(by_row[:, :4], still[:, :4])


def test_pairs_are_interleaved():
    x = torch.tensor([[[1.0, 0, 1, 0, 0, 0, 0, 0]]])
    result = rotate(x, rotation(GRID, 8, Rope())[13:14])[0, 0]
    one, tenth = torch.tensor(1.0), torch.tensor(0.01)
    expected = torch.stack([one.cos(), one.sin(), tenth.cos(), tenth.sin()])
    torch.testing.assert_close(result[:4], expected)


def test_scores_depend_on_relative_position_alone():
    q = turned([[0, 0], [5, 9]], seed=1)
    k = turned([[2, 3], [7, 12]], seed=2)
    scores = (q * k).sum(-1)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_angles_are_float32_whatever_the_model_is():
    turns = rotation(Layout.of([(2, 3)]), 8, Rope("yarn", train_side=2))
    result = rotate(torch.ones(6, 1, 8, dtype=torch.bfloat16), turns)
    assert turns.dtype == torch.complex64
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_within_the_trained_size_nothing_is_scaled(method):
    rope, size_B2 = Rope(method, train_side=16), torch.tensor([[16, 16], [3, 9]])
    plain = frequencies(36).expand(2, 2, -1)
    torch.testing.assert_close(scaled_frequencies(rope, size_B2, 36), plain)
    assert torch.equal(mscale(rope, size_B2), torch.ones(2))


def test_interpolation_squeezes_every_frequency_and_ntk_the_slow_ones():
    size_B2 = torch.tensor([[32, 32]])
    pi = scaled_frequencies(Rope("pi", train_side=16), size_B2, 36)[0, 0]
    torch.testing.assert_close(pi, frequencies(36) / 2)
    ratio = scaled_frequencies(Rope("ntk", train_side=16), size_B2, 36)[0, 0] / frequencies(36)
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(1 / 2, rel=1e-5)
    assert (ratio.diff() < 0).all()


@pytest.mark.parametrize("method", ["yarn", "ntk-by-parts"])
def test_blends_keep_fast_frequencies_and_interpolate_slow_ones(method):
    # Sides of which every ramp lies inside the frequencies.
    rope = Rope(method, train_side=4096)
    ratio = scaled_frequencies(rope, torch.tensor([[16384, 16384]]), 96)[0, 0] / frequencies(96)
    assert ratio[0].item() == pytest.approx(1)
    assert ratio[-1].item() == pytest.approx(1 / 4, rel=1e-4)
    assert (ratio.diff() <= 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_per_axis_scales_each_by_its_own_length_and_jointly_both_by_the_longer(method):
    size_B2 = torch.tensor([[10, 30], [30, 30]])
    alone = scaled_frequencies(Rope(method, train_side=16), size_B2, 36)
    joint = scaled_frequencies(Rope(method, per_axis=False, train_side=16), size_B2, 36)
    torch.testing.assert_close(alone[0, 0], frequencies(36))
    torch.testing.assert_close(alone[0, 1], alone[1, 1])
    torch.testing.assert_close(joint[0], alone[1])


@pytest.mark.parametrize("method", METHODS)
def test_images_of_one_batch_are_scaled_each_by_its_own_size(method):
    rope = Rope(method, attention_scale="pro2", train_side=4)
    sizes = [(2, 3), (5, 9), (4, 4)]
    together = rotation(Layout.of(sizes), 16, rope)
    alone = [rotation(Layout.of([size]), 16, rope) for size in sizes]
    torch.testing.assert_close(together, torch.cat(alone))


def test_a_grid_scales_every_image_alike():
    rope = Rope("ntk", train_side=4, grid=(8, 12))
    small = rotation(Layout.of([(2, 3)]), 16, rope)
    large = rotation(Layout.of([(8, 12)]), 16, Rope("ntk", train_side=4))
    torch.testing.assert_close(small[4], large[13])  # both are (1, 1)


def test_attention_scale_of_the_paper_multiplies_the_logits():
    """Eq. 15 at 320×320 px for a model of 256×256: logits × log(320²)/log(256²)."""
    rope = Rope(attention_scale="paper", train_side=16)
    large, trained = mscale(rope, torch.tensor([[20, 20], [16, 16]])).square()
    assert large.item() == pytest.approx(math.log(320**2) / math.log(256**2), rel=1e-5)
    assert trained == 1


def test_attention_scale_of_the_code_acts_at_the_trained_size_too():
    """cos and sin × √(ln(2·h·w)/ln(L²)); pro1 takes sides in place of areas."""
    size_B2 = torch.tensor([[16, 16], [10, 30], [4, 8]])
    pro2 = mscale(Rope(attention_scale="pro2", train_side=16), size_B2)
    expected = [math.sqrt(math.log(2 * n) / math.log(256)) for n in (256, 300)]
    assert pro2.tolist() == pytest.approx([*expected, 1.0])
    pro1 = mscale(Rope(attention_scale="pro1", train_side=16), size_B2)
    expected = [math.sqrt(math.log(2 * n) / math.log(16)) for n in (16, 30)]
    assert pro1.tolist() == pytest.approx([*expected, 1.0])


def test_attention_scale_by_tokens_keeps_the_entropy_of_equal_logits_in_proportion():
    factors = mscale(
        Rope(attention_scale="tokens", train_side=8), torch.tensor([[10, 10], [8, 8], [4, 4]])
    ).square()
    assert factors.tolist() == pytest.approx([math.log(100) / math.log(64), 1, 1])


def test_yarn_lengthens_by_the_longer_side():
    rope = Rope("yarn", train_side=16)
    expected = [0.1 * math.log(30 / 16) + 1, 1.0]
    assert mscale(rope, torch.tensor([[10, 30], [16, 4]])).tolist() == pytest.approx(expected)


def test_absolute_positions_are_dits():
    """Sines, then cosines, of the row; the same of the column: as 1-D sinusoids of half the width each."""
    layout = Layout.of([(2, 3), (1, 2)])
    added = absolute(layout, 8, Rope(kind="absolute"))
    assert added.shape == (8, 8)
    omega = torch.tensor([1.0, 1e-2])
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]):
        expected = [(row * omega).sin(), (row * omega).cos(), (column * omega).sin(), (column * omega).cos()]
        torch.testing.assert_close(added[token], torch.cat(expected))


def test_nothing_turns_where_positions_are_added():
    rope = Rope(kind="absolute")
    x = torch.randn(6, 2, 16)
    assert torch.equal(rotate(x, rotation(Layout.of([(2, 3)]), 16, rope)), x)
    with pytest.raises(UserError, match="for `kind` rotary"):
        Rope("ntk", train_side=4, kind="absolute")
