"""The commands themselves are tested where what they call is: tests/evaluation."""

import sys

from fitv2.cli.measuring import command_line, flops
from fitv2.cli.options import Flops


def test_the_command_that_is_noted_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/fitv2", "evaluate", "my model", "--num", "3"])
    assert command_line() == "fitv2 evaluate 'my model' --num 3"


def test_multiply_adds_of_the_paper_s_model(capsys):
    """FiTv2-B/2 at 256 tokens: the paper's 27.3 GFLOPs."""
    assert flops(Flops("fitv2-b")) == 0
    said = capsys.readouterr().out
    assert "128,149,072 parameters" in said and "256x256: 256 tokens, 27.2" in said
