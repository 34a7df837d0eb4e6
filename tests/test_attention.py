import pytest
import torch

from fitv2.attention import attention
from fitv2.tokens import Layout

SIZES = [(1, 1), (2, 7), (7, 2), (3, 3)]


def oracle(q, k, v, layout):
    """Softmax attention written out, with the mask that the project avoids."""
    same_image = layout.image_T[:, None] == layout.image_T[None, :]
    scores = torch.einsum("thk,shk->hts", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~same_image, float("-inf")).softmax(-1)
    return torch.einsum("hts,shk->thk", weights, v)


def inputs(layout, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shape = (3, layout.tokens, 2, 16)
    return torch.randn(shape, generator=generator).to(device).requires_grad_()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_forward_and_backward_equal_the_masked_formula(dtype, tolerance):
    layout = Layout.of(SIZES)
    results = []
    for function, kind in ((attention, dtype), (oracle, torch.float32)):
        qkv = inputs(layout)
        out = function(*qkv.to(kind), layout)
        out.float().square().sum().backward()
        results.append((out.float(), qkv.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_variable_length_kernel_equals_the_masked_formula():
    layout = Layout.of(SIZES).to("cuda")
    qkv = inputs(layout, "cuda")
    ours = attention(*qkv.bfloat16(), layout)
    torch.testing.assert_close(ours.float(), oracle(*qkv, layout), rtol=3e-2, atol=3e-2)
