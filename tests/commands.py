"""Commands of the benchmarks, called as from a wide terminal."""

from typer import Typer
from typer.testing import CliRunner


def call(command, *arguments):
    app = Typer()
    app.command()(command)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(map(str, arguments)))
