"""The documentation: pages made from the code are up to date, and what the checker is to find it finds."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name):
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_docs, build_reference = tool("check_docs"), tool("build_reference")
build_notebook = tool("build_notebook")


def notebook():
    return json.loads(build_notebook.SCRIPT.with_suffix(".ipynb").read_text())


def test_the_notebook_is_its_script():
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook()["cells"]]
    assert found == build_notebook.cells(build_notebook.SCRIPT.read_text()), "run tools/build_notebook.py"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_pictures():
    again = build_notebook.build(build_notebook.SCRIPT.read_text())
    shown = [[len(cell.get("outputs", ())) for cell in one["cells"]] for one in (again, notebook())]
    assert shown[0] == shown[1]
    assert sum(shown[0]) == 4


def test_reference_pages_are_up_to_date():
    assert not build_reference.stale(), "run python tools/build_reference.py"


def test_a_reference_page_that_is_not_up_to_date_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(build_reference, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["build_reference.py"])
    assert build_reference.main() == 0
    page = tmp_path / "cli.md"
    page.write_text(page.read_text().replace("--max-grad-norm", "--clip"))
    assert build_reference.stale() == ["cli.md"]


def test_the_reference_has_every_option_and_its_text():
    for kind, _ in check_docs.commands.COMMANDS.values():
        shown = list(build_reference.options(kind))
        names = {flag for option in shown for flag in option.name.split(", ") if flag.startswith("--")}
        positional = {option.name for option in shown if option.name.isupper()}
        expected = {name for name in check_docs.option_names(kind) if name != "--help"}
        assert names <= expected
        assert len(expected - names) == len(positional)  # they are no flags
        assert all(option.text for option in shown)


@pytest.mark.parametrize("name", check_docs.pages())
def test_pages_name_what_is_there(name):
    """All that can be said without running a block; `make test` runs them."""
    assert list(check_docs.check_page(name)) == []


@pytest.mark.parametrize("name", check_docs.pages())
def test_pages_name_no_place_of_a_machine(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not [place for place in ("/tmp/", "/root/", "/home/") if place in text]


def page(tmp_path, text):
    """A page of a small repository."""
    (tmp_path / "docs").mkdir(exist_ok=True)
    (tmp_path / "Makefile").write_text("test:\n")
    (tmp_path / "docs" / "other.md").write_text("# A title\n")
    (tmp_path / "docs" / "page.md").write_text(text)
    return "docs/page.md"


def found(tmp_path, text):
    return list(check_docs.check_page(page(tmp_path, text), tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nfitv2 sample clipart --sise 64x64\n```", "2: unknown option '--sise': did you mean --size"),
        ("```sh\nmake test\nfitv2 train tiny --data d --out r\n```", "3: unknown preset 'tiny'"),
        (
            "```sh\nfitv2 train debug --data d --out r \\\n  --clip 2\n```",
            "2: fitv2: --clip is now --max-grad-norm",
        ),
        ("```sh\nA=1 torchrun -m fitv2 train debug --data d\n```", "2: "),
        ("```sh\nfitv2 paint clipart\n```", "2: unknown command 'paint'"),
        ("<!-- not run: asks -->\n```sh\nfitv2 sample clipart --step 3\n```", "3: unknown option '--step'"),
        ("```sh\nmake tets\n```", "2: make has no target tets"),
        ("```sh\npython tools/none.py\n```", "2: tools/none.py does not exist"),
        ("```python\nimport fitv2\nfitv2.Model\n```", "3: fitv2 has no Model"),
        ("```python\nfrom fitv2.model import Fit\n```", "2: fitv2.model has no Fit"),
        ("```python\nfrom fitv2.flow import Flow\n```", "2: fitv2.flow: No module named"),
        ("```python\nimport nowhere\n```", "2: there is no module nowhere"),
        ("```python\nx = 1\nx = = 2\n```", "3: invalid syntax"),
        ("[a](none.md)", "1: the link none.md leads nowhere"),
        ("[a](other.md#the-title)", "1: the link other.md#the-title names no heading"),
        ("[a](#none)", "1: the link #none names no heading"),
        ("![a](none.png)", "1: the link none.png leads nowhere"),
        ("See `docs/none.md`.", "1: docs/none.md does not exist"),
        ("Give `--sise`.", "1: no command has the option --sise"),
        ("See `fitv2.rope.WAYS`.", "1: there is no fitv2.rope.WAYS"),
        ("See `fitv2.none.WAYS`.", "1: there is no fitv2.none"),
    ],
)
def test_what_is_stale_is_found(tmp_path, text, said):
    (failure,) = found(tmp_path, text)
    assert failure.startswith(f"docs/page.md:{said}")


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfitv2 sample clipart --size 64x64 --label flags  # a comment\n```",
        "```sh\nA=1 torchrun --nproc-per-node 8 -m fitv2 train debug --data d --out r\n```",
        "```sh\n.venv/bin/fitv2 train debug --help\nmake PYTHON=python3.12 test\n```",
        "# One\n[a](other.md#a-title) [b](#one) [c](https://nowhere.test) `docs/other.md` `--size 3`",
        "`fitv2.FiT`, `fitv2.rope.METHODS`, `fitv2.data.dataset`, `fitv2.Layout.of`",
        "```python\nimport fitv2.tokens\nfrom fitv2 import Layout\n```",
    ],
)
def test_what_is_right_is_passed(tmp_path, text):
    assert found(tmp_path, text) == []


def run(tmp_path, text):
    name = page(tmp_path, text)
    return list(check_docs.run_page(check_docs.read_page(name, tmp_path)))


def test_python_of_a_page_shares_its_names_and_runs_in_order(tmp_path):
    assert run(tmp_path, "```python\nx = [1]\n```\n\n```python\nx.append(2)\n\nassert x == [1, 2]\n```") == []
    text = "```python\nx = 1\n```\ntext\n\n```python\nx += 1\nassert x == 3, 'no'\n```"
    assert run(tmp_path, text) == ["docs/page.md:8: AssertionError: no"]


def test_blocks_that_say_why_are_not_run(tmp_path):
    failing = "```python\nraise ValueError\n```"
    assert run(tmp_path, f"<!-- not run: breaks -->\n{failing}") == []
    assert run(tmp_path, f"<!-- not run: breaks -->\n{failing}\n\n{failing}") == [
        "docs/page.md:7: ValueError: "
    ]
    assert run(tmp_path, f"<!-- not run: breaks -->\ntext\n{failing}") == ["docs/page.md:4: ValueError: "]


def test_commands_run_where_there_are_images(tmp_path):
    text = "```sh\nfitv2 encode images out --workers 0 --max-tokens 4\nfitv2 inspect out --samples 0\n```"
    assert run(tmp_path, text) == []
    (failure,) = run(tmp_path, "```sh\nfitv2 inspect none\n```")
    assert failure.startswith("docs/page.md:2: UserError")
    (failure,) = run(tmp_path, "```sh\ntensorboard --logdir runs\n```")
    assert failure.startswith("docs/page.md:2: tensorboard is not run: say why above the block")


def test_a_page_gets_what_it_takes_for_granted(tmp_path):
    text = "<!-- given: tokens, models/xl -->\n```python\nimport fitv2\nfitv2.load_model('models/xl')\n```"
    assert run(tmp_path, text) == []
    assert run(tmp_path, text.split("\n", 1)[1])[0].startswith("docs/page.md:3: UserError")
