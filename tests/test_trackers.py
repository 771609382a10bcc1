"""`report_to`: a tracker gets the numbers of metrics.jsonl and the validation pictures, at the same images; one that is
not there is said so before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from images import write_images
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import metrics, one_sentence, run, write_config


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", 5)


@pytest.mark.slow
def test_tensorboard_gets_numbers_and_pictures(images: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, images, report_to="tensorboard", max_train_images=16, validate_every_images=8, validation_images=4,
        validation_metrics=["psnr"], best_metric="psnr", validation_data={"kind": "folder", "path": str(images)},
    )  # fmt: skip
    done = run(config)
    assert done.returncode == 0, done.stderr
    sheets = sorted((tmp_path / "run" / "report" / "validation").iterdir())
    assert [sheet.name for sheet in sheets] == ["images-000000008.png", "images-000000016.png"]
    with Image.open(sheets[-1]) as sheet:
        assert sheet.size == (5 * 36 + 4, 2 * 36 + 4)  # five images of 32 px, original above reconstruction
    (events,) = (tmp_path / "run" / "ldm-vae").glob("events*")
    tracked = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0})
    tracked.Reload()
    logged = [line for line in metrics(tmp_path / "run") if "loss/total" in line]
    assert [event.step for event in tracked.Scalars("loss/total")] == [line["images"] for line in logged]
    assert [event.value for event in tracked.Scalars("loss/total")] == pytest.approx(
        [line["loss/total"] for line in logged], rel=1e-6
    )
    pictures = tracked.Images("validation")
    assert [event.step for event in pictures] == [8, 16] and (pictures[0].width, pictures[0].height) == (184, 76)


@pytest.mark.parametrize(
    ("name", "says"), [("tensorbord", "report_to: expected one of"), ("aim", "report_to: aim is not installed here")]
)
def test_a_tracker_that_is_not_there_is_an_error(images: Path, tmp_path: Path, name: str, says: str) -> None:
    assert says in one_sentence(run(write_config(tmp_path, images, report_to=name)), 2)
    assert not (tmp_path / "run").exists()
