"""The recorded grid of solves: its files run, and a difference is seen."""

import replay
import replay_cases  # noqa: F401 - its import makes the cases
import torch
from replay_record import CASES, run

from fpi_cuda.solve import independence

SOME = [name for name in CASES if not name.startswith("triton")][::60]


def test_cases_of_one_tree_are_equal_and_a_changed_bit_is_not(tmp_path, capsys):
    for file in ("a.pt", "b.pt"):
        independence._known.clear()  # as in a process of its own: what is looked at is counted
        independence._kinds.clear()
        torch.save({name: run(name, CASES[name]) for name in SOME}, tmp_path / file)
    assert not replay.compare(tmp_path / "a.pt", tmp_path / "b.pt")
    found = torch.load(tmp_path / "b.pt")
    name, t = next((n, t) for n in SOME for t in found[n].values() if isinstance(t, torch.Tensor))
    t.view(torch.uint8).view(-1)[0] ^= 1
    torch.save(found, tmp_path / "b.pt")
    assert replay.compare(tmp_path / "a.pt", tmp_path / "b.pt")
    assert name in capsys.readouterr().out
