"""What command lines have in common: an error of ours becomes a message and an exit code, not a traceback."""

from typing import Any

from typer.core import TyperGroup

from fedrt.daemon import report
from fedrt.errors import FedrtError


class Commands(TyperGroup):
    """Turns a `FedrtError` of any command into one message on stderr and its exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except FedrtError as error:
            ctx.exit(report(error))
