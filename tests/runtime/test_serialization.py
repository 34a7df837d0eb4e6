import json
from dataclasses import asdict

import pytest

from fitv2.config import Architecture, Rope, Training
from fitv2.errors import UserError
from fitv2.runtime.serialization import from_dict, read_json


def test_from_dict_is_the_inverse_of_asdict():
    architecture = Architecture(depth=2, width=32, heads=2)
    assert from_dict(Architecture, asdict(architecture)) == architecture


def test_values_inside_values_come_back():
    rope = Rope("ntk", train_side=16, grid=(20, 30))
    architecture = Architecture(depth=2, width=32, heads=2, rope=rope)
    assert from_dict(Architecture, json.loads(json.dumps(asdict(architecture)))) == architecture
    with pytest.raises(UserError, match=r"grid of Rope is \[1, 2, 3\]"):
        from_dict(Rope, {"grid": [1, 2, 3]})


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="unknown key of Architecture 'widht': did you mean width"):
        from_dict(Architecture, {"depth": 2, "widht": 32, "heads": 2})


@pytest.mark.parametrize(("key", "value"), [("depth", "2"), ("prediction", "image"), ("width", None)])
def test_a_value_of_another_type_is_named(key, value):
    with pytest.raises(UserError, match=f"{key} of Architecture is {value!r}"):
        from_dict(Architecture, {"depth": 2, "width": 32, "heads": 2} | {key: value})


def test_missing_key_is_named():
    with pytest.raises(UserError, match="heads"):
        from_dict(Architecture, {"depth": 2, "width": 32})


@pytest.mark.parametrize(("content", "said"), [("{", "damaged"), ("[1]", "expected a json object")])
def test_damaged_json_is_a_clear_error(tmp_path, content, said):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_json(path)
    with pytest.raises(UserError, match="missing"):
        read_json(tmp_path / "none.json")


def test_a_key_that_had_another_name_before_still_loads():
    old = {"tokens_a_step": 99, "micro_batches": 2, "clip": 0.5, "recompute": True, "shard": 4}
    new = {
        "tokens_per_step": 99, "grad_accum_steps": 2, "max_grad_norm": 0.5, "gradient_checkpointing": True,
        "fsdp_size": 4,
    }  # fmt: skip
    assert old.keys() == Training.RENAMED.keys()
    assert from_dict(Training, old) == Training(**new)
    architecture = {"depth": 2, "width": 32, "heads": 2, "rope": {"pixels_a_token": 8}}
    assert from_dict(Architecture, architecture).rope == Rope(pixels_per_token=8)


def test_a_value_under_an_old_name_is_checked_as_any_other():
    with pytest.raises(UserError, match="grad_accum_steps of Training is '2'"):
        from_dict(Training, {"micro_batches": "2"})
