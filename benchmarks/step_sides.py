"""One side of benchmarks/dividemix_step.py, in a process of its own: python step_sides.py KIND TREE DATA AUTOCAST.

KIND: nldist (of the work tree TREE), released (the authors' script, in the folder TREE) or reference
(benchmarks/reference). For each line "step" or "epoch" on the standard input it does one and prints its seconds and CPU
seconds; for "operations" a step, and how many operations its products and convolutions are.
"""

import ast
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

HALF, EPOCH = 64, 12
Work = dict[str, Callable[[], object]]


def main() -> None:
    """Answer until the input ends."""
    kind, tree, data, autocast = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    sys.path.insert(0, str(tree))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)
    work = {"nldist": nldist, "released": released, "reference": reference}[kind](tree, data, autocast)
    for line in sys.stdin:
        if line.strip() == "operations":
            with FlopCounterMode(display=False) as counter:
                work["step"]()
            print(counter.get_total_flops(), 0, file=sys.__stdout__, flush=True)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        work[line.strip()]()
        print(time.perf_counter() - wall, time.process_time() - cpu, file=sys.__stdout__, flush=True)


def division(number: int, num_images: int) -> np.ndarray:
    """Clean probabilities by which the first half of the images is labelled: every side then makes as many steps."""
    random = np.random.default_rng(number)
    labelled = np.arange(num_images) < num_images // 2
    return np.where(labelled, random.uniform(0.55, 0.95, num_images), random.uniform(0.0, 0.4, num_images))


def nldist(tree: Path, data: Path, autocast: str) -> Work:
    """The passes that `nldist train` would run, of this nldist or of 0.1."""
    from nldist.dist.world import World
    from nldist.methods.build import build_method

    settings = [
        *("method.dividemix.warmup_epochs=10", f"data.root={data / 'set'}", "data.label_set=null"),
        *("data.num_workers=0", f'train.autocast="{autocast}"', "train.eval_batch_size=256"),
    ]
    config_file = tree / "configs" / "cifar10" / "dividemix.yaml"
    world = World.start(num_threads=1, device="cpu").__enter__()
    if (tree / "nldist" / "train.py").exists():  # 0.1
        from nldist.config_file import load_config  # type: ignore[import-untyped,import-not-found]

        from nldist.methods.dividemix import DividePass  # type: ignore[attr-defined]
        from nldist.train import build_context  # type: ignore[attr-defined]

        context = build_context(load_config(config_file, settings), world)
        passes: Any = DividePass
        column = context.table.__getitem__
    else:
        from nldist.config.file import load_config
        from nldist.passes.context import Context
        from nldist.passes.data import Data

        config = load_config(config_file, [*settings, "data.decoded_cache_gib=0"])
        context = Context(config, "train", config.recipe, world, Data.open(config.data))
        passes = None
        column = lambda name: context.table[name].numpy()  # noqa: E731
    method: Any = build_method(context)
    passes = passes or method.ssl

    def divide() -> None:
        for number in (0, 1):
            column(f"clean{number}")[:] = division(number, len(context.train))

    def steps() -> Iterator[object]:
        divide()
        while True:
            task = passes(method, 0, EPOCH)
            plan = task.plan()
            task.start(plan.num_steps, 0)
            for step, batches in enumerate(stream(context, plan)):
                yield task.step(batches, step)

    def epoch() -> None:
        phase = method.phases()[1]
        for task in phase.passes(EPOCH):
            plan = task.plan()
            task.start(plan.num_steps, 0)
            for step, batches in enumerate(stream(context, plan)):
                task.step(batches, step)
            task.finish()
            divide()

    iterator = steps()
    return {"step": lambda: next(iterator), "epoch": epoch}


def stream(context: Any, plan: Any) -> Any:
    """A plan's batches; 0.1 asks for the index first."""
    try:
        return context.stream("train", plan)
    except AttributeError:
        return context.stream(context.train, plan)


def released(tree: Path, data: Path, autocast: str) -> Work:
    """The functions of the authors' Train_cifar.py and the data set of their dataloader_cifar.py, on the CPU."""
    meter = types.ModuleType("torchnet.meter")
    meter.AUCMeter = None  # type: ignore[attr-defined]
    sys.modules |= {"torchnet": types.ModuleType("torchnet"), "torchnet.meter": meter}
    # As the script was written for: it asks iterators for next(), and a GPU for everything.
    torch.utils.data.dataloader._BaseDataLoaderIter.next = lambda self: self.__next__()  # type: ignore[attr-defined]
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign,assignment]
    images, labels = (np.load(data / "raw.npz")[name] for name in ("images", "labels"))
    num_images = len(images)
    script = ast.parse((tree / "Train_cifar.py").read_text().replace("50000", str(num_images)))
    wanted: list[ast.stmt] = [
        node for node in script.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ImportFrom)
    ]
    space: dict[str, Any] = {"torch": torch, "np": np, "sys": sys, "F": torch.nn.functional, "nn": torch.nn}
    options = {"batch_size": HALF, "num_class": 10, "T": 0.5, "alpha": 4.0, "lambda_u": 25.0, "r": 0.5}
    space["args"] = types.SimpleNamespace(**options, dataset="cifar10", noise_mode="sym", num_epochs=300)
    exec(compile(ast.Module(wanted, []), "Train_cifar.py", "exec"), space)
    space |= {"CE": torch.nn.CrossEntropyLoss(reduction="none"), "criterion": space["SemiLoss"](), "warm_up": 10}
    nets = [space["create_model"]() for _ in (0, 1)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4) for net in nets]

    import dataloader_cifar

    made = dataloader_cifar.cifar_dataloader("cifar10", 0.5, "sym", HALF, 0, "", None)

    def loader(mode: str, ids: np.ndarray, clean: np.ndarray, transform: Any) -> Any:
        part = object.__new__(dataloader_cifar.cifar_dataset)
        part.mode, part.transform, part.train_data = mode, transform, images[ids]
        part.noise_label, part.probability = labels[ids].tolist(), clean[ids].tolist()
        return torch.utils.data.DataLoader(part, HALF, shuffle=mode != "all")

    def train(own: int, num_rows: int) -> None:
        clean = division(1 - own, num_images)
        first = np.arange(num_images // 2)[:num_rows]
        parts = [("labeled", first), ("unlabeled", first + num_images // 2)]
        loaders = [loader(mode, ids, clean, made.transform_train) for mode, ids in parts]
        space["train"](EPOCH, nets[own], nets[1 - own], optimizers[own], *loaders)

    def epoch() -> None:
        everything = np.arange(num_images)
        space["eval_loader"] = loader("all", everything, division(0, num_images), made.transform_test)
        for net in nets:
            space["eval_train"](net, [])
        for own in (0, 1):
            train(own, num_images)

    sys.stdout = sys.stderr  # the script's progress
    return {"step": lambda: train(0, HALF), "epoch": epoch}


def reference(tree: Path, data: Path, autocast: str) -> Work:
    """benchmarks/reference."""
    from reference import dividemix
    from reference.network import TwoHeads

    images, labels = (np.load(data / "raw.npz")[name] for name in ("images", "labels"))
    num_images, settings = len(images), dividemix.Settings()
    nets = [TwoHeads(10) for _ in (0, 1)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4) for net in nets]

    def train(own: int, num_rows: int) -> None:
        clean, first = division(1 - own, num_images), np.arange(num_images // 2)[:num_rows]
        parts = [
            dividemix.Views(images, labels, ids, dividemix.RANDOM, 2, clean) for ids in (first, first + num_images // 2)
        ]
        dividemix.train(nets[own], nets[1 - own], optimizers[own], *parts, EPOCH, settings)

    def epoch() -> None:
        for net in nets:
            dividemix.clean_probability(dividemix.sweep(net, images, labels, settings)[0])
        for own in (0, 1):
            train(own, num_images)

    return {"step": lambda: train(0, HALF), "epoch": epoch}


if __name__ == "__main__":
    main()
