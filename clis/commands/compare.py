"""``python -m clis compare RUN_FOLDER...``: results of runs as one table."""

from __future__ import annotations

import argparse

from clis.engine.run_folder import RunFolder
from clis.engine.run_state import RunState
from clis.metric.lvis_eval import format_table
from clis.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `clis compare`: run folders."""
    parser.add_argument(
        "folders", nargs="+", type=RunFolder, metavar="RUN_FOLDER",
        help="a run folder, or one with the results of a checkpoint (clis evaluate)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print the results of runs as one table, with the paper's where a run's config has them.

    An unfinished run has its last evaluation on the way; what is missing is printed below the table.
    """
    rows, missing = {}, []
    for folder in arguments.folders:
        if folder.result.exists() and not folder.config.exists():  # of a checkpoint
            rows[str(folder)] = folder.read_result()
            continue
        state = RunState.read(folder)
        evaluated, name = state.metrics, str(state.folder)
        if state.result is None:
            missing.append(f"{folder}: {state.what_is_missing()}")
            name += f", step {state.step if evaluated is None else evaluated[0]}"
        rows[name] = {} if evaluated is None else evaluated[1]
        if paper := state.config.paper.figures:
            rows[f"{state.folder}: the paper's, not ours"] = {key: paper[key] / 100 for key in paper}
    say("\n".join([format_table(rows), *missing]))
