"""Random views of decoded images: nldist's, made of a whole batch, against torchvision's transforms, image by image.

    OMP_NUM_THREADS=1 python benchmarks/views.py [--turns 9]

64 images, one thread, in turns: CIFAR's view of 32 pixels (padded, cropped, flipped, normalised), and Clothing1M's of
224 pixels from 256 (a crop, flipped, normalised). torchvision's are its v2 transforms of uint8 tensors, as its own
guide advises. Leaves benchmarks/results/views-DATE.json.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import record
import torch
from torch import Tensor
from torchvision.transforms import v2

from nldist.data.augment.spatial import Flip, PadCrop, RandomCrop
from nldist.data.views import View
from nldist.errors import main_guard

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
NUM_IMAGES = 64
END = (v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD))
# Side of the images, our view, torchvision's.
VIEWS = {
    "32 px": (
        32,
        View([PadCrop(op="pad_crop", size=32, padding=4), Flip(op="flip")], MEAN, STD),
        v2.Compose([v2.RandomCrop(32, padding=4), *END]),
    ),
    "224 px": (
        256,
        View([RandomCrop(op="random_crop", size=224), Flip(op="flip")], MEAN, STD),
        v2.Compose([v2.RandomCrop(224), *END]),
    ),
}


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


@main_guard
def main() -> None:
    """Measure in turns, print and record medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, ratios = {}, {}
    for name, (side, ours, theirs) in VIEWS.items():
        images = torch.randint(0, 256, (NUM_IMAGES, 3, side, side), dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)  # as the stream has them
        sizes, draws = torch.full((NUM_IMAGES, 2), side), torch.arange(NUM_IMAGES)
        calls: dict[str, Callable[[], Tensor]] = {
            "nldist": lambda ours=ours, given=(images, sizes, draws): ours(*given, (0, 1)),  # type: ignore[misc]
            "torchvision": lambda theirs=theirs, images=images: torch.stack([*map(theirs, images)]),  # type: ignore[misc]
        }
        turns = [{side: cpu_seconds(call) for side, call in calls.items()} for _ in range(options.turns + 1)][1:]
        ratios[name] = median(turn["torchvision"] / turn["nldist"] for turn in turns)
        rows[name] = {side: median(turn[side] for turn in turns) for side in calls}
        print(f"{name}: {rows[name]}, torchvision takes {ratios[name]:.2f} times as long")
    results = {"num_images": NUM_IMAGES, "cpu_seconds": rows, "ratios": ratios}
    print(f"recorded in {record.write('views', ['torch', 'torchvision'], results)}")


if __name__ == "__main__":
    sys.exit(main())
