"""``snell study curve``: one setting varies, and its runs are those of classify."""

import json

from click.testing import CliRunner
from texts import make_checkpoint, make_wordnet

from snell.cli import main
from snell.study import comparison
from snell.study.curve import report


def invoke(*words):
    result = CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_a_curve_compares_at_each_value_and_shares_its_runs_with_classify(tmp_path, monkeypatch):
    monkeypatch.setitem(comparison.SIZES, "validation", 20)
    monkeypatch.setitem(comparison.SIZES, "test", 40)
    make_checkpoint(tmp_path / "checkpoint")
    make_wordnet(tmp_path / "wordnet")
    shared = ["--data", f"wordnet={tmp_path / 'wordnet'}", "--checkpoint", tmp_path / "checkpoint", "--out", tmp_path]
    shared += ["--steps", 2, "--draws", 2, "--methods", "lora", "--methods", "snell", "--labels", 32]
    invoke("study", "curve", *shared, "--layers", 1, "--over", "rank", 2, 4)
    journal = tmp_path / "classify-wordnet.jsonl"
    runs = journal.read_text()
    assert {json.loads(line)["run"]["rank"] for line in runs.splitlines()} == {2, 4}
    invoke("study", "classify", *shared, "--layers", 1, "--rank", 4)
    assert journal.read_text() == runs

    document = json.loads((tmp_path / "curve-wordnet-rank.json").read_text())
    [one] = json.loads((tmp_path / "classify-wordnet.json").read_text())["comparisons"]
    assert [point["value"] for point in document["points"]] == [2, 4]
    assert document["points"][1]["rows"] == one["rows"]
    assert "rank" not in document["settings"]
    assert "| rank: 2 | rank: 4 |" in report(document)
    assert (tmp_path / "curve-wordnet-rank.png").stat().st_size > 1000

    invoke("study", "curve", *shared, "--rank", 2, "--over", "layers", 1, 2)
    layers = {json.loads(line)["run"]["layers"] for line in journal.read_text().splitlines()}
    assert layers == {1, 2}
    invoke("study", "curve", *shared, "--rank", 2, "--layers", 1, "--over", "per-class", 8)
    last = json.loads(journal.read_text().splitlines()[-1])["run"]
    assert (last["per_class"], last["labels"]) == (8, None)
