import pytest
import torch

from fitv2.tokens import Layout, pack, patchify, unpack, unpatchify

SIZES = [(1, 1), (2, 7), (7, 2), (3, 3)]


def images(channels=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, columns, channels, generator=generator) for rows, columns in SIZES]


def test_token_r_times_columns_plus_c_is_at_row_r_column_c():
    packed = pack(images())
    for i, (rows, columns) in enumerate(SIZES):
        first = int(packed.layout.cu_seqlens[i])
        for r in range(rows):
            for c in range(columns):
                token = first + r * columns + c
                assert packed.layout.pos_T2[token].tolist() == [r, c]
                assert packed.layout.image_T[token] == i
                assert torch.equal(packed.x_TC[token], images()[i][r, c])


def test_unpack_is_the_inverse_of_pack():
    for before, after in zip(images(), unpack(pack(images())), strict=True):
        assert torch.equal(before, after)


def test_lengths_and_runs():
    layout = Layout.of(SIZES)
    assert (len(layout), layout.tokens) == (4, 38)
    assert layout.lengths == (1, 14, 14, 9)
    assert layout.length_groups == ((1, 1), (2, 14), (1, 9))
    assert layout.cu_seqlens.tolist() == [0, 1, 15, 29, 38]
    assert layout.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("sizes", [[], [(0, 3)], [(2, 2), (3, -1)]])
def test_empty_images_are_refused(sizes):
    with pytest.raises(ValueError, match="at least one"):
        Layout.of(sizes)


def test_spread_sum_and_mean_per_image():
    packed = pack(images())
    layout, value = packed.layout, torch.arange(4.0)
    assert torch.equal(layout.mean_per_image(layout.spread(value)), value)
    for i, image in enumerate(images()):
        torch.testing.assert_close(layout.mean_per_image(packed.x_TC)[i], image.mean((0, 1)))
        torch.testing.assert_close(layout.sum_per_image(packed.x_TC)[i], image.sum((0, 1)))


def assert_same(one, other):
    for name in ("pos_T2", "image_T", "cu_seqlens", "size_B2"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.sizes == other.sizes


def test_concatenated_layouts_are_one_of_all_images():
    first, second = Layout.of(SIZES[:2]), Layout.of(SIZES[2:])
    assert_same(Layout.concatenate([first, second]), Layout.of(SIZES))
    assert_same(Layout.concatenate([first, second, first]), Layout.of([*SIZES, *SIZES[:2]]))
    assert_same(Layout.concatenate([first]), first)


def test_selected_images_are_those_in_their_order():
    chosen = pack(images()).select([2, 0])
    expected = pack([images()[2], images()[0]])
    assert torch.equal(chosen.x_TC, expected.x_TC)
    assert_same(chosen.layout, expected.layout)
    with pytest.raises(ValueError, match="at least one"):
        Layout.of(SIZES).select([])


def test_every_image_is_divided_into_two_runs():
    layout = Layout.of([(2, 2), (3, 4), (1, 2)])
    runs = layout.divide(0.25)
    assert runs.lengths == (3, 1, 9, 3, 1, 1)
    assert runs.tokens == layout.tokens and len(runs) == 2 * len(layout)
    assert torch.equal(runs.image_T // 2, layout.image_T)
    assert layout.divide(0.9).lengths == (1, 3, 1, 11, 1, 1)
    values = torch.arange(6.0)[:, None]
    assert runs.sum_per_image(runs.spread(values))[:, 0].tolist() == [0, 1, 18, 9, 4, 5]
    with pytest.raises(ValueError, match="an image of one token cannot be divided"):
        Layout.of([(2, 2), (1, 1)]).divide(0.25)


def test_images_that_are_divided_alike_are_computed_together():
    layout = Layout.of([(3, 4)] * 5 + [(2, 2)] * 3)
    runs = layout.divide(0.25)
    assert runs.pair_groups == ((5, 9, 3), (3, 3, 1)) and not layout.pair_groups
    per_token = torch.arange(runs.tokens)[:, None]
    per_run = torch.arange(len(runs))[:, None]
    pieces = list(runs.by_length_group(per_token, per_run))
    assert [(len(token), token.shape[1]) for token, _ in pieces] == [(5, 9), (5, 3), (3, 3), (3, 1)]
    for token, run in pieces:
        assert torch.equal(runs.image_T[token[..., 0]], run[..., 0].expand(token.shape[:2]))
    assert sorted(torch.cat([token.flatten() for token, _ in pieces]).tolist()) == list(range(runs.tokens))
    assert torch.equal(runs.mean_per_image(runs.spread(per_run.float())), per_run.float())


def test_tokens_in_another_order_keep_their_places():
    layout = Layout.of([(1, 3), (2, 2)])
    order = torch.tensor([2, 0, 1, 3, 6, 5, 4])
    moved = layout.reorder(order)
    assert torch.equal(moved.pos_T2, layout.pos_T2[order])
    assert moved.lengths == layout.lengths and torch.equal(moved.image_T, layout.image_T)
    assert torch.equal(moved.select([1]).pos_T2, layout.pos_T2[[3, 6, 5, 4]])


def test_a_layout_cannot_be_changed():
    with pytest.raises(AttributeError):
        Layout.of(SIZES).sizes = ()


def test_patchify_orders_channel_row_column():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(image, 2)
    assert tokens.shape == (1, 2, 3, 8)
    assert torch.equal(tokens[0, 1, 2], image[0, :, 2:4, 4:6].flatten())
    assert torch.equal(unpatchify(tokens, 2), image)


def test_patchify_refuses_a_broken_token():
    with pytest.raises(ValueError, match="5x6 is not a multiple of the patch size 2"):
        patchify(torch.zeros(1, 3, 5, 6), 2)


def test_images_stand_behind_their_texts():
    layout = Layout.of([(2, 3), (1, 1), (3, 2)])
    joint = layout.behind(torch.tensor([2, 0, 1]), 3)
    expected = [(0, 0), (1, 1), *((2 + r, 2 + c) for r in range(2) for c in range(3)), (0, 0), (0, 0),
                *((1 + r, 1 + c) for r in range(3) for c in range(2))]  # fmt: skip
    assert [tuple(position) for position in joint.layout.pos_T2.tolist()] == expected
    assert joint.layout.lengths == (8, 1, 7)
    assert joint.layout.sizes == layout.sizes
    assert joint.layout.cu_seqlens.tolist() == [0, 8, 9, 16]
    assert joint.layout.image_T.tolist() == [0] * 8 + [1] + [2] * 7
    text, images = torch.tensor([[-1.0], [-2.0], [-3.0]]), torch.arange(13.0)[:, None]
    joined = joint.join(text, images)
    assert joined.flatten().tolist() == [-1, -2, *range(6), 6, -3, *range(7, 13)]
    assert torch.equal(joint.images(joined), images)
    assert layout.behind(torch.tensor([2, 0, 1]), 3) is joint
    assert layout.behind(torch.tensor([0, 0, 0]), 0).layout.lengths == layout.lengths
