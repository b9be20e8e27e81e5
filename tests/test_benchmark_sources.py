"""Which results are of older code: the sources' hash, the commit that changed it, the page."""

import json
import subprocess

import pytest

from benchmarks import sources


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A library, and a result that was measured with its first commit; commit() makes another."""
    here = tmp_path / "whole"
    monkeypatch.setattr(sources, "ROOT", here)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "none"))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    sources.at.cache_clear()

    def commit(**texts):
        for name, text in texts.items():
            path = here / name.replace("__", "/").replace("_py", ".py").replace("_md", ".md")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        subprocess.run(["git", "init", "-q", here], check=True)
        for command in (["add", "-A"], ["commit", "-q", "-m", "another"]):
            subprocess.run(["git", *command], cwd=here, check=True)
        return sources.git("rev-parse", "--short=12", "HEAD")

    commit(csrc__a="1", fpi_cuda__b_py="2", benchmarks__c_py="3", docs__benchmarks_md="a page")
    commit.result = here / "benchmarks" / "results" / "cpu" / "solve.json"
    commit.result.parent.mkdir(parents=True)
    commit.result.write_text(json.dumps({"facts": {"sources": [sources.here()]}}))
    return commit


def said(repository):
    return sources.said(repository.result, json.loads(repository.result.read_text())["facts"])


def test_the_hash_is_of_names_and_contents_and_the_same_from_git(repository):
    first = sources.here()
    assert sources.at(repository(docs__benchmarks_md="another page"))["library"] == first["library"]
    assert sources.here() == {**first, "commit": sources.commit()}
    after = sources.at(repository(benchmarks__c_py="4"))
    assert after["library"] == first["library"] and after["harness"] != first["harness"]
    (sources.ROOT / "csrc" / "a").rename(sources.ROOT / "csrc" / "b")
    assert sources.here()["library"] != first["library"]
    assert sources.here()["commit"] == after["commit"] + "+"
    assert sources.digest([("a", b"1"), ("b", b"2")]) == sources.digest([("b", b"2"), ("a", b"1")])


def test_the_first_commit_that_changed_the_library_is_named(repository, capsys):
    repository(benchmarks__c_py="4")
    assert said(repository) == "" and sources.main() == 0
    first = repository(csrc__a="5")
    assert said(repository) == f" `cpu/solve.json`: measured before commit `{first}`."
    assert sources.main() == 0, "a commit can't name itself"
    repository(fpi_cuda__b_py="6")
    assert f"`{first}`" in said(repository)
    assert sources.main() == 1
    assert "docs/benchmarks.md must say so" in capsys.readouterr().out
    repository(docs__benchmarks_md=said(repository).replace(first, "0123456789ab"))
    assert sources.main() == 1
    repository(docs__benchmarks_md=said(repository))
    assert sources.main() == 0
    repository(csrc__a="1", fpi_cuda__b_py="2")
    assert said(repository) == "" and sources.main() == 1, "the page says it of these sources"


def test_a_commit_that_only_keeps_what_was_measured_is_not_named(repository):
    """What was measured before it was committed."""
    (sources.ROOT / "csrc" / "a").write_text("5")
    measured = sources.here()
    assert measured["commit"].endswith("+")
    repository.result.write_text(json.dumps({"facts": {"sources": [measured]}}))
    repository()
    assert said(repository) == ""
    first = repository(csrc__a="6")
    assert f"`{first}`" in said(repository)


def test_without_history_it_says_so_and_passes(repository, tmp_path, monkeypatch, capsys):
    for text in ("5", "6"):
        repository(csrc__a=text)
    shallow = tmp_path / "shallow"
    command = ["git", "clone", "-q", "--depth", "1", f"file://{sources.ROOT}", shallow]
    subprocess.run(command, check=True)
    for folder, why in ((shallow, "this clone is shallow"), (tmp_path, "no git repository")):
        monkeypatch.setattr(sources, "ROOT", folder)
        assert sources.main() == 0 and said(repository) == ""
        assert f"skipped, which results are of older code can't be told: {why}" in (
            capsys.readouterr().out.replace("there is ", "")
        )
