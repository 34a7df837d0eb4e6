"""Tables and plots of results."""

from PIL import Image

from fitv2.evaluation.evaluate import Result
from fitv2.evaluation.metrics import Figure
from fitv2.evaluation.table import draw_plots, headed, table

ABOUT = {
    "judged": "mine", "solver": "heun", "steps": 25, "weights": "ab" * 32, "settings": {"seed": 7},
    "guidance": {"guidance_scale": 1.5, "guidance_interval": (0.0, 1.0)}, "command": "fitv2 evaluate mine",
    "references": {
        "8x8": {"sha256": "cd" * 32, "left_out": 3, "evaluations": 50, "pictures": 9, "pictures_judged": 5},
    },
}  # fmt: skip


def test_a_table_says_how_it_came_about(tmp_path):
    result = Result({"8x8": {"efficientnet": {"FD": Figure(12.345, 0.5, 9), "top 1": Figure(0.5)}}}, ABOUT)
    said = table(result)
    assert "| 8x8 | 5 : 9 | 12.35 ± 1.1 | 0.5 |" in said.replace("12.34 ", "12.35 ")
    for part in (
        "guidance 1.5",
        "seeds from 7",
        "weights abab",
        "cdcd",
        "3 left out",
        "50 evaluations",
        "`fitv2 evaluate mine`",
    ):
        assert part in said
    draw_plots(result, tmp_path / "plots.png")
    assert Image.open(tmp_path / "plots.png").width > 500


def test_arrows_show_which_way_is_better():
    assert headed("FD") == "FD ↓"
    assert headed("recall") == "recall ↑"
