import pytest
import torch

from conftest import together
from fitv2.config import Training
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.runtime.distributed import join
from fitv2.training.checkpointing import read_state, state_of, write_state
from fitv2.training.muon import Muon, orthogonalize
from fitv2.training.optim import build_optimizers


def test_singular_values_come_near_to_one_and_directions_stay():
    matrix = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    for given in (matrix, matrix.mT):
        made = orthogonalize(given)
        assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.35
        u, _, vh = torch.linalg.svd(given, full_matrices=False)
        inside = u.mT @ made @ vh.mT  # diagonal, if the directions are the same
        assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_a_step_equals_that_of_torch_in_its_precision(monkeypatch):
    monkeypatch.setattr("fitv2.training.muon.has_bfloat16_matmuls", lambda _: True)
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(24, 40, generator=rng)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 1e-2, "weight_decay": 0.1}
    mine = Muon([{"params": [ours]}], **options)
    torchs = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        gradient = torch.randn(start.shape, generator=rng)
        for parameter, optimizer in ((ours, mine), (theirs, torchs)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.linalg.norm(ours - theirs) < 0.01 * torch.linalg.norm(theirs - start)


def test_pieces_are_made_orthogonal_apart():
    """As if each were a matrix of its own."""
    rng = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 36, 12, generator=rng)
    fused = torch.nn.Parameter(start.clone())
    fused.grad = gradient.clone()
    Muon([{"params": [fused], "pieces": 3}]).step()
    for rows in range(0, 36, 12):
        one = torch.nn.Parameter(start[rows : rows + 12].clone())
        one.grad = gradient[rows : rows + 12].clone()
        Muon([{"params": [one]}]).step()
        torch.testing.assert_close(fused[rows : rows + 12], one, rtol=0, atol=1e-6)


def test_matrices_of_texts_are_muon_s_and_what_is_stored_of_adamw_is_not(tmp_path):
    shape = {"depth": 1, "width": 16, "heads": 2, "patch_size": 1, "in_channels": 4, "num_classes": 3}
    model = FiT(**shape, conditions=("text",), text_channels=8)
    muon, adamw = build_optimizers(model, Training(optimizer="muon"))
    matrices = {id(p) for group in muon.param_groups for p in group["params"]}
    assert {id(model.text_embed.up.weight), id(model.text_embed.pooled.weight)} <= matrices
    every = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    every.step()
    write_state(state_of(model, [every]), tmp_path / "state")
    with pytest.raises(UserError, match="is the state of another optimizer: Muon keeps no exp_avg"):
        read_state(tmp_path / "state", model, [muon, adamw])


def test_a_change_every_other_step_is_of_all_gradients_and_twice_as_large():
    rng = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 12, 20, generator=rng)
    rare, often = (torch.nn.Parameter(start.clone()) for _ in range(2))
    every = [Muon([{"params": [rare]}], lr=1e-2, every=2), Muon([{"params": [often]}], lr=1e-2)]
    for number, gradient in enumerate(gradients, 1):
        before = [rare.detach().clone(), often.detach().clone()]
        for matrix, optimizer in zip((rare, often), every, strict=True):
            matrix.grad = gradient.clone()
            optimizer.step()
        if number % 2:
            assert torch.equal(rare, before[0])
        else:  # the average of gradients is the same, so the change is too, but for its size
            torch.testing.assert_close(rare - before[0], 2 * (often - before[1]), rtol=1e-4, atol=1e-6)


def test_large_matrices_are_shared_between_processes(monkeypatch):
    monkeypatch.setattr("fitv2.training.muon.SHARED_FROM", 12)
    shapes = [(12, 20), (12, 20), (36, 12), (11, 20), (12, 20)]

    def changed():
        rng = torch.Generator().manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=rng)
        groups = [{"params": [m], "pieces": 3 if len(m) == 36 else 1} for m in matrices]
        Muon(groups, weight_decay=0.1).step()
        return [matrix.detach() for matrix in matrices]

    alone, made = changed(), []
    monkeypatch.setattr(
        "fitv2.training.muon.orthogonalize", lambda x, **how: made.append(len(x)) or orthogonalize(x, **how)
    )

    def work(rank):
        with join():
            for one, expected in zip(changed(), alone, strict=True):
                torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)
        assert made == [[2, 2, 1], [1, 1, 1]][rank]  # of three, of three pieces, of a small one

    assert together(2, work) == [None] * 2


def test_fewer_iterations_leave_small_singular_values_smaller():
    u, _, vh = torch.linalg.svd(torch.randn(20, 50, generator=torch.Generator().manual_seed(0)), False)
    matrix = (u * torch.logspace(0, -3, 20) @ vh)[None]
    smallest = [float(torch.linalg.svdvals(orthogonalize(matrix, n)).amin()) for n in (2, 3, 5)]
    assert 0 < 3 * smallest[0] < smallest[1] < smallest[2] / 9
    model = FiT(depth=1, width=16, heads=2, patch_size=1, in_channels=4, num_classes=3)
    muon, _ = build_optimizers(model, Training(optimizer="muon", muon_iterations=3, muon_every=4))
    assert (muon.iterations, muon.every) == (3, 4)


def test_matrices_of_one_shape_change_as_each_would_alone():
    rng = torch.Generator().manual_seed(0)
    starts, gradients = torch.randn(2, 5, 12, 20, generator=rng)

    def changed(chosen):
        matrices = [torch.nn.Parameter(starts[i].clone()) for i in chosen]
        for matrix, i in zip(matrices, chosen, strict=True):
            matrix.grad = gradients[i].clone()
        Muon([{"params": [matrix]} for matrix in matrices], weight_decay=0.1).step()
        return matrices

    for i, among_others in enumerate(changed(range(5))):
        torch.testing.assert_close(among_others, changed([i])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("adaln", ["lora", "full"])
def test_a_model_gives_its_fused_matrices_in_pieces(adaln):
    model = FiT(depth=1, width=16, heads=2, patch_size=1, in_channels=4, num_classes=3, adaln=adaln)
    muon, adamw = build_optimizers(model, Training(optimizer="muon"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    pieces = {names[p]: group["pieces"] for group in muon.param_groups for p in group["params"]}
    expected = {
        "blocks.0.attention.qkv.weight": 3, "blocks.0.attention.out.weight": 1,
        "blocks.0.mlp.gate_up.weight": 2, "blocks.0.mlp.down.weight": 1,
    }  # fmt: skip
    own = {"blocks.0.modulation.weight": 6}
    lora = {"blocks.0.modulation.down.weight": 1, "blocks.0.modulation.up.weight": 6}
    assert pieces == expected | (lora if adaln == "lora" else own)
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert rest == set(names.values()) - set(pieces)


def test_a_closure_computes_the_loss_and_its_gradients():
    matrix = torch.nn.Parameter(torch.eye(4))
    optimizer = Muon([{"params": [matrix]}], lr=0.1)

    def closure():
        loss = matrix.square().sum()
        loss.backward()
        return float(loss)

    assert optimizer.step(closure) == 4.0
    assert float(matrix.square().sum()) < 4.0
