"""What can be known before a training is known before it, for every stage of the recipe."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import BASELINE, CONFIG, SHORT

from clis.cli import OutOfMemory, is_out_of_memory
from clis.commands import run_verb
from clis.commands.prepare import prepare_image_level
from clis.data.annotations import load_annotations
from clis.engine import at_work, preflight, train
from clis.engine.at_work import only_process
from clis.engine.memory import memory_advice
from clis.engine.preflight import check_images
from clis.engine.run_folder import RunFolder

ORIENTATION = 0x0112


@pytest.fixture
def root(data, tmp_path) -> Path:
    """A copy of the data that a test may damage."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def refused(root, monkeypatch):
    """Start the whole recipe (detector, regions, CLIS), which must end before anything is trained."""

    def trained(*_):
        raise AssertionError("a step was made")

    def start(match: str, *overrides: str, error: type = ValueError) -> None:
        monkeypatch.setattr(train, "train_step", trained)
        output = root.parent / "run"
        with pytest.raises(error, match=match):
            run_verb(
                "train", ["--config", CONFIG, *SHORT, f"data.root={root}", f"output={output}", *overrides]
            )
        assert not (output / "config.yaml").exists()  # the folder belongs to nobody
        assert not (output / "detector" / "config.yaml").exists()

    return start


def val_images(root: Path) -> list[Path]:
    return sorted((root / "shapes" / "val").iterdir())


def change(root: Path, split: str, function) -> None:
    path = root / "shapes" / f"{split}.json"
    document = json.loads(path.read_text())
    function(document)
    path.write_text(json.dumps(document))


class TestBeforeTheDetectorIsTrained:
    def test_a_class_folder_that_matches_nothing(self, root, refused):
        folder = sorted((root / "shapes" / "image_level").iterdir())[0]
        folder.rename(folder.with_name("kitty"))
        refused("1 of 50 image-level classes match no category: kitty")

    def test_a_batch_that_does_not_divide(self, refused):
        refused(
            r"train\.images_per_step=6 is not a whole .* of train\.images_per_process=4 on one process",
            "train.images_per_step=6", "train.images_per_process=4",
        )  # fmt: skip
        refused(
            r"pretrain\.images_per_step=6 is not a whole number",
            "pretrain={epochs: 1, images_per_step: 6, images_per_process: 4}",
        )

    def test_a_missing_root_and_a_missing_mapping(self, root, refused):
        refused("elsewhere", "data.image_level=[elsewhere]")
        refused("none.tsv", "data.mapping=none.tsv", error=(ValueError, OSError))

    def test_a_prepared_index_whose_folders_have_moved(self, root, refused):
        shapes = root / "shapes"
        prepare_image_level([shapes / "image_level"], shapes / "train.json", root / "index", workers=1)
        (shapes / "image_level").rename(shapes / "moved")
        refused("50 of 50 folders and tars that it was prepared from have moved", "data.image_level=[index]")

    def test_missing_backbone_weights(self, refused):
        refused(
            "none.pth: backbone weights are missing", "model.backbone.weights=none.pth",
            error=FileNotFoundError,
        )  # fmt: skip

    def test_boxes_of_other_images(self, root, refused):
        (root / "boxes.json").write_text(json.dumps({"elsewhere/0.jpg": [0, 0, 5, 5]}))
        refused("no box of data.image_level's images", "regions.rule=given", "regions.boxes=boxes.json")

    @pytest.mark.parametrize("place", [0, 7, -1])
    def test_any_validation_image_that_is_missing(self, root, refused, place):
        """Not just the first one."""
        gone = val_images(root)[place]
        gone.unlink()
        refused(f"1 of 20 images cannot be used: {gone}: No such file")

    def test_validation_images_of_another_size(self, root, refused):
        for path in val_images(root):
            with Image.open(path) as image:
                image.resize((24, 24)).save(path)
        refused(
            "20 of 20 images cannot be used: .*24 x 24 pixels, but the annotations say 48 x 48.*and 17 more"
        )

    def test_a_validation_box_that_is_not_finite(self, root, refused):
        change(root, "val", lambda document: document["annotations"][3].update(bbox=[1, 1, -5, 5]))
        refused("not finite or negative")

    def test_no_validation_annotations(self, root, refused):
        change(root, "val", lambda document: document.update(annotations=[]))
        refused("val.json: empty split: no annotations")
        change(root, "val", lambda document: document.pop("annotations"))
        refused("val.json: empty split: no annotations")

    def test_no_training_image(self, refused):
        refused("none of the 40 sampled training images exists", "data.train_images=elsewhere")

    def test_too_little_room_for_the_checkpoints(self, refused, monkeypatch):
        """The detector and CLIS are on one disk."""
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage(10**12, 0, 5_000_000))
        refused("run/detector, .*run: checkpoints will take 0.0[0-9] GB, but only 0.01 GB", error=OSError)

    def test_the_checkpoints_of_a_pretraining_take_room_too(self, root, monkeypatch):
        """Three at once (keep_last is 2), of the size that a pre-training really writes."""
        asked = []

        def stop(needs):
            asked.append(needs)
            raise OSError("too little")

        output = root.parent / "run"
        arguments = [*SHORT, f"data.root={root}", f"output={output}", "train.keep_last=2"]
        pretraining = ["pretrain.epochs=1", "pretrain.image_size=32", "pretrain.images_per_step=8"]
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "check_space", stop)
            for more in ([], pretraining):
                with pytest.raises(OSError, match="too little"):
                    run_verb("train", ["--config", BASELINE, *arguments, *more])
        (((_, without),), ((_, pretrained),)) = asked
        run_verb("pretrain", [BASELINE, *arguments, *pretraining])
        (written,) = {path.stat().st_size for path in (output / "pretrain" / "checkpoints").glob("step*.pt")}
        assert pretrained - without == pytest.approx(3 * written, rel=0.1)

    def test_a_folder_below_a_file(self, root, refused):
        (root.parent / "run").write_text("")
        with pytest.raises(OSError, match="cannot be written"):
            run_verb(
                "train", ["--config", CONFIG, *SHORT, f"data.root={root}", f"output={root.parent / 'run'}"]
            )


def test_what_does_not_count_is_said_at_the_start(root, capsys):
    change(root, "val", lambda document: document["annotations"][0].update(area=0))
    arguments = [*SHORT, f"data.root={root}", f"output={root.parent / 'run'}", "train.steps=2"]
    run_verb("train", ["--config", BASELINE, *arguments])
    said = capsys.readouterr().out
    assert said.index("ground truths do not count: they have an `area`") < said.index("train 2/2")
    run_verb("evaluate", [str(root.parent / "run" / "checkpoints" / "last.pt")])
    assert "ground truths do not count: they have an `area`" in capsys.readouterr().out


class TestSizes:
    def one_image(self, root: Path, size: tuple[int, int], orientation: int) -> Path:
        """An annotation file of one image, which it says is 40 wide and 30 high."""
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.new("RGB", size).save(root / "a.jpg", exif=exif)
        document = {
            "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (root / "a.json").write_text(json.dumps(document))
        return root / "a.json"

    @pytest.mark.parametrize("orientation", [5, 6, 7, 8])
    def test_exif_is_named_where_it_is_the_cause(self, tmp_path, orientation):
        annotations = load_annotations(self.one_image(tmp_path, (30, 40), orientation))
        with pytest.raises(
            ValueError, match=rf"30 x 40 .* 40 x 30 .*EXIF rotation \(orientation {orientation}\)"
        ):
            check_images(annotations, tmp_path)

    @pytest.mark.parametrize(("size", "orientation"), [((30, 40), 1), ((30, 40), 3), ((20, 15), 6)])
    def test_and_only_there(self, tmp_path, size, orientation):
        """Upside down has the same sides; half the size has another cause."""
        annotations = load_annotations(self.one_image(tmp_path, size, orientation))
        with pytest.raises(ValueError, match="Use the images that were annotated") as caught:
            check_images(annotations, tmp_path)
        assert "EXIF" not in str(caught.value)

    def test_an_exif_rotation_of_stored_pixels_is_fine(self, tmp_path):
        check_images(load_annotations(self.one_image(tmp_path, (40, 30), 6)), tmp_path)

    def test_a_header_longer_than_what_is_read_first(self, tmp_path):
        path = self.one_image(tmp_path, (40, 30), 1)
        Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", icc_profile=bytes(200_000))
        check_images(load_annotations(path), tmp_path)


def test_a_split_without_annotations_gives_detections_alone(finished, data, tmp_path, capsys):
    """Also where the metrics of another split were."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "eval.json").write_text('{"AP": 0.25}')
    for name, change_ in (("empty", {"annotations": []}), ("without", {})):
        document = json.loads((data / "shapes" / "val.json").read_text())
        del document["annotations"]
        (tmp_path / f"{name}.json").write_text(json.dumps(document | change_))
        run_verb("evaluate", [
            str(finished / "checkpoints" / "last.pt"), f"data.val={tmp_path / f'{name}.json'}",
            f"output={tmp_path / name}",
        ])  # fmt: skip
        rows = json.loads((tmp_path / name / "detections.json").read_text())
        assert {row["image_id"] for row in rows} <= {image["id"] for image in document["images"]}
        assert len(rows) > 0
        assert not (tmp_path / name / "eval.json").exists()
        assert "has no annotations, so there are detections and no metric" in capsys.readouterr().out


class TestMemory:
    @pytest.mark.parametrize("error", [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 10 bytes."),
        RuntimeError("std::bad_alloc"),
    ])  # fmt: skip
    def test_is_one_line_with_the_settings(self, error):
        line = r"^step 7: out of memory \(.+\)\. Less is needed with a lower s$"
        with pytest.raises(OutOfMemory, match=line), memory_advice(lambda: "step 7", "a lower s"):
            raise error

    def test_other_errors_stay_what_they_are(self):
        assert not is_out_of_memory(RuntimeError("shape '[3]' is invalid for input of size 4"))
        with pytest.raises(RuntimeError, match="shape"), memory_advice(lambda: "", ""):
            raise RuntimeError("shape '[3]' is invalid")

    def test_a_step_names_itself_and_the_last_checkpoint(self, data, tmp_path, monkeypatch):
        """Saved after every second step, it runs out in the fourth."""
        step, calls = train.train_step, []

        def full(*values):
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return step(*values)

        monkeypatch.setattr(train, "train_step", full)
        match = "step 4, the last checkpoint is of step 2: out of memory .*train.images_per_process.*clis.s"
        with pytest.raises(OutOfMemory, match=match):
            run_verb("train", ["--config", BASELINE, *SHORT, f"data.root={data}", f"output={tmp_path}"])


class TestWhatEarlierCommandsMade:
    """A run folder of four steps, its detector's and its regions, in copies of folder and data."""

    @pytest.fixture
    def command(self, root, finished, tmp_path) -> list[str]:
        shutil.copytree(finished, tmp_path / "run")
        return [CONFIG, *SHORT, f"data.root={root}", f"output={tmp_path / 'run'}"]

    def said(self, capsys, *arguments: str) -> str:
        with pytest.raises(SystemExit):
            run_verb("check", [*arguments])
        return capsys.readouterr().out

    def test_as_it_was_it_is_nothing_to_speak_of(self, command, capsys):
        said = self.said(capsys, *command)
        assert "changed since" not in said
        assert "was made by a detector" not in said

    def test_regions_of_a_shorter_detector(self, command, capsys):
        """As after a trial of a few steps; a training does not go on from the trial without a word."""
        longer = [*command, "train.steps=6", "train.device=cpu"]
        told = "regions.npy was made by a detector trained for 4 steps, and this config trains it for 6"
        assert told in self.said(capsys, *longer)
        run_verb("train", longer)
        assert f"WARNING: {command[-1].partition('=')[2]}/{told}" in capsys.readouterr().out

    def test_annotations_that_changed(self, command, root, tmp_path, capsys):
        change(root, "train", lambda document: document["annotations"].pop())
        said = self.said(capsys, *command)
        assert "run is finished and will be used as it is, but " in said
        assert "train.json changed since its training" in said
        longer = [*command, "train.steps=6"]
        with pytest.raises(ValueError, match=r"last\.pt: .*train\.json changed since this training began"):
            run_verb("train", longer)
        assert RunFolder(tmp_path / "run").result.exists()  # it is refused before anything is moved
        assert "changed since this training began" in self.said(capsys, *longer)

    def test_a_region_file_that_does_not_exist(self, command, tmp_path, capsys):
        """A mistyped name would train the detector again without a word."""
        said = self.said(capsys, *command[:-1], f"output={tmp_path / 'new'}", "regions.file=regoins.npy")
        assert (
            "regoins.npy (regions.file) does not exist; a detector is trained for 4 steps to make it" in said
        )


def test_a_folder_that_cannot_be_made_ends_the_start(tmp_path, monkeypatch):
    """As below /proc, where the system says that a folder to be made is not there."""

    def missing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(at_work, "DYING", 0.2)
    monkeypatch.setattr(Path, "mkdir", missing)
    with (
        pytest.raises(OSError, match=r"cannot be written \(No such file or directory\)"),
        only_process(RunFolder(tmp_path / "run")),
    ):
        pass
