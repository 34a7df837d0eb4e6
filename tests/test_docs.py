"""The pages say what is true; tools/check_docs.py also runs what they show."""

import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def test_the_reference_is_up_to_date():
    command = [sys.executable, TOOLS / "build_reference.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_a_stale_flag_and_a_dead_link_are_found(tmp_path):
    sys.path.insert(0, str(TOOLS))
    import check_docs

    def said(text):
        return check_docs.check_command(text.split())

    assert said("fitv2 sample clipart --szie 3x4").startswith("unknown option")
    assert said("fitv2 train debug --shard 2 --data x --out y").endswith("--fsdp-size")
    assert check_docs.check_command(["fitv2", "sample", "clipart", "--size", "3x4"]) is None
    assert check_docs.check_command(["make", "nothing"]) == "make has no target nothing"
    (tmp_path / "README.md").write_text("[a](b.md)\n\n```python\nfrom fitv2 import Nothing\n```\n")
    page = check_docs.read_page("README.md", tmp_path)
    assert list(check_docs.check_links(page, tmp_path)) == ["README.md:1: the link b.md leads nowhere"]
    assert list(check_docs.check_python(page.blocks[0])) == ["README.md:4: fitv2 has no Nothing"]
