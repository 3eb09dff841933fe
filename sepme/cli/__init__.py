"""The command line: ``sepme demo | train | inspect | verify | generate | export | import | reproject | eval | bench``.

Exit codes: 0 done, 1 a check did not hold, 2 bad input (one line on stderr), 130 interrupted. With ``--json`` every command
writes exactly one JSON document to stdout; everything else goes to stderr.
"""

from __future__ import annotations

import sys

import typer

from ..errors import Interrupted, SepMEError, out_of_memory
from . import bench, convert, evaluate, generate, inspect, train, verify

__all__ = ["app", "main"]

HELP = (
    "Take things out of what a diffusion model draws (styles, characters, brands, nudity) and put them back: each is a small file, a "
    "delta, that is switched on and off while everything else stays as it is. Begin with: sepme demo"
)
app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, help=HELP)
for command in (generate.demo, train.train, inspect.inspect, verify.verify, generate.generate, convert.export, convert.reproject):
    app.command()(command)
app.command("import")(convert.import_)
app.command("eval")(evaluate.evaluate)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: one line for bad input, no traceback."""
    try:
        code = app(standalone_mode=False)
    except SepMEError as error:
        print(f"sepme: {' '.join(str(error).splitlines())}", file=sys.stderr)
        code = 2
    except (Interrupted, KeyboardInterrupt, typer.Abort):
        print("sepme: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click, or of the copy of click that newer typer carries
            print(f"sepme: {' '.join(error.format_message().split())}", file=sys.stderr)
        elif out_of_memory(error):
            print("sepme: out of memory; close other programs, ask for less at once or use a machine with more memory", file=sys.stderr)
        else:
            raise
        code = 2
    sys.exit(code if isinstance(code, int) else 0)
