"""A short run of ``snell study freezing``."""

import json

from click.testing import CliRunner
from texts import make_checkpoint, make_wordnet

from snell.cli import main


def test_the_command_compares_with_and_without_freezing(tmp_path):
    make_checkpoint(tmp_path / "checkpoint")
    make_wordnet(tmp_path / "wordnet")
    words = ["study", "freezing", "--data", f"wordnet={tmp_path / 'wordnet'}", "--checkpoint", tmp_path / "checkpoint"]
    words += ["--steps", 8, "--rank", 2, "--layers", 2, "--labels", 64, "--draws", 2, "--judged", 30, "--out", tmp_path]
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "freezing-wordnet.json").read_text())
    assert [row["method"] for row in document["results"]] == ["snell", "lora"]
    for row in document["results"]:
        for run in row["runs"]:
            assert len(run["frozen"]) == run["adapters"] // 2 == 6
            assert run["safe"]["flops"] < run["plain"]["flops"]
            assert run["safe"]["bytes"] < run["plain"]["bytes"]
            assert 0 < run["safe"]["accuracy"] <= 100
