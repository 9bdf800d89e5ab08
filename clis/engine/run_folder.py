"""Every path in a run folder, and which run the folder belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from clis.atomic import atomic_write, link, remove_partial_files
from clis.config import Config
from clis.config_files import config_to_yaml, read_full_config, read_yaml
from clis.distributed import barrier, is_main, on_main
from clis.engine.schedule import differences_after

_STEP = re.compile(r"step_(\d{8,})(\.pt)?")
"""Names of checkpoints and of evaluations on the way; a user's own files have others."""
_SECTIONS = {"model", "clis", "loss", "data", "optim", "train", "test", "output"}
"""What the config.yaml of every run has, of whatever version."""

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
        """The saved step of a run that was asked to stop, 0 for none, until it is resumed."""
        self.backbone = self.path / "backbone.pt"
        """What a pre-training makes."""
        self.index_digest = self.path / "index_digest.txt"
        """Of the image-level index whose images a pre-training learns."""
        self.accuracy = self.path / "pretrain.json"
        """How well it classifies the images that were held out."""
        self.tensorboard = self.path / "tensorboard"
        self.lock = self.path / "run.lock"
        """Held by the process that works on the run (see `clis.engine.at_work.only_process`)."""

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
        steps = self.step_checkpoints()[::-1]
        if not self.last.exists():
            return steps
        return [self.last, *(path for path in steps if not path.samefile(self.last))]

    def step_checkpoints(self) -> list[Path]:
        """List the checkpoints that are named after their steps, in the order of these."""
        return sorted(path for path in self.checkpoints.glob("step_*.pt") if _STEP.fullmatch(path.name))

    def step_evaluations(self) -> dict[int, RunFolder]:
        """Return the finished evaluations on the way by their steps, in the order of these."""
        named = ((path, _STEP.fullmatch(path.name)) for path in sorted(self.evaluations.glob("step_*")))
        folders = {int(name[1]): RunFolder(path) for path, name in named if name is not None}
        return {step: folder for step, folder in folders.items() if folder.result.exists()}

    @property
    def steps_done(self) -> int:
        """Return the step of the last checkpoint, by the names of the files; 0 if there is none."""
        numbers = [_STEP.fullmatch(path.name) for path in self.step_checkpoints()]
        return max((int(number[1]) for number in numbers if number is not None), default=0)

    @property
    def is_used(self) -> bool:
        """Whether there is anything that a training has made; else the folder belongs to nobody."""
        has_records = self.metrics.exists() and self.metrics.stat().st_size > 0
        return self.has_begun or self.backbone.exists() or has_records

    def remove_partial_files(self) -> None:
        """Remove the temporary files that killed processes of this run have left."""
        own = {value.name for value in vars(self).values() if isinstance(value, Path)} | {"regions.json"}

        def is_own(name: str) -> bool:
            return name in own or _STEP.fullmatch(name) is not None

        evaluations = (path for path in self.evaluations.glob("step_*") if _STEP.fullmatch(path.name))
        for folder in (self.path, self.checkpoints, *evaluations):
            remove_partial_files(folder, is_own)

    def read_config(self) -> Config:
        """Read the config that the folder belongs to."""
        return read_full_config(self.config)

    def read_result(self) -> dict[str, float]:
        """Read the metrics of the validation split, fractions by name; errors as `read_record`."""
        return {name: value for name, value in self._result().items() if name != RECORD}

    def read_record(self) -> dict[str, Any]:
        """Read where the metrics come from; empty in results of earlier versions.

        Raises:
            FileNotFoundError: the run is not finished.
            ValueError: the file is damaged, or of another kind.
        """
        return self._result().get(RECORD, {})

    def _result(self) -> dict[str, Any]:
        if not self.result.exists():
            raise FileNotFoundError(f"{self.result}: no such file; name folders of finished runs")
        try:
            result = json.loads(self.result.read_text())
        except ValueError as error:
            raise ValueError(f"{self.result}: damaged ({error}); evaluate the checkpoint again") from None
        if not _is_result(result):
            raise ValueError(
                f"{self.result}: not the figures of the standard protocol (AP and others, each a number); "
                "evaluate the checkpoint again"
            )
        return result

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl, none where it is missing; a number that was not finite is None.

        Raises:
            ValueError: a line is not JSON, or no record.
        """
        if not self.metrics.exists():
            return []
        whole = self.metrics.read_text().split("\n")[:-1]  # a running process may be writing the last line
        try:
            records = [json.loads(line) for line in whole]
            if not all(isinstance(record, dict) and "step" in record for record in records):
                raise ValueError("a line is no record of a step")
            return records
        except ValueError as error:
            raise ValueError(f"{self.metrics}: damaged ({error}); a resumed run repairs it") from None

    def check(self, config: Config, within: Collection[str] | None = None) -> None:
        """Check that the folder is free, or belongs to the config.

        A start that failed leaves a folder that belongs to nobody. A run may get more steps where those that
        it has made would have been the same (see `differences_after`).

        Args:
            within: sections and keys that matter here; None is all of them.

        Raises:
            ValueError: it belongs to another config, or holds such files of somebody else.
        """
        if not self.config.exists():
            foreign = [path for path in (self.result, self.metrics) if path.exists()]
            if foreign and not self.saved_checkpoints():  # a resumed run looks at what is in these
                raise ValueError(
                    f"{foreign[0]}: is not of a run, which would use the name (there is no "
                    f"{self.config.name}); pass output=ANOTHER_FOLDER"
                )
            return
        if not self.is_used:
            if not read_yaml(self.config).keys() >= _SECTIONS:
                raise ValueError(
                    f"{self.config}: was not written by a run, which would replace it; pass "
                    "output=ANOTHER_FOLDER"
                )
            return
        differences = differences_after(self.read_config(), config, self.steps_done, within)
        if differences:
            has_detector = within is None and self.last.exists()
            start = f" (with start.from={self} to start from its weights)" * has_detector
            raise ValueError(
                f"{self} belongs to another config: {'; '.join(differences[:5])}; "
                f"pass output=ANOTHER_FOLDER{start}, or remove it"
            )

    def is_finished(self, config: Config) -> bool:
        """Return whether the run has its result, and the config does not ask for more steps."""
        return self.result.exists() and not (
            self.config.exists() and self.read_config().train.steps < config.train.steps
        )

    def claim(self, config: Config, within: Collection[str] | None = None) -> None:
        """Write the config into the folder; arguments and errors as `check`.

        Where the config asks for more steps than a finished run has, its result becomes one on the way.
        """
        self.check(config, within)
        barrier()

        def write() -> None:
            if self.result.exists() and not self.is_finished(config):
                step = self.steps_done
                if config.train.eval_every is not None:
                    self.mark_best(step, self.read_result()["AP"])
                earlier = self.evaluation(step)
                earlier.path.mkdir(parents=True, exist_ok=True)
                for path, kept in ((self.detections, earlier.detections), (self.result, earlier.result)):
                    if path.exists():
                        path.replace(kept)
            with atomic_write(self.config) as temporary:
                temporary.write_text(config_to_yaml(config, self.path))

        on_main(write)

    def mark_best(self, step: int, ap: float) -> None:
        """Make the checkpoint of this step ``best.pt`` unless an earlier evaluation has at least its AP."""
        earlier = [each.read_result()["AP"] for done, each in self.step_evaluations().items() if done < step]
        if ap > max(earlier, default=-1.0):
            link(self.checkpoint(step), self.best)

    def mark_preempted(self) -> None:
        """Note on rank 0 that the run was asked to stop, and which step it has saved."""
        if is_main():
            with atomic_write(self.preempted) as temporary:
                temporary.write_text(json.dumps({"step": self.steps_done}) + "\n")

    def clear_preempted(self) -> None:
        """Remove that note on rank 0: the run is resumed."""
        if is_main():
            self.preempted.unlink(missing_ok=True)


def _is_result(document: object) -> bool:
    """Check that what an eval.json holds has an AP, and a number for every figure."""
    if not isinstance(document, dict) or "AP" not in document:
        return False
    return all(isinstance(value, int | float) for name, value in document.items() if name != RECORD)


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
        raise FileNotFoundError(f"{path}: no checkpoint in this folder; name a run's, or wait for its first")
    return saved[0]


def regions_file(config: Config) -> Path:
    """Return the path of the config's region file, which may not exist yet."""
    return Path(config.regions.file) if config.regions.file else RunFolder(config.output).regions
