"""The whole model as one graph that holds for images of any sizes and texts of any lengths."""

import pytest
import torch
from torch.export import Dim, ShapesCollection, export
from torch.utils._pytree import tree_leaves

from conftest import randomized
from fitv2.conditioning import Condition, Text
from fitv2.model import FiT
from fitv2.tokens import Layout

SHAPE = {"depth": 2, "width": 32, "heads": 2, "patch_size": 2, "in_channels": 3, "num_classes": 2}
OF_TEXT = {"conditions": ("label", "text"), "text_channels": 8}
PACKS = [[(2, 3), (4, 1)], [(3, 3), (2, 2), (5, 5)], [(1, 7), (2, 2), (5, 5), (6, 6)], [(4, 4)] * 5]


@pytest.fixture(params=["label", "text"])
def model(request):
    return randomized(FiT(**SHAPE, **(OF_TEXT if request.param == "text" else {}))).eval()


def inputs(model, sizes, seed=0):
    """Noisy tokens, their layout, times and conditions."""
    rng = torch.Generator().manual_seed(seed)
    layout = Layout.of(sizes)
    values = {"label": torch.randint(0, 2, (len(layout),), generator=rng)}
    if "text" in model.architecture.conditions:
        lengths = torch.randint(1, 6, (len(layout),), generator=rng).tolist()
        values["text"] = Text.of(
            [(torch.randn(n, 8, generator=rng), torch.randn(8, generator=rng)) for n in lengths]
        )
    x_TC = torch.randn(layout.tokens, model.token_channels, generator=rng)
    return x_TC, layout, torch.rand(len(layout), generator=rng), Condition.of(**values)


@torch.no_grad()
def test_one_graph_serves_all_sizes(model):
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for seed, sizes in enumerate(PACKS):
        given = inputs(model, sizes, seed)
        assert torch.equal(compiled(*given), model(*given))
    assert len(graphs) <= 2  # PyTorch begins with a graph of one number of images


@pytest.mark.slow
@torch.no_grad()
def test_compiled_by_inductor(model):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    given = inputs(model, PACKS[1])
    assert torch.allclose(compiled(*given), model(*given), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_all_sizes(model, strict):
    given, shapes = inputs(model, PACKS[1]), ShapesCollection()
    for tensor in tree_leaves(given):
        shapes[tensor] = {0: Dim.AUTO}
    program = export(model, given, dynamic_shapes=shapes, strict=strict)
    called = [node.target for node in program.graph.nodes if "fitv2" in str(node.target)]
    assert called == [torch.ops.fitv2.attention.default] * SHAPE["depth"]
    opened = program.module()
    for seed, sizes in enumerate(PACKS):
        others = inputs(model, sizes, seed)
        assert torch.allclose(opened(*others), model(*others), atol=1e-5)


def test_with_gradients_attention_stays_outside(model):
    torch._dynamo.reset()
    given = inputs(model, PACKS[0])
    compiled = torch.compile(model, dynamic=True, backend="eager")
    model(*given).square().mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled(*given).square().mean().backward()
    for name, gradient in expected.items():
        assert torch.allclose(model.get_parameter(name).grad, gradient, atol=1e-6), name


def test_the_operator_is_sound():
    layout = Layout.of(PACKS[0])
    qkv = torch.randn(3, layout.tokens, 2, 8).unbind()
    tests = ("test_schema", "test_faketensor")  # it has no derivative
    torch.library.opcheck(
        torch.ops.fitv2.attention, (*qkv, layout.cu_seqlens, layout.length_B), test_utils=tests
    )
