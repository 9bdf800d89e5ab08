"""A run folder belongs to the config in its config.yaml."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from clis.atomic import atomic_write
from clis.config import Config
from clis.config_files import config_differences, config_from_dict, config_to_yaml, read_yaml
from clis.distributed import barrier, is_main


def claim_run_folder(folder: Path, config: Config, within: Collection[str] | None = None) -> None:
    """Writes config.yaml into a new run folder; arguments and errors as `check_run_config`."""
    check_run_config(folder, config, within)
    barrier()
    if is_main():
        with atomic_write(folder / "config.yaml") as temporary:
            temporary.write_text(config_to_yaml(config))


def check_run_config(folder: Path, config: Config, within: Collection[str] | None = None) -> None:
    """
    Args:
        within: sections and keys that matter here; None is all of them.

    Raises:
        ValueError: the folder belongs to another config.
    """
    path = folder / "config.yaml"
    if not path.exists():
        return
    differences = config_differences(config_from_dict(read_yaml(path), source=str(path)), config, within)
    if differences:
        raise ValueError(
            f"{folder} belongs to another config: {'; '.join(differences[:5])}; "
            "pass output=ANOTHER_FOLDER, or remove it"
        )
