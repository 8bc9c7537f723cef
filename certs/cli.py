"""The command `fedrt-certs`: a throw-away federation for development, and a look at certificates."""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from certs.inspection import as_json, as_text, inspect_file
from certs.throwaway import Plan, prepare
from fedrt.certificates import describe_time
from fedrt.errors import ConfigurationError, FedrtError
from fedrt.tls import utc_now

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make and inspect the keys and certificates of a federation.",
)


@app.command()
def dev(  # noqa: PLR0913, PLR0917  # one argument per command-line option
    directory: Annotated[Path, typer.Option(help="Where the federation's files go.")],
    federation: Annotated[str, typer.Option(help="Name of the federation.")] = "demo",
    silo: Annotated[list[str] | None, typer.Option(help="Name of a silo; repeat for more.")] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Name of an operator; repeat for more.")] = None,
    address: Annotated[
        list[str] | None,
        typer.Option(help="Where silos dial the coordinator; repeat for more.  [default: localhost, 127.0.0.1]"),
    ] = None,
    days: Annotated[float, typer.Option(help="How long the certificates live.")] = 7,
    replace: Annotated[bool, typer.Option("--replace", help="Make every key and certificate anew.")] = False,
) -> None:
    """Make a throw-away federation: all keys on one disk, for development and demonstrations only.

    Running it again keeps what is valid, adds what is missing and renews what is about to expire.
    """
    if not 0 < days <= 3650:
        raise ConfigurationError(f"--days {days:g} is not possible; choose more than 0 and at most 3650")
    plan = Plan(
        federation=federation,
        silos=tuple(silo or ()),
        operators=tuple(operator or ()),
        addresses=tuple(address or ("localhost", "127.0.0.1")),
        life=timedelta(days=days),
    )
    for member in prepare(directory, plan, utc_now(), anew=replace):
        title = f"{member.identity.role.value} '{member.identity.name}'"
        typer.echo(f"{member.outcome.value} {title}: {member.directory}, valid until {describe_time(member.not_after)}")


@app.command()
def inspect(
    files: Annotated[list[Path], typer.Argument(help="PEM files, or directories that hold a certificate.pem.")],
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say whose certificates these are, who issued them, how long they live, and whether the key beside them fits."""
    now = utc_now()
    reports = tuple(report for path in files for report in inspect_file(path, now))
    typer.echo(as_json(reports) if as_json_ else "\n\n".join(as_text(report) for report in reports))


def main() -> None:
    """Run the command line; an operator's mistake ends with one line on stderr and the error's exit code."""
    try:
        app()
    except FedrtError as error:
        typer.echo(f"fedrt-certs: {error}", err=True)
        sys.exit(error.exit_code)
