"""A caller is told of every step, and may change what goes on."""

import pytest

from conftest import randomized
from fitv2.checkpoint import Card
from fitv2.config import Sampling
from fitv2.errors import UserError
from fitv2.model import FiT
from fitv2.pipeline import FiTPipeline
from fitv2.runtime.rng import generator

QUICK = {"sampling": Sampling(steps=2), "progress": lambda _: None}


def seeds(count):
    return [generator(i) for i in range(count)]


@pytest.fixture(scope="module")
def pipe():
    shape = {"depth": 1, "width": 32, "heads": 2, "patch_size": 4, "in_channels": 3, "num_classes": 2}
    return FiTPipeline.of(randomized(FiT(**shape)).eval(), Card(("a", "b"), "pixels", 16, 2.0))


def test_each_step_is_told_and_can_end_the_making(pipe):
    told = []

    def on_step_end(which, step, share, tensors):
        told.append((which is pipe, step, round(share, 3), [one.shape for one in tensors["latents"]]))
        if len(told) == 3:
            raise InterruptedError

    steps = {"num_inference_steps": 4, "progress": lambda _: None, "callback_on_step_end": on_step_end}
    with pytest.raises(InterruptedError):
        pipe([1, 0], [8, 16], [24, 8], generator=seeds(2), **steps)
    shapes = [(2, 6, 48), (4, 2, 48)]  # in the order that was asked for, not in that of the pack
    assert told == [(True, 0, 0.25, shapes), (True, 1, 0.5, shapes), (True, 2, 0.75, shapes)]


@pytest.mark.parametrize("solver", ["euler-maruyama", "stochastic-heun", "heun", "ab2", "dpm++"])
def test_as_many_steps_are_told_as_were_asked_for(pipe, solver):
    shares = []
    tell = {"callback_on_step_end": lambda *a: shares.append(a[2]), "progress": lambda _: None}
    pipe(1, 8, 8, generator=seeds(1), sampling=Sampling(solver, steps=4), **tell)
    assert len(shares) == 4
    assert shares == sorted(set(shares))
    assert shares[-1] == 1


def test_what_a_callback_changes_goes_on(pipe):
    """Two images whose tokens are exchanged three times become each other."""

    def swap(_pipe, _step, _share, tensors):
        return {"latents": tensors["latents"][::-1]}

    given = {"generator": seeds(2), "sampling": Sampling("euler", steps=3), "progress": lambda _: None}
    plain = pipe([1, 1], 8, 8, **given).images
    swapped = pipe([1, 1], 8, 8, callback_on_step_end=swap, **given | {"generator": seeds(2)}).images
    assert [image.tobytes() for image in swapped] == [image.tobytes() for image in plain[::-1]]

    def swap_in_place(_pipe, _step, _share, tensors):
        first, second = tensors["latents"]
        held = first.clone()
        first.copy_(second)
        second.copy_(held)

    again = pipe([1, 1], 8, 8, callback_on_step_end=swap_in_place, **given | {"generator": seeds(2)}).images
    assert [image.tobytes() for image in again] == [image.tobytes() for image in swapped]
    looked = pipe([1, 1], 8, 8, callback_on_step_end=lambda *a: a[3], generator=seeds(2), **QUICK).images
    plain = pipe([1, 1], 8, 8, generator=seeds(2), **QUICK).images
    assert [image.tobytes() for image in looked] == [image.tobytes() for image in plain]

    with pytest.raises(UserError, match="`callback_on_step_end` gave a list, not a dictionary"):
        pipe([1, 1], 8, 8, callback_on_step_end=lambda *a: [1], **given)
    with pytest.raises(UserError, match="there are 1 `latents` for 2 images"):
        pipe([1, 1], 8, 8, callback_on_step_end=lambda *a: {"latents": a[3]["latents"][:1]}, **given)
    with pytest.raises(UserError, match=r"`latents` are \(2, 1, 48\); this image takes"):
        pipe(
            1,
            8,
            8,
            callback_on_step_end=lambda *a: {"latents": [a[3]["latents"][0][:, :1]]},
            **given | {"generator": seeds(1)},
        )
    with pytest.raises(UserError, match="unknown callback_on_step_end_tensor_inputs 'prompt_embeds'"):
        pipe(1, 8, 8, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def test_without_a_function_there_is_a_bar_which_is_closed(pipe, monkeypatch):
    class Bar:
        n, closed = 0, False

        def update(self, more):
            Bar.n += more

        def close(self):
            Bar.closed = True

    monkeypatch.setattr(pipe, "progress_bar", lambda total: Bar())
    pipe(1, 8, 8, generator=seeds(1), sampling=Sampling(steps=2))
    assert (Bar.n, Bar.closed) == (100, True)
