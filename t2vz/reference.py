"""The tables of commands and options in t2vz/README.md, made from the command line so that they can't fall behind.

python -m t2vz.reference    writes them anew, between their two markers; in the repository's folder
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from t2vz.cli import cli

BEGIN, END = "<!-- commands: begin (python -m t2vz.reference) -->", "<!-- commands: end -->"


def commands_table() -> str:
    """Markdown: for each command its usage, what it does, and a table of its options."""
    lines = []
    with click.Context(cli, info_name="t2vz") as parent:
        for name, command in cli.commands.items():
            with click.Context(command, info_name=name, parent=parent) as context:
                lines += [f"### `t2vz {' '.join([name, *command.collect_usage_pieces(context)])}`", ""]
                lines += [" ".join(part.split()) + "\n" for part in (command.help or "").split("\n\n")]
                options = [one for one in command.params if isinstance(one, click.Option)]
                records = filter(None, (option.get_help_record(context) for option in options))
                lines += ["| option | meaning |", "| --- | --- |"]
                lines += [f"| `{_cell(option)}` | {_cell(meaning)} |" for option, meaning in records]
                lines.append("")
    return "\n".join(lines)


def with_commands(document: str) -> str:
    """`document` with the present tables between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{commands_table()}\n{END}{after}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    readme = Path(sys.argv[1] if len(sys.argv) > 1 else "t2vz/README.md")
    readme.write_text(with_commands(readme.read_text("utf-8")), "utf-8")
