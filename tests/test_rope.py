import torch

from fitv2.rope import frequencies, rotate, rotation
from fitv2.tokens import layout


def turned(positions, head_dim=8, seed=0):
    x = torch.randn(1, 2, head_dim, generator=torch.Generator().manual_seed(seed))
    return rotate(x.expand(len(positions), -1, -1), rotation(torch.tensor(positions), head_dim))


def test_frequencies_are_those_of_the_paper():
    torch.testing.assert_close(frequencies(8), torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_rows_turn_the_first_half_and_columns_the_second():
    still, by_row, by_column = turned([[0, 0], [1, 0], [0, 1]])
    assert torch.equal(by_row[:, 4:], still[:, 4:])
    assert torch.equal(by_column[:, :4], still[:, :4])
    assert not torch.allclose(by_row[:, :4], still[:, :4])


def test_pairs_are_interleaved():
    x = torch.tensor([[[1.0, 0, 1, 0, 0, 0, 0, 0]]])
    result = rotate(x, rotation(torch.tensor([[1, 0]]), 8))[0, 0]
    one, tenth = torch.tensor(1.0), torch.tensor(0.01)
    expected = torch.stack([one.cos(), one.sin(), tenth.cos(), tenth.sin()])
    torch.testing.assert_close(result[:4], expected)


def test_scores_depend_on_relative_position_alone():
    q = turned([[0, 0], [5, 9]], seed=1)
    k = turned([[2, 3], [7, 12]], seed=2)
    scores = (q * k).sum(-1)
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-4, atol=1e-5)


def test_angles_are_float32_whatever_the_model_is():
    result = rotate(torch.ones(6, 1, 8, dtype=torch.bfloat16), rotation(layout([(2, 3)]).pos_T2, 8))
    assert rotation(layout([(2, 3)]).pos_T2, 8).dtype == torch.complex64
    assert result.dtype == torch.bfloat16
