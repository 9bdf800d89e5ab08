"""What L_con changes: how alike a detector finds a region and its pasted copy.

    python benchmarks/pairs.py runs/shapes/clis runs/pasting_alone

Pairs are drawn as in training, with a seed of their own. Compared are the features that classes are
predicted from (the output of the classification sub-network, before any projection), centered per batch: so
runs without L_con can be measured, too. Retrieval is the share of regions whose own copy is the most similar
of all copies in the batch.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clis.cli import run_command
from clis.config import Config
from clis.data.batch import Batch
from clis.data.loader import MicroBatches, train_loader
from clis.data.streams import make_streams
from clis.engine.checkpoint import load_checkpoint, load_model, saved_config
from clis.engine.run_folder import regions_file
from clis.models import CLISDetector


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_FOLDER")
    parser.add_argument(
        "--batches", type=int, default=30, metavar="N", help="of the run's own size (default 30)"
    )
    parser.add_argument("--seed", type=int, default=77, help="of the pairs (default 77)")
    arguments = parser.parse_args()
    print("| run | pairs a batch | pair | others | retrieval | copies right | regions right |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for run in arguments.runs:
        state = load_checkpoint(run)
        config = saved_config(state, str(run), [f"train.seed={arguments.seed}", "data.workers=0"])
        detector = load_model(state, config, str(run)).eval()
        rows = [measure(detector, batch) for batch in batches(config, arguments.batches)]
        if not rows:
            raise ValueError(f"{run}: no pairs are pasted in its training (clis.t={config.clis.t})")
        print(f"| {run} | " + " | ".join(f"{statistics.mean(column):.2f}" for column in zip(*rows)) + " |")


def batches(config: Config, count: int) -> list[Batch]:
    """Draw batches as a training with this config does; those with fewer than two pairs are passed over."""
    _, dataset, sampler = make_streams(config, regions_file(config))
    drawn = MicroBatches(sampler, range(count), 0, 1, config.train.images_per_step)
    return [batch for batch in train_loader(dataset, drawn, 0, False) if len(batch.pair_boxes) > 1]


@torch.no_grad()
def measure(detector: CLISDetector, batch: Batch) -> tuple[float, ...]:
    """Return pairs, similarity of a pair and of others, retrieval, right classes of copies and of regions."""
    copies, regions = features_of(detector, batch)
    labels = batch.region_labels[batch.pair_regions]
    right = [
        (detector.classification.fc_cls(each)[:, : detector.num_classes].argmax(dim=1) == labels).float()
        for each in (copies, regions)
    ]
    center = torch.cat([copies, regions]).mean(dim=0)
    copies, regions = (F.normalize(each - center, dim=1) for each in (copies, regions))
    similarity, own = regions @ copies.T, torch.eye(len(labels), dtype=torch.bool)
    retrieved = (similarity.argmax(dim=1) == torch.arange(len(labels))).float()
    values = similarity[own], similarity[~own], retrieved, *right
    return len(labels), *(value.mean().item() for value in values)


def features_of(detector: CLISDetector, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the classification features of pasted copies and of their regions, [P,D] each."""
    maps = detector.backbone(batch.images, detector.max_size)
    pooled = detector.roi_align(maps, batch.pair_boxes, batch.pair_images)
    mosaics = detector.backbone.top_down(batch.mosaics.unbind())
    pairs = batch.pair_regions
    regions = detector.roi_align(
        mosaics, batch.regions[pairs], batch.region_mosaics[pairs], detector.backbone.output_convs
    )
    return detector.classification.sub_network(pooled), detector.classification.sub_network(regions)


if __name__ == "__main__":
    run_command(main)
