"""Several runs of a benchmark: medians, ranges, and what may not differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snell.bench import runs
from snell.bench.experiments import layer


def document(seconds: float, **more):
    entry = {"seconds": seconds, "ratio_to_floor": 2 * seconds, "repetitions": 7, "peak": None}
    return {"file": "x", "cases": [{"dtype": "float32", "methods": {"snell": entry | more}}]}


def test_figures_are_medians_and_times_have_their_range():
    found = runs.combined([document(3.0), document(1.0), document(1.5)])
    entry = found["cases"][0]["methods"]["snell"]
    assert (entry["seconds"], entry["seconds_range"]) == (1.5, [1.0, 3.0])
    assert (entry["ratio_to_floor"], entry["repetitions"], entry["peak"]) == (3.0, 7, None)
    assert runs.spread(entry, "ratio_to_floor") == "3.00 (2.00 to 6.00)"
    assert runs.spread({"ratio_to_floor": 1.239}, "ratio_to_floor") == "1.24"


@pytest.mark.parametrize("other", [document(1.0, error="no memory"), {**document(1.0), "file": "y"}])
def test_runs_that_differ_in_more_than_figures_are_no_runs_of_one_benchmark(other):
    with pytest.raises(ValueError, match="runs must"):
        runs.combined([document(1.0), other])


def test_runs_of_the_layer_are_processes_of_their_own(monkeypatch):
    monkeypatch.setitem(layer.SHAPES, "cpu", ((8, 8, 4),))
    counted = []

    def run(command, **_):
        counted.append(command)
        out = command[command.index("--out") + 1]
        (Path(out) / "layer-cpu.json").write_text(json.dumps(layer.measure("cpu", 0.01)))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(runs.subprocess, "run", run)
    found = layer.measure("cpu", 0.01, runs=3)
    assert len(counted) == 3
    assert all(command[1:5] == ["-m", "snell", "bench", "layer"] and "--runs" not in command for command in counted)
    assert found["settings"]["runs"] == 3
    low, high = found["cases"][0]["methods"]["snell"]["ratio_to_floor_range"]
    assert 0 < low <= found["cases"][0]["methods"]["snell"]["ratio_to_floor"] <= high
    machine = {"cpu": "a", "threads": 1, "torch": "2"}
    assert " to " in layer.report({"command": "snell bench layer --runs 3", "machine": machine, **found})


def test_a_run_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(runs.subprocess, "run", lambda command, **_: type("Done", (), {"returncode": 3}))
    with pytest.raises(RuntimeError, match="run 1 failed with exit status 3"):
        runs.together(2, "bench", "layer")
