"""Every path in a run folder, and which run the folder belongs to."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from clis.atomic import atomic_write
from clis.config import Config
from clis.config_files import config_differences, config_from_dict, config_to_yaml, read_yaml
from clis.distributed import barrier, is_main

RECORD = "record"
"""Name in eval.json of what is no metric: where the result comes from."""


class RunFolder:
    """A folder with one training: config, metrics, checkpoints and results.

    It belongs to the config in its config.yaml. The results of an evaluation during training, and those of a
    single checkpoint, are in folders of the same names.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        """Of the evaluation on the way with the highest AP."""
        self.result = self.path / "eval.json"
        """The metrics of the validation split; a run that has it is finished."""
        self.detections = self.path / "detections.npz"
        self.regions = self.path / "regions.npy"
        self.evaluations = self.path / "evaluations"
        self.log = self.path / "log.txt"
        """What the run has said, with the time of day."""
        self.process = self.path / "process.json"
        """Which process works on the run, or how the last one failed."""
        self.preempted = self.path / "preempted.json"
        """The step of a run that was asked to stop, until it is resumed: torchrun hides exit codes."""
        self.backbone = self.path / "backbone.pt"
        """What a pre-training makes."""
        self.accuracy = self.path / "pretrain.json"
        """How well it classifies the images that were held out."""
        self.tensorboard = self.path / "tensorboard"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def pretraining(self) -> RunFolder:
        """Return the folder of this run's pre-training."""
        return RunFolder(self.path / "pretrain")

    @property
    def detector(self) -> RunFolder:
        """Return the folder of the detector that finds this run's regions, where the run's own was named."""
        return RunFolder(self.path / "detector")

    @property
    def start(self) -> RunFolder:
        """Return the folder of the run that this one starts from, where the run's own was named."""
        return RunFolder(self.path / "start")

    def checkpoint(self, step: int) -> Path:
        """Return the path of the checkpoint after `step` steps."""
        return self.checkpoints / f"step_{step:08d}.pt"

    def evaluation(self, step: int) -> RunFolder:
        """Return the folder with the results of the evaluation after `step` steps."""
        return RunFolder(self.evaluations / f"step_{step:08d}")

    @property
    def has_begun(self) -> bool:
        """Whether the run has something to resume from, or is finished."""
        return self.result.exists() or bool(self.saved_checkpoints())

    def saved_checkpoints(self) -> list[Path]:
        """List the checkpoints to resume from, last first: ``last.pt``, then those of other steps."""
        steps = sorted(self.checkpoints.glob("step_*.pt"), reverse=True)
        if not self.last.exists():
            return steps
        return [self.last, *(path for path in steps if not path.samefile(self.last))]

    def read_config(self) -> Config:
        """Read the config that the folder belongs to."""
        return config_from_dict(read_yaml(self.config), source=str(self.config))

    def read_result(self) -> dict[str, float]:
        """Read the metrics of the validation split, fractions by name.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        if not self.result.exists():
            raise FileNotFoundError(f"{self.result}: no such file; name folders of finished runs")
        values = json.loads(self.result.read_text())
        return {name: value for name, value in values.items() if name != RECORD}

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl, none where it is missing; a number that was not finite is None.

        Raises:
            ValueError: a line is not JSON.
        """
        if not self.metrics.exists():
            return []
        whole = self.metrics.read_text().split("\n")[:-1]  # a running process may be writing the last line
        try:
            return [json.loads(line) for line in whole]
        except ValueError as error:
            raise ValueError(f"{self.metrics}: damaged ({error}); a resumed run repairs it") from None

    def check(self, config: Config, within: Collection[str] | None = None) -> None:
        """Check that the folder is free, or belongs to the config.

        Args:
            within: sections and keys that matter here; None is all of them.

        Raises:
            ValueError: it belongs to another config.
        """
        if not self.config.exists():
            return
        differences = config_differences(self.read_config(), config, within)
        if differences:
            raise ValueError(
                f"{self} belongs to another config: {'; '.join(differences[:5])}; "
                "pass output=ANOTHER_FOLDER, or remove it"
            )

    def claim(self, config: Config, within: Collection[str] | None = None) -> None:
        """Write the config into the folder; arguments and errors as `check`."""
        self.check(config, within)
        barrier()
        if is_main():
            with atomic_write(self.config) as temporary:
                temporary.write_text(config_to_yaml(config))

    def mark_preempted(self, step: int) -> None:
        """Note on rank 0 that the run was asked to stop, and has saved this step."""
        if is_main():
            with atomic_write(self.preempted) as temporary:
                temporary.write_text(json.dumps({"step": step}) + "\n")

    def clear_preempted(self) -> None:
        """Remove that note on rank 0: the run is resumed."""
        if is_main():
            self.preempted.unlink(missing_ok=True)


def find_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint that a path names: a file itself, or the last one of a run folder.

    Raises:
        FileNotFoundError: it is a folder without a checkpoint.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        return path
    folder = RunFolder(path.parent if path.name == "checkpoints" else path)
    saved = folder.saved_checkpoints()
    if not saved:
        raise FileNotFoundError(
            f"{path}: a folder without {folder.last.relative_to(folder.path)}; name a run's"
        )
    return saved[0]


def regions_file(config: Config) -> Path:
    """Return the path of the config's region file, which may not exist yet."""
    return Path(config.regions.file) if config.regions.file else RunFolder(config.output).regions
