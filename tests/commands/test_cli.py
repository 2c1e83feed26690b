"""What all commands share: an example in the help, JSON alone on the standard output, exit codes."""

import json
import logging

import pytest
import typer

from graphopt import __version__, cli
from graphopt.errors import GraphoptError
from tests.commands.program import data, invoke, output

COMMANDS = ("calibrate", "plan", "explain", "show", "bench", "elastic", "explore", "bisect")


def subcommands():
    """All commands as lists of words."""
    for name, command in typer.main.get_command(cli.app).commands.items():
        inner = getattr(command, "commands", None)  # a group of commands has some
        yield from [[name]] if inner is None else ([name, one] for one in inner)


def test_the_commands_are_there():
    assert {words[0] for words in subcommands()} == set(COMMANDS)


@pytest.mark.parametrize("words", list(subcommands()), ids=" ".join)
def test_help_has_an_example_and_json(words):
    said = " ".join(output(*words, "--help").replace("│", " ").split())
    assert f"Example: graphopt {' '.join(words)} " in said
    assert "--json" in said


def test_version():
    assert output("--version").strip() == f"graphopt {__version__}"


def code(monkeypatch, *arguments):
    """The exit code of the command as a process has it."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code


def test_exit_codes(folder, monkeypatch, capsys):
    assert code(monkeypatch, "explain", "my_step.py:step") == 0
    assert code(monkeypatch, "calibrate", "--check") == 1  # nothing was measured: the answer is no
    assert code(monkeypatch, "elastic", "my_step.py:step", "--select", "flops=1") in (0, 1)
    capsys.readouterr()
    assert code(monkeypatch, "explain", "nowhere.py:step") == 2
    assert capsys.readouterr().err.strip() == "graphopt: there is no file nowhere.py"
    assert code(monkeypatch, "explain", "my_step.py:step", "--no-such-option") == 2
    assert code(monkeypatch, "plan", "my_step.py:forward_only") == 2
    assert code(monkeypatch, "explain", "my_step.py:broken") == 3  # not 1, which means no
    assert "in the user's own code" in capsys.readouterr().err


def test_errors_of_usage_are_ours(folder):
    for arguments, why in (
        (("plan", "my_step.py:forward_only"), "about training steps"),
        (("plan", "my_step.py:step", "--batch-sizes", "8,x"), "expected positive integers"),
        (("plan", "my_step.py:step", "--machine", "H100", "--measure"), "leave --machine out"),
        (("plan", "my_step.py:step"), "not calibrated; run `graphopt calibrate`"),
        (("plan", "my_step.py:step", "--schemes", "fast", "--machine", "H100"), "unknown name 'fast'"),
        (("bench", "my_step:the_same"), "gave the same model twice"),
        (("elastic", "my_step.py:step", "--out", "x"), "which subnet"),
        (("elastic", "my_step.py:step", "--select", "speed=1"), "expected a bound of flops"),
        (("elastic", "my_step.py:step", "--select", "flops"), "expected NAME=VALUE"),
        (("elastic", "my_step.py:step", "--choose", "nowhere=8"), "no dimension matches"),
        (("bisect", "my_step.py:step", "--check", "my_step.py:absent"), "has no 'absent'"),
        (("bisect", "my_step.py:step", "--no-verify"), "check of your own"),
    ):
        with pytest.raises(GraphoptError, match=why):
            invoke(*arguments)
            pytest.fail(f"{arguments} raised nothing")


def test_verbose_logs_to_the_standard_error(folder, caplog):
    logger = logging.getLogger("graphopt")
    try:
        result = invoke("-vv", "explain", "my_step.py:step", "--json")
        assert json.loads(result.stdout)["facts"]
        assert any("pass gradient_liveness: " in r.getMessage() for r in caplog.records)
    finally:
        logger.setLevel(logging.NOTSET)


def test_calibrate_says_whether_what_is_kept_holds(folder):
    result = invoke("calibrate", "--check", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["holds"] is False


def test_nothing_is_printed_by_the_library(folder, capfd):
    data("elastic", "my_step.py:step", "--choose", "*.hidden=0.5")
    assert capfd.readouterr().out == ""  # CliRunner has the rest
