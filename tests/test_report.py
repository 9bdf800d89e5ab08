"""The report of runs: what is embedded, and what a real browser shows of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jinja2")

from lvis_cases import annotations_of, detections_of
from report_runs import EMPTY_IMAGES, write_data, write_regions, write_result, write_run
from test_verdicts import detection_rows, hand_made

from clis.__main__ import main
from clis.data.categories import Category
from clis.engine.run_folder import RunFolder
from clis.metric.lvis_eval import Curves
from clis.report.curves import MAX_POINTS, curves_of, smoothed
from clis.report.judged import BOX_BYTES, TRUTH_BYTES, boxes_to_embed, count_bins, image_payload, judge
from clis.report.packed import pack_boxes, to_json, units_of
from clis.report.pictures import worst_images
from clis.report.runs import read_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NAMES = [category["name"] for category in hand_made()["categories"]]
CUP, TEA, DOG = NAMES
WORSE = [row | {"score": row["score"] / 2} for row in detection_rows()[:3]]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = write_data(tmp_path_factory.mktemp("report") / "data")
    write_regions(root)
    return root


def report(*arguments: object) -> dict:
    """Run the command; return what the page embeds."""
    main(["report", *map(str, arguments)])
    out = Path(arguments[arguments.index("--out") + 1])
    text = out.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])


# --- what is embedded ---


def test_a_curve_is_smoothed_from_its_first_value_to_its_last():
    """Windows of 5 in the middle, of 1 and 3 at the ends: a straight line stays one; NaN is left out."""
    line = np.arange(30.0)
    np.testing.assert_allclose(smoothed(line), line)
    peak = np.array([0.0, 0, 0, 10, 0, 0, np.nan])
    np.testing.assert_allclose(smoothed(peak)[:6], [0, 0, 2, 2, 2.5, 0])
    assert np.isnan(smoothed(peak)[6])


def test_curves_have_losses_first_and_leave_evaluations_out():
    records = [
        {"step": 2, "lr": 1.0, "loss": None},
        {"step": 2, "AP": 0.5},
        {"step": 4, "lr": 3.0, "loss": 8},
    ]
    curves = curves_of(records)
    assert curves["steps"] == [2, 4]
    assert list(curves["fields"]) == ["loss", "lr"]
    assert curves["losses"] == 1
    assert curves["fields"]["loss"]["raw"] == [None, 8.0]


def test_a_long_log_is_averaged():
    """Twice as many records as points: pairs (0, 1), (2, 3), ... at the steps of the second of them."""
    records = [{"step": i + 1, "loss": i} for i in range(2 * MAX_POINTS)]
    curves = curves_of(records)
    assert curves["steps"][:2] == [2, 4]
    assert curves["fields"]["loss"]["raw"][:2] == [0.5, 2.5]


def test_bins_have_at_least_three_classes():
    """Classes per bin: 1 | 2 | 4 | 1: the first two are joined, and the last goes to the one before it."""
    counts, ap = [1, 3, 4, 10, 10, 10, 10, 50], [0.9, 0.3, 0.3, 0.1, 0.1, 0.1, 0.1, 0.6]
    categories = [Category(id=i, name=str(i), frequency="r", image_count=c) for i, c in enumerate(counts)]
    precision = np.broadcast_to(np.array(ap)[None, None, :, None], (10, 101, 8, 1))
    curves = Curves(precision=precision, recall=precision[:, 0])
    assert count_bins(curves, categories) == [
        (1, 9, 3, pytest.approx(0.5)),
        (10, 99, 5, pytest.approx(0.2)),
    ]
    two = Curves(precision=precision[:, :, :2], recall=precision[:, 0, :2])
    assert count_bins(two, categories[:2]) == []


def test_scores_stay_on_their_side_of_a_percent():
    """float32 has 0.7 a little below 0.7: it must still pass a slider at 0.70."""
    percents = np.arange(101)
    assert (units_of((percents / 100).astype(np.float32)) == 100 * percents).all()
    assert units_of(np.array([0.69999])).item() < 7000


def test_boxes_are_packed_in_parts_of_their_image():
    import base64

    packed = pack_boxes(np.array([[100.0, 0, 100, 300]]), np.array([[300, 400]]))  # height, width
    corners = np.frombuffer(base64.b64decode(packed["data"]), "<u2") / 65535
    np.testing.assert_allclose(corners, [0.25, 0, 0.5, 1], atol=1e-4)


def test_embedded_json_cannot_end_its_script():
    text = to_json({"name": "</script><!--\u2028&"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["name"] == "</script><!--\u2028&"


def test_every_image_keeps_its_best_boxes_judged_or_not(monkeypatch):
    """Image 10 has three judged boxes and one that is not: with a limit of 1, the best of each remains."""
    run = judge(annotations_of(hand_made()), detections_of(detection_rows()), 300, lambda: None)
    ((rows,), limit) = boxes_to_embed([run], 3)
    assert rows.tolist() == [3, 0, 1, 2, 4, 5, 6, 7]
    # Room for six boxes beside the fates of five objects; two of an image and kind would make seven.
    monkeypatch.setattr("clis.report.judged.ROOM", 5 * TRUTH_BYTES + 6 * BOX_BYTES)
    ((rows,), limit) = boxes_to_embed([run], 3)
    assert limit == 1
    assert rows.tolist() == [3, 0, 4, 6]


def test_the_id_of_an_image_keeps_its_digits():
    """JavaScript's numbers are float64, in which 2**53 + 1 is 2**53."""
    data = hand_made()
    for record, key in [(data["images"][0], "id"), *((each, "image_id") for each in data["annotations"][:2])]:
        record[key] = 2**53 + 1
    annotations = annotations_of(data)
    ids = image_payload(annotations, np.ones(5, bool))["ids"]
    assert ids == ["9007199254740993", "20", "30"]


def test_pictures_are_of_confident_mistakes_and_of_classes_that_fail():
    """By mistake: 10 (0.8), 20 (0.7), 30. By class: the rare cup's object in 20 is the one not found."""
    annotations = annotations_of(hand_made())
    run = judge(annotations, detections_of(detection_rows()), 300, lambda: None)
    assert worst_images(annotations, [run], 2) == [0, 1]
    assert sorted(worst_images(annotations, [run], 99)) == [0, 1, 2]


def test_the_page_of_a_finished_run_has_all_parts(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    page = report(run, "--out", tmp_path / "page.html")
    assert page["notes"] == []
    assert page["runs"][0]["missing"] == []
    assert page["runs"][0]["finished"]
    assert page["runs"][0]["paper"] is None
    assert page["classes"]["trainImages"] == [2, 20, 200]
    assert page["classes"]["imageLevel"] == [0, 0, 2]
    assert page["classes"]["valInstances"] == [2, 1, 2]
    assert len(page["images"]["pictures"]) == 3 + EMPTY_IMAGES
    # a.jpg has a region, b.jpg the center box: the mean score is that of the first alone.
    assert page["regions"]["means"] == [-1, -1, 0.25]
    assert page["regions"]["fallbacks"] == [0, 0, 1]
    by_name = {each["name"]: each for each in page["regions"]["shown"]}
    assert by_name["dog/a.jpg"]["box"] == [0, 0, 0.5, 1]
    assert by_name["dog/b.jpg"]["source"] == "fallback"
    shares = page["runs"][0]["judged"]["errors"]["counts"]
    assert shares == {"class": 1, "location": 1, "both": 0, "duplicate": 1, "background": 1, "missed": 1}


def test_the_page_needs_nothing_from_outside(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(https?:|//)[^"')\s]*""", text))
    assert addresses == set()
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a link
    assert "fetch(" not in text
    assert "<b>" not in re.search(r"<title>(.*?)</title>", text)[1]


def test_the_default_place_is_the_run_folder_and_the_name_its_path(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    main(["report", str(run), "--images", "1"])
    text = (run.path / "report.html").read_text()
    assert "1 with a picture" not in text
    assert f"<title>{run.path} - clis report</title>" in text


def test_an_unfinished_run_shows_its_last_evaluation(root, tmp_path, capsys):
    """The evaluation at step 20 of 40; the log ends within a record."""
    run = write_run(root, tmp_path / "run")
    run.result.unlink()
    run.detections.unlink()
    write_result(root, run.evaluation(20), WORSE)
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 20, "AP": 0.125, "APr": 0.5}) + '\n{"step": 41, "lo')
    page = report(run, "--out", tmp_path / "page.html")
    (head,) = page["runs"]
    assert not head["finished"]
    assert (head["step"], head["steps"], head["evaluatedStep"]) == (40, 40, 20)
    assert head["evaluations"] == [{"step": 20, "AP": 0.125, "APr": 0.5, "APc": -1, "APf": -1}]
    assert head["judged"] is not None
    assert "of the evaluation at step 20" in capsys.readouterr().out


def test_an_evaluation_whose_files_are_gone_keeps_its_figures(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    run.result.unlink()
    with run.metrics.open("a") as file:
        file.write(json.dumps({"step": 20, "AP": 0.125}) + "\n")
    (head,) = report(run, "--out", tmp_path / "page.html")["runs"]
    assert (head["figures"], head["judged"], head["record"]) == ({"AP": 0.125}, None, {})
    assert any("step_00000020/detections.npz does not exist" in text for text in head["missing"])


def test_a_run_that_has_just_begun_says_what_is_missing(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    for path in (run.result, run.detections, run.metrics):
        path.unlink()
    page = report(run, "--out", tmp_path / "page.html")
    assert page["runs"][0]["judged"] is None
    assert any("no curves" in sentence for sentence in page["runs"][0]["missing"])
    assert any("not finished" in sentence for sentence in page["runs"][0]["missing"])
    assert page["classes"]["names"] == NAMES  # what the data set has is shown all the same


def test_data_that_have_moved(root, tmp_path, capsys):
    """Without images there are boxes alone, without annotations curves and figures; overrides find them."""
    run = write_run(root, tmp_path / "run")
    page = report(run, "data.val_images=nowhere", "--out", tmp_path / "page.html")
    assert page["images"]["pictures"] == {}
    assert "Validation images cannot be used; pass data.root=FOLDER" in page["notes"][0]
    page = report(run, f"data.root={tmp_path}", "--out", tmp_path / "page.html")
    assert "classes" not in page
    assert page["runs"][0]["figures"]["AP"] > 0
    assert "the annotations cannot be read" in page["notes"][0]
    assert page["notes"][0] in capsys.readouterr().out
    assert "data.root=FOLDER" in page["notes"][0]
    moved = tmp_path / "moved"
    shutil.copytree(root, moved)
    page = report(run, f"data.root={moved}", "--out", tmp_path / "page.html")
    assert page["notes"] == []


def test_a_missing_region_file_is_named(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    page = report(run, "regions.file=gone.npy", "--out", tmp_path / "page.html")
    assert page["regions"] is None
    assert page["runs"][0]["missing"] == ["No regions: gone.npy: no such file; pass regions.file=FILE."]


def test_settings_of_another_version_are_shown_and_named(root, tmp_path):
    run = write_run(root, tmp_path / "run")
    run.config.write_text(run.config.read_text().replace("clis:\n", "clis:\n  queue_init: empty\n"))
    page = report(run, "--out", tmp_path / "page.html")
    assert page["runs"][0]["recipe"]["clis.queue_init"] == "empty"
    assert "clis.queue_init" in page["runs"][0]["missing"][0]


def test_a_place_that_cannot_be_written_is_said_before_the_work(root, tmp_path, monkeypatch):
    run = write_run(root, tmp_path / "run")
    monkeypatch.setattr("clis.report.page.collect", lambda *args: pytest.fail("too late"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main(["report", str(run), "--out", str(tmp_path / "file" / "report.html")])
    (tmp_path / "mine.yaml").write_text("train: {steps: 3}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: was not written by this version of clis"):
        main(["report", str(run), "--out", str(tmp_path / "mine.yaml")])


def test_a_folder_that_is_no_run_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file"):
        main(["report", str(tmp_path / "runs" / "mistyped")])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_is_not_utf_8(root, tmp_path):
    """Latin-1's é is one byte, which Python keeps as a lone surrogate that no file of text can hold."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_run(root, folder)
    main(["report", str(folder)])
    page = (folder / "report.html").read_text()
    assert rf"<title>{tmp_path}/caf\udce9 - clis report</title>" in page
    main(["plot", str(folder), "--images=1", f"--out={tmp_path / 'plots'}"])
    assert (tmp_path / "plots" / "image_count.png").exists()


def test_bad_input_is_one_line(root, tmp_path, capsys):
    run = write_run(root, tmp_path / "run")
    out = ("--out", str(tmp_path / "page.html"))
    with pytest.raises(FileNotFoundError, match=r"config\.yaml: no such file; name run folders"):
        main(["report", str(tmp_path / "nothing"), *out])
    with pytest.raises(ValueError, match=r"run: is named more than once"):
        main(["report", str(run), f"{run}/.", *out])
    with pytest.raises(ValueError, match=r"--names x=y: write A=B, where A is one of: .*run$"):
        main(["report", str(run), *out, "--names", "x=y"])
    for option in ("--images=-1", "--regions=-1"):
        with pytest.raises(SystemExit):
            main(["report", str(run), *out, option])
        assert "'-1' is not a number of at least 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no run folder"):
        main(["report", "data.root=x", *out])
    other = write_run(root, tmp_path / "other", "data.val=train.json")
    with pytest.raises(ValueError, match=r"other has data\.val .*make a report for each"):
        main(["report", str(run), str(other), *out])
    lines = run.metrics.read_text().splitlines()
    run.metrics.write_text("\n".join([lines[0], "{damaged", lines[1]]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: damaged"):
        read_run(run.path, "run", [])
    run.metrics.write_text("")
    run.result.write_text('{"AP":')
    with pytest.raises(ValueError, match=r"eval\.json: damaged"):
        read_run(run.path, "run", [])


# --- what a browser shows ---


class Page:
    """A page in a browser; any error that it logs fails the test."""

    def __init__(self, browser) -> None:
        self.browser = browser

    def open(self, path: Path, width: int = 1300) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.browser.get(path.as_uri())
        self.check()

    def check(self) -> None:
        assert self.browser.get_log("browser") == []

    def all(self, selector: str) -> list[str]:
        """The texts of what fits a selector."""
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        return self.browser.execute_script(script, selector)

    def text(self, selector: str) -> str:
        return self.all(selector)[0]

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        self.browser.execute_script("document.querySelector(arguments[0]).click()", selector)
        self.wait()

    def choose(self, selector: str, value: str) -> None:
        script = """const node = document.querySelector(arguments[0]); node.value = arguments[1];
                    node.dispatchEvent(new Event("input")); node.dispatchEvent(new Event("change"))"""
        self.browser.execute_script(script, selector, value)
        self.wait()

    def keys(self, selector: str, *keys: str) -> None:
        self.find(selector).send_keys(*keys)
        self.wait()

    def wait(self) -> None:
        """Until the page has drawn itself again."""
        script = "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => done()))"
        self.browser.execute_async_script(script)

    def pane(self, image: int, run: int = 0) -> str:
        """What is said below a run's pane of an image."""
        return self.text(f'[data-image="{image}"] .pane[data-run="{run}"] p')

    def images(self) -> list[str]:
        return self.all("#images .card h3 button")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    selenium = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def written(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    runs = [
        write_run(root, folder / "good", paper={"AP": 29.2, "APr": 24.4}),
        write_run(root, folder / "bad", "loss.alpha=0.7", rows=WORSE),
    ]
    out = folder / "page.html"
    report(
        *runs,
        "--out",
        out,
        "--names",
        "good=<i>good</i>",
        "bad=/a/very_long_path/without_any_space/as_run_folders_have_them/bad",
        "--regions",
        9,
    )
    return out


@pytest.fixture
def page(browser, written) -> Iterator[Page]:
    page = Page(browser)
    page.open(written)
    yield page
    page.check()


def test_names_are_text_and_figures_are_those_of_the_files(page, written):
    assert page.all("#summary tbody th")[0].endswith("<i>good</i>")
    assert "good" not in page.all("i")
    cells = page.all("#summary tbody tr:first-child td")
    figures = json.loads((written.parent / "good" / "eval.json").read_text())
    assert cells[:2] == [f"{100 * figures[name]:.1f}" for name in ("AP", "APr")]
    assert page.text("#summary .paper th") == "A: the paper's figures"
    assert page.all("#summary .paper td")[:4] == ["29.2", "24.4", "", ""]
    assert CUP in page.all("#classes tbody td:first-child")


def test_no_two_of_eight_runs_look_alike(browser, root, tmp_path):
    """There are six colors; the seventh and eighth run have other dashes and markers with them."""
    runs = [write_run(root, tmp_path / f"run{number}") for number in range(8)]
    report(*runs, "--out", tmp_path / "page.html")
    page = Page(browser)
    page.open(tmp_path / "page.html")
    script = (
        "return [...document.querySelectorAll('#summary .run-mark line')]"
        ".map(line => line.getAttribute('stroke') + line.getAttribute('stroke-dasharray'))"
    )
    looks = browser.execute_script(script)
    assert len(set(looks)) == 8
    page.check()


def test_recall_at_different_numbers_of_detections_has_a_column_each(browser, root, tmp_path):
    runs = [write_run(root, tmp_path / name) for name in ("a", "b")]
    figures = json.loads(runs[1].result.read_text())
    figures["AR@20"] = figures.pop("AR@300")
    runs[1].result.write_text(json.dumps(figures))
    report(*runs, "--out", tmp_path / "page.html")
    page = Page(browser)
    page.open(tmp_path / "page.html")
    assert page.all("#summary thead th")[-2:] == ["AR@300", "AR@20"]
    cells = page.all("#summary tbody td")
    assert (cells[9:11], cells[20:22]) == (["50.0", "\u2013"], ["\u2013", "50.0"])
    page.check()


def test_a_run_with_ap_alone_leaves_the_bars_of_others(browser, root, tmp_path):
    """The longest bar, APf 83.5 of the other run, has 70 % of the width; AP 25 has 21 %, and APr none."""
    runs = [write_run(root, tmp_path / name) for name in ("few", "whole")]
    runs[0].result.write_text('{"AP": 0.25}')
    report(*runs, "--out", tmp_path / "page.html")
    page = Page(browser)
    page.open(tmp_path / "page.html")
    script = (
        "return [...document.querySelectorAll('#long-tail .bar i')].map(bar => parseFloat(bar.style.width))"
    )
    widths = browser.execute_script(script)
    assert widths[::2] == [pytest.approx(70 * 0.25 / json.loads(runs[1].result.read_text())["APf"]), 0, 0, 0]
    assert widths[-1] == pytest.approx(70)
    page.check()


def test_the_slider_decides_what_is_right_and_what_is_missed(page):
    """At 0.30 the dog of image 10 has a box of a cup with 0.8; at 0.85 only the cup's own box is left."""
    assert page.pane(10) == "A ✓ 2 right, ≠ 1 wrong class"
    assert page.pane(20) == "A ↔ 1 box off, ✗ 1 nothing there"
    assert page.pane(30) == "A ✓ 1 right, 2\u00d7 1 duplicate, ○ 1 missed"
    page.choose("#score", "0.55")
    assert page.pane(10) == "A ✓ 1 right, ≠ 1 wrong class"
    page.choose("#score", "0.85")
    assert page.pane(10) == "A ✓ 1 right, ○ 1 missed"
    assert page.pane(20) == "A ○ 1 missed"
    assert page.pane(10, run=1) == "B ○ 2 missed"  # its scores are half of A's


def test_the_slider_moves_by_the_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    before = page.pane(10)
    page.keys("#score", Keys.END)
    assert page.text(".toolbar output") == "1.00"
    assert page.pane(10) != before
    page.keys("#score", Keys.HOME)
    assert page.text(".toolbar output") == "0.02"


def test_boxes_that_nobody_can_judge_are_no_mistakes(page):
    """A box of tea with 0.95 in image 10, where tea is not verified: hidden, and never in the order."""
    assert page.images()[0] == "10.jpg"  # by the box of 0.8
    assert "not judged" not in page.pane(10)
    page.click('input[name="verdict"][value="5"]')
    assert page.pane(10).endswith("? 1 not judged")
    count = page.text("#images .pager .count")
    page.click('input[name="verdict"][value="0"]')  # six are chosen, as at first, and yet it is a choice
    assert page.text("#images .pager .count") != count
    page.click('input[name="verdict"][value="0"]')
    page.click('input[name="verdict"][value="5"]')
    page.choose("#class-filter", TEA)
    assert page.images() == ["30.jpg"]


def test_verdicts_filter_the_images(page):
    """Only image 30 has an object that is missed; 20 has the only box with nothing there."""
    assert len(page.images()) == 12
    for verdict in (0, 1, 2, 3, 4):
        page.click(f'input[name="verdict"][value="{verdict}"]')
    assert page.images() == ["30.jpg"]
    assert page.pane(30) == "A ○ 1 missed"
    page.click('input[name="verdict"][value="6"]')
    assert page.images() == []
    page.click('input[name="verdict"][value="4"]')
    assert page.images() == ["20.jpg"]


def test_the_order_of_images_follows_its_field_and_the_run(page):
    page.choose("#image-sort", "file")
    assert page.images()[:3] == ["10.jpg", "20.jpg", "30.jpg"]
    page.choose("#image-sort", "missed")
    assert page.images()[0] == "30.jpg"
    page.choose("#run", "1")  # B has nothing at 0.30 in images 20 and 30, and 30 has two objects
    assert page.images()[:2] == ["30.jpg", "20.jpg"]
    page.choose("#image-sort", "differ")  # right: 2 and 1 in image 10; 1 and 0 in image 30; 0 and 0 in 20
    assert page.images()[:2] == ["10.jpg", "30.jpg"]


def test_pages_turn_by_button_and_by_key(page):
    from selenium.webdriver.common.keys import Keys

    assert page.text("#images .pager .count") == f"1 to 12 of {3 + EMPTY_IMAGES} images"
    page.click('#images .pager button[data-turn="1"]')
    assert page.text("#images .pager .count") == f"13 to 23 of {3 + EMPTY_IMAGES} images"
    assert len(page.images()) == 11
    page.find("body").send_keys("[")
    page.wait()
    assert page.text("#images .pager .count").startswith("1 to 12")
    page.keys("#class-search", "[", Keys.BACKSPACE)  # a key that is typed turns no page
    assert page.text("#images .pager .count").startswith("1 to 12")


def test_the_class_table_sorts_searches_and_groups(page):
    first = "#classes tbody td:first-child"
    assert page.all(first)[0] == TEA  # AP 0; cup and dog have more
    page.click('#classes [data-sort="train"]')
    assert page.all(first) == [CUP, TEA, DOG]
    page.click('#classes [data-sort="train"]')
    assert page.all(first) == [DOG, TEA, CUP]
    assert page.find('#classes [aria-sort="descending"]').text.startswith("training images")
    page.choose("#class-search", "THÉ")
    assert page.all(first) == [TEA]
    page.choose("#class-search", "")
    page.choose("#class-group", "r")
    assert page.all(first) == [CUP]
    # right, called, box off, missed of the cup at 0.30 in run A
    assert page.all("#classes tbody td")[-4:] == ["1", "0", "1", "0"]
    page.choose("#class-group", "f")
    assert page.all("#classes tbody td")[-4:] == ["1", f"1 ({CUP} 1)", "0", "0"]


def test_a_class_says_why_it_fails(page):
    """By keyboard: / and the name. Half of the dogs are called cup; the page shows those images."""
    from selenium.webdriver.common.keys import Keys

    page.find("body").send_keys("/")
    page.browser.switch_to.active_element.send_keys("dog", Keys.ENTER)
    page.wait()
    assert page.text(".chosen-class") == DOG
    why = page.text(".why")
    assert "Its 2 objects at score 0.30: ✓ 1 right, ≠ 1 called another class." in why
    assert f"Called instead: {CUP} 1." in why
    assert "Boxes with this name: 2 right, 1 duplicate, 1 nothing there." in why
    assert page.images() == ["10.jpg", "20.jpg", "30.jpg"]
    assert page.all("#regions figcaption button") == [DOG, DOG]
    page.choose("#class-filter", CUP)
    assert "Those of the wrong class are really: dog 1." in page.text(".why")
    assert page.all("#regions figcaption") == []
    page.click("#all-classes")
    assert len(page.images()) == 12


def test_an_unknown_class_changes_nothing(page):
    page.choose("#class-filter", "no such class")
    assert not page.browser.execute_script("return document.getElementById('class-filter').checkValidity()")
    assert len(page.images()) == 12


def test_the_matrix_is_read_and_zoomed_by_the_keyboard(page):
    """From frequent to rare: dog, tea, cup. A dog is right, the other called cup; the tea is missed."""
    from selenium.webdriver.common.keys import Keys

    read = "#confusion .read"
    assert page.text(read) == "dog: 1 of 2 right"
    page.keys("#matrix", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text(read) == f"dog called {CUP}: 1 of 2"
    page.keys("#matrix", Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert page.text(read) == f"{TEA}: 0 of 1 right"
    pixels = "return document.getElementById('matrix').toDataURL()"
    before = page.browser.execute_script(pixels)
    page.keys("#matrix", "+")
    zoomed = page.browser.execute_script(pixels)
    page.keys("#matrix", "0")
    assert before != zoomed
    assert before == page.browser.execute_script(pixels)
    page.keys("#matrix", Keys.ENTER)
    assert page.text(".chosen-class") == TEA
    assert page.all("table.pairs tbody td") == []  # tea is called nothing else


def test_the_strongest_pairs(page):
    assert page.all("table.pairs tbody td")[:3] == [DOG, CUP, "1 of 2"]
    page.choose("#score", "0.9")
    assert page.all("table.pairs tbody td") == []


def test_curves_begin_at_step_zero_and_are_read_by_keys(page):
    from selenium.webdriver.common.keys import Keys

    chart = '#curves svg[aria-label="loss"]'
    ticks = [text for text in page.all(f"{chart} text") if re.fullmatch(r"\d+", text)]
    assert {"0", "40"} <= set(ticks)
    page.find(chart).send_keys(Keys.HOME)  # loss 10 at step 4
    assert page.text("#curves .chart .read").startswith("step 4: A 10")


def test_an_axis_of_one_bin_has_ticks(page):
    """Classes of 2, 20 and 200 images are one bin at sqrt(1 * 299) = 17.3; no power of ten is near."""
    ticks = "#long-tail svg text[text-anchor=middle]"
    assert page.all(ticks)[:3] == ["17.5", "18", "training images of the class"]


def test_settings_that_differ_in_their_last_digits_differ_in_the_recipe(root, tmp_path):
    runs = [
        write_run(root, tmp_path / name, f"optim.lr={lr}") for name, lr in (("a", 0.01234567), ("b", 1e-5))
    ]
    found = report(*runs, "--out", tmp_path / "page.html")["runs"]
    assert [run["recipe"]["optim.lr"] for run in found] == ["0.01234567", "1e-05"]


def test_the_recipe_shows_where_the_runs_differ(page):
    rows = page.all("#recipe .recipe tr.differs th")
    assert "loss.alpha" in rows
    assert "train.steps" not in rows


def test_an_image_opens_in_a_dialog_and_closes_by_escape(page):
    from selenium.webdriver.common.keys import Keys

    page.choose("#image-sort", "file")
    page.keys("#images .card h3 button", Keys.ENTER)
    rows = page.all("dialog tbody tr")
    assert f"A≠ wrong class{CUP}0.800dog" in rows
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    page.wait()
    assert page.text("dialog h3") == "image 20: 20.jpg"
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.wait()
    assert not page.browser.execute_script("return document.querySelector('dialog').open")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_both_schemes(browser, written, scheme):
    feature = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    page = Page(browser)
    page.open(written, width=400)
    page.choose("#class-filter", DOG)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    red, *_ = map(int, re.findall(r"\d+", browser.execute_script(
        "return getComputedStyle(document.body).backgroundColor")))  # fmt: skip
    assert (red > 200) == (scheme == "light")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_an_unfinished_run_in_the_browser(browser, root, tmp_path):
    run = write_run(root, tmp_path / "run")
    run.result.unlink()
    run.detections.unlink()
    report(run, "--out", tmp_path / "page.html")
    page = Page(browser)
    page.open(tmp_path / "page.html")
    assert any("not finished" in text for text in page.all(".missing"))
    assert page.all("#curves figcaption")[:2] == ["loss", "box"]
    assert len(page.all("#classes tbody tr")) == 3
    assert not page.all("#images, #confusion")
    for path in (run.metrics, root / "none"):
        path.unlink(missing_ok=True)
    report(run, "data.root=nowhere", "--out", tmp_path / "page.html")
    page.open(tmp_path / "page.html")
    assert page.all("#recipe tbody tr")
    page.check()


# --- the size of LVIS ---


def write_large(folder: Path, classes: int = 1203, images: int = 20_000, boxes: int = 30) -> RunFolder:
    """A run on random data: 12 objects of an image, 30 detections near them; 300 photographs of noise."""
    rng = np.random.default_rng(0)
    root = folder / "data"
    (root / "val").mkdir(parents=True)
    counts = np.maximum(1, 20_000 / np.arange(1, classes + 1) ** 1.2).astype(int)
    share = counts / counts.sum()
    labels = rng.choice(classes, (images, 12), p=share)
    corners = rng.integers(0, 400, (images, 12, 2))
    sizes = rng.integers(20, 240, (images, 12, 2))
    near = rng.integers(0, 12, (images, boxes))
    rows = np.arange(images)[:, None]
    wrong = rng.random((images, boxes)) < 0.4
    found = np.where(wrong, rng.choice(classes, (images, boxes)), labels[rows, near])
    shift = rng.integers(-15, 16, (images, boxes, 2))
    categories = [
        {"id": c + 1, "name": f"class_{c}_of_things", "frequency": "rcf"[int(n > 10) + int(n > 100)],
         "image_count": int(n), "instance_count": int(2 * n)}
        for c, n in enumerate(counts)
    ]  # fmt: skip
    records = [
        {"id": i + 1, "file_name": f"{i:012}.jpg", "width": 640, "height": 640,
         "neg_category_ids": (found[i, :10] + 1).tolist(), "not_exhaustive_category_ids": []}
        for i in range(images)
    ]  # fmt: skip
    annotations = [
        {"id": 12 * i + j + 1, "image_id": i + 1, "category_id": int(labels[i, j]) + 1,
         "bbox": [*corners[i, j].tolist(), *sizes[i, j].tolist()], "area": int(sizes[i, j].prod())}
        for i in range(images) for j in range(12)
    ]  # fmt: skip
    text = json.dumps({"images": records, "annotations": annotations, "categories": categories})
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(text)
    from PIL import Image

    base = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(base).resize((640, 640), Image.Resampling.BICUBIC).save(root / "photo.jpg", quality=90)
    for i in range(images):
        os.link(root / "photo.jpg", root / "val" / f"{i:012}.jpg")
    from clis.metric.detections import Detections

    run = write_run(root, folder / "run", "clis.s=0", "clis.t=0", "clis.contrastive=false", rows=[])
    boxes_of = np.concatenate([corners[rows, near] + shift, sizes[rows, near]], axis=2).clip(min=0)
    Detections(
        image_id=np.repeat(np.arange(1, images + 1), boxes),
        category_id=found.ravel() + 1,
        bbox=boxes_of.reshape(-1, 4).astype(np.float32),
        score=rng.beta(0.7, 2, images * boxes).astype(np.float32),
    ).save(run.detections)
    records = [
        {"step": 20 * i, **dict.fromkeys(("loss", "box", "rpn_box", "instance_cls", "lr"), 1 / i)}
        for i in range(1, 4501)
    ]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


@pytest.mark.slow
def test_a_run_of_the_size_of_lvis(browser, tmp_path):
    """1,203 classes and 20,000 images: at most 30 MB, and it answers; docs/report.md says how fast."""
    run = write_large(tmp_path)
    out = tmp_path / "page.html"
    (tmp_path / "other").symlink_to(run.path, target_is_directory=True)
    main(["report", str(run), str(tmp_path / "other"), "--out", str(out)])
    assert out.stat().st_size < 30e6
    page = Page(browser)
    start = time.perf_counter()
    page.open(out)
    opened = time.perf_counter() - start
    assert page.text("#images .pager .count") == "1 to 12 of 20,000 images"
    start = time.perf_counter()
    page.choose("#score", "0.5")
    moved = time.perf_counter() - start
    start = time.perf_counter()
    page.choose("#class-filter", "class_700_of_things")
    filtered = time.perf_counter() - start
    page.check()
    print(
        f"{out.stat().st_size / 1e6:.1f} MB, open {opened:.2f} s, score {moved:.2f} s, class {filtered:.2f} s"
    )
    assert opened < 60
    assert max(moved, filtered) < 20
    assert len(page.images()) <= 12
    assert len(page.all("#classes tbody tr")) == 25
