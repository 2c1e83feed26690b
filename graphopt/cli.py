"""The command ``graphopt``.

Exit codes: 0, done, and the answer is yes where there is a question; 1, the answer is no (a check failed, a bound is
not met); 2, the command could not be carried out: wrong arguments, a model that cannot be loaded or captured; 3, an
error that nobody foresaw, with its traceback.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from graphopt import __version__
from graphopt.commands import bench, bisect, calibrate, elastic, explain, plan, show
from graphopt.commands.common import CRASH, USAGE
from graphopt.commands.explore import app as explore_commands
from graphopt.errors import GraphoptError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Optimise and price PyTorch training steps.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 it could not be carried out, 3 an unforeseen error.",
)  # fmt: skip


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"graphopt {__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="Log what is done to the standard error; -vv: passes too."),
    ] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    """Optimise and price PyTorch training steps."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("graphopt").setLevel(logging.INFO if verbose == 1 else logging.DEBUG)


for command in (
    calibrate.calibrate, plan.plan, explain.explain, show.show, bench.bench, elastic.elastic, bisect.bisect
):  # fmt: skip
    app.command()(command)
app.add_typer(explore_commands, name="explore")


def main(arguments: Sequence[str] | None = None) -> Any:
    """Entry point: errors of ours are a line, not a traceback."""
    try:
        return app(None if arguments is None else list(arguments))
    except GraphoptError as error:
        typer.secho(f"graphopt: {error}", fg="red", err=True)
        raise SystemExit(USAGE) from None
    except Exception:  # 1 means no: an error must not
        traceback.print_exc()
        raise SystemExit(CRASH) from None


if __name__ == "__main__":
    main()
