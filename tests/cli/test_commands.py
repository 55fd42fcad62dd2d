"""Help, names of commands, and what is missing is said in a sentence."""

import importlib.util
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from processes import run, without

from snell.cli import BENCHMARKS, COMMANDS, bench, main
from snell.extras import hint


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_python_m_snell_is_snell():
    by_module = run([sys.executable, "-m", "snell", "--help"])
    by_name = run([str(Path(sys.executable).with_name("snell")), "--help"])
    assert by_module.returncode == by_name.returncode == 0
    assert by_module.stdout == by_name.stdout
    assert by_module.stdout.startswith("Usage: snell ")


@pytest.mark.parametrize("arguments, sections", [(["--help"], COMMANDS), (["bench", "--help"], BENCHMARKS)])
def test_help_shows_every_command_in_full(arguments, sections):
    shown = " ".join(invoke(*arguments).output.split())
    for heading, rows in sections.items():
        assert f"{heading}: " in shown
        for name, (_, text) in rows.items():
            assert f"{name} {' '.join(text.split())}" in shown
    assert "..." not in shown.replace("[ARGS]...", "")


@pytest.mark.parametrize("sections", [COMMANDS, BENCHMARKS])
def test_every_command_has_its_module(sections):
    modules = [module for rows in sections.values() for module, _ in rows.values()]
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("arguments", [["nonsense"], ["bench", "nonsense"], ["doctor", "--nonsense"]])
def test_an_unknown_word_is_named(arguments):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "nonsense" in done.output.splitlines()[-1]


@pytest.mark.parametrize("name", [name for rows in BENCHMARKS.values() for name in rows])
def test_a_benchmarks_help_shows_its_options_and_its_modules_docstring(name):
    done = invoke("bench", name, "--help")
    assert done.exit_code == 0, done.output
    assert "--out" in done.output
    assert len(done.output.splitlines()) > 8


def test_help_of_a_benchmark_imports_nothing_that_takes_time():
    code = "import sys; from snell.cli import main; main(['bench', 'layer', '--help'], standalone_mode=False)"
    slow = "print('slow:', {'transformers', 'peft', 'matplotlib', 'sklearn'} & set(sys.modules))"
    done = run([sys.executable, "-c", f"{code}; {slow}"])
    assert done.stdout.splitlines()[-1] == "slow: set()", done.stderr


def test_what_users_run_imports_nothing_from_the_benchmarks():
    modules = [module for module, _ in COMMANDS["Commands"].values() if module.startswith("snell.cli")]
    code = f"import sys, {', '.join(modules)}; print([name for name in sys.modules if name.startswith('snell.bench')])"
    done = run([sys.executable, "-c", code])
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("seconds", ["-1", "0"])
def test_a_time_that_is_none_is_refused(seconds):
    done = invoke("bench", "layer", "--seconds", seconds)
    assert done.exit_code == 2
    assert "--seconds" in done.output


def test_without_click_the_command_line_says_what_to_install():
    done = without("click", "doctor")
    assert done.returncode == 1
    assert done.stderr.strip() == f"snell's command line needs click: {hint('cli')}"


@pytest.mark.parametrize(
    "hidden, arguments, sentence",
    [
        (
            "tqdm",
            ["bench", "layer"],
            f"snell bench layer needs tqdm, which is not installed: {hint('bench')}",
        ),
        ("peft", ["inspect", "."], f"snell inspect needs peft, which is not installed: {hint('cli')}"),
    ],
)
def test_a_missing_extra_is_asked_for_by_name(hidden, arguments, sentence):
    done = without(hidden, *arguments)
    assert (done.returncode, done.stderr.strip()) == (1, f"Error: {sentence}")


SLOW = ("transformers", "peft", "matplotlib", "sklearn")


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["doctor", "--help"], ["inspect", "--help"]])
def test_help_imports_no_slow_package(arguments):
    code = (
        "import sys; from click.testing import CliRunner; from snell.cli import main; "
        f"assert CliRunner().invoke(main, {arguments!r}).exit_code == 0; "
        f"print([name for name in {SLOW!r} if name in sys.modules])"
    )
    done = run([sys.executable, "-c", code])
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_folder_that_cannot_be_written_is_named(monkeypatch):
    def write() -> None:
        Path("/proc/no/such").mkdir(parents=True)

    monkeypatch.setitem(main.commands, "write", click.Command("write", callback=write))
    done = invoke("write")
    assert done.exit_code == 1
    assert done.output.startswith("Error: /proc/no")


@pytest.mark.parametrize("group, path", [(main, []), (bench, ["bench"])])
def test_a_fault_of_the_programs_own_is_not_hidden(monkeypatch, group, path):
    monkeypatch.setitem(next(iter(group.sections.values())), "broken", ("snell.no_such_module", "Nothing."))
    monkeypatch.setitem(group.modules, "broken", "snell.no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        CliRunner().invoke(main, [*path, "broken"], catch_exceptions=False)


def test_a_package_that_is_missed_when_the_command_runs_is_named():
    # "--help" imports none of them, so that only the run can miss it.
    assert without("matplotlib", "inspect", "--help").returncode == 0
    done = without("matplotlib", "inspect", ".")
    sentence = f"snell inspect needs matplotlib, which is not installed: {hint('cli')}"
    assert (done.returncode, done.stderr.strip()) == (1, f"Error: {sentence}")
