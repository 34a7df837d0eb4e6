import pytest
import torch

from fitv2.tokens import (
    _GatheredScaledSum,
    _ScaledSum,
    concatenate,
    layout,
    pack,
    patchify,
    unpack,
    unpatchify,
)  # fmt: skip

SIZES = [(1, 1), (2, 7), (7, 2), (3, 3)]


def images(channels=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, channels, generator=generator) for rows, columns in SIZES]


def test_token_r_times_columns_plus_c_is_at_row_r_column_c():
    packed = pack(images())
    for i, (rows, columns) in enumerate(SIZES):
        first = int(packed.cu_seqlens[i])
        for r in range(rows):
            for c in range(columns):
                token = first + r * columns + c
                assert packed.pos_T2[token].tolist() == [r, c]
                assert packed.image_T[token] == i
                assert torch.equal(packed.x_TC[token], images()[i][r, c])


def test_unpack_is_the_inverse_of_pack():
    for before, after in zip(images(), unpack(pack(images())), strict=True):
        assert torch.equal(before, after)


def test_lengths_and_runs():
    packed = layout(SIZES)
    assert packed.lengths == (1, 14, 14, 9)
    assert packed.runs == [(1, 1), (2, 14), (1, 9)]
    assert packed.cu_seqlens.tolist() == [0, 1, 15, 29, 38]
    assert packed.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("sizes", [[], [(0, 3)], [(2, 2), (3, -1)]])
def test_empty_images_are_refused(sizes):
    with pytest.raises(ValueError, match="at least one"):
        layout(sizes)


def test_spread_sum_and_mean_per_image():
    packed = pack(images())
    value = torch.arange(4.0)
    assert torch.equal(packed.mean_per_image(packed.spread(value)), value)
    for i, image in enumerate(images()):
        torch.testing.assert_close(packed.mean_per_image(packed.x_TC)[i], image.mean((0, 1)))
        torch.testing.assert_close(packed.sum_per_image(packed.x_TC)[i], image.sum((0, 1)))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("kind", [_ScaledSum, _GatheredScaledSum])
def test_scaled_sum_and_its_gradients_equal_the_formula(kind, per_token):
    packed = layout(SIZES)
    generator = torch.Generator().manual_seed(1)
    x, token_base = (torch.randn(38, 6, generator=generator, dtype=torch.double) for _ in range(2))
    scale, image_base = (torch.randn(4, 6, generator=generator, dtype=torch.double) for _ in range(2))
    inputs = (token_base if per_token else image_base, x, scale)
    for tensor in inputs:
        tensor.requires_grad_()
    function = lambda *values: kind.apply(*values, packed)  # noqa: E731
    out = function(*inputs)
    base = inputs[0] if per_token else inputs[0][packed.image_T]
    torch.testing.assert_close(out, base + x * scale[packed.image_T])
    got = torch.autograd.grad(out.square().sum(), inputs)
    expected = torch.autograd.grad((base + x * scale[packed.image_T]).square().sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_concatenate_is_one_pack_of_all_images():
    first, second = pack(images()[:2]), pack(images()[2:])
    together, expected = concatenate([first, second]), pack(images())
    for name in ("x_TC", "pos_T2", "image_T", "cu_seqlens"):
        assert torch.equal(getattr(together, name), getattr(expected, name))
    assert together.sizes == expected.sizes
    three = concatenate([first, second, first])
    assert torch.equal(three.x_TC, pack([*images(), *images()[:2]]).x_TC)
    assert torch.equal(three.image_T, pack([*images(), *images()[:2]]).image_T)


def test_a_pack_cannot_be_changed():
    with pytest.raises(AttributeError):
        layout(SIZES).sizes = ()


def test_patchify_orders_channel_row_column():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(image, 2)
    assert tokens.shape == (1, 2, 3, 8)
    assert torch.equal(tokens[0, 1, 2], image[0, :, 2:4, 4:6].flatten())
    assert torch.equal(unpatchify(tokens, 2), image)


def test_patchify_refuses_a_broken_token():
    with pytest.raises(ValueError, match="5x6 is not a multiple of the patch size 2"):
        patchify(torch.zeros(1, 3, 5, 6), 2)
