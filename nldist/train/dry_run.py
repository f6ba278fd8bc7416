"""What a run would do, without training: data, steps, memory, state per sample."""

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from nldist.config import Config, EngineSection
from nldist.data.plan import sweep
from nldist.data.stream import Batch
from nldist.dist.deepspeed_settings import read_own_settings
from nldist.dist.optimizer import num_moments
from nldist.dist.world import World
from nldist.models import Network
from nldist.passes.context import Context
from nldist.passes.data import Data, check_size
from nldist.passes.method import Method, Phase
from nldist.run.directory import RunDirectory
from nldist.train.stages import TRAIN, check_stages, stage_directories, stages_of

_STEPS_AHEAD = 4  # batches of one worker that are made, waiting or in use
_PROBE = 4  # images in the forward and backward pass that measures activations


def dry_run(config: Config, world_size: int) -> Iterator[str]:
    """Check the data and the settings; yield the report's lines.

    Raises:
        UserError: whatever a run with this configuration would refuse.
    """
    world, engine = World.single(), config.engine
    read_own_settings(engine)
    config = config.model_copy(update={"engine": EngineSection()})  # whose networks are the same, and sooner there
    data = Data.open(config.data)
    check_size(len(data.train), world_size)
    yield from _data_lines(Context(config, TRAIN.name, config.recipe, world, data))
    directories = stage_directories(config, data.fingerprint(labels=False))
    check_stages(config, data, directories, world_size)
    directories |= {TRAIN.name: config.run.dir}
    for stage in stages_of(config):
        path = directories[stage.name]
        done = stage is not TRAIN and RunDirectory(path).summary is not None
        yield f"stage       {stage.name} in {path}{' (done before: it will not run)' if done else ''}"
        context = Context(config, stage.name, stage.recipe(config), world, data)
        yield from _method_lines(context, stage.build(context), engine, world_size)


def _method_lines(context: Context, method: Method, settings: EngineSection, world_size: int) -> Iterator[str]:
    yield from _phase_lines(context, method, world_size)
    yield from _memory_lines(context, method, settings, world_size)


def _data_lines(context: Context) -> Iterator[str]:
    config, train, test = context.config, context.train, context.evaluation
    yield f"data set    {train.name} at {config.data.root}: {train.num_classes} classes"
    labels = config.data.label_set or "as given"
    yield f"train       {len(train):,} samples in {len(train.shards)} shards; labels: {labels}"
    yield f"evaluation  {len(test):,} samples in {len(test.shards)} shards (split {test.split})"
    if (further := context.data.test) is not None:
        yield f"test        {len(further):,} samples in {len(further.shards)} shards (split {further.split})"
    if context.clean is not None:
        wrong = float((context.clean != context.labels).mean())
        yield f"noise       {wrong:.1%} of the labels differ from label set {config.data.clean_label_set}"
    for index in (train, test):
        split = "train" if index is train else "evaluation"
        sizes = {tuple(size) for size in _probe(context, split).sizes.tolist()}
        yield f"decoded     the first images of {index.split}: {', '.join(f'{h}x{w}' for h, w in sorted(sizes))} pixels"


def _probe(context: Context, split: str) -> Batch:
    """The first images of a split, read and decoded as in training."""
    plan = sweep(min(_PROBE, len(context.data.index(split))), rank=0, size=1, batch_size=_PROBE)
    return next(iter(context.stream(split, plan)))["all"]


def _phase_lines(context: Context, method: Method, world_size: int) -> Iterator[str]:
    for phase, epoch in _phases(method):
        yield f"phase       {phase.name}: {phase.num_epochs} epochs on {world_size} rank(s), each of"
        for task in phase.passes(epoch):
            if not task.batch:
                yield f"              {task.name}: {task.plan().num_steps:,} steps without images"
                continue
            first = next(iter(task.batch.values()))
            steps = -(-task.num_samples // (first * world_size))
            bound = "at most " if len(task.batch) > 1 else ""
            roles = " + ".join(f"{size} {role}" for role, size in task.batch.items())
            yield f"              {task.name}: {bound}{steps:,} steps of {roles} images per rank"


def _phases(method: Method) -> Iterator[tuple[Phase, int]]:
    """The phases that the run has, each with its first epoch: the one with all its kinds of passes."""
    epoch = 0
    for phase in method.phases():
        if phase.num_epochs:
            yield phase, epoch
        epoch += phase.num_epochs


def _memory_lines(context: Context, method: Method, settings: EngineSection, world_size: int) -> Iterator[str]:
    engine = method.engines[0]
    num_parameters = sum(p.numel() for p in engine.model.parameters())
    optim, averaged = context.recipe.optim, context.recipe.ema_decay is not None
    num_copies = _num_copies(settings.zero_stage, num_moments(optim), world_size) + averaged
    fixed = len(method.engines) * num_copies * 4 * num_parameters + method.extra_bytes
    num_rows = max((task.num_rows for phase, epoch in _phases(method) for task in phase.passes(epoch)), default=0)
    activations = _activation_bytes(context, engine.model) * num_rows
    name, num_networks = context.config.model.name, len(method.engines)
    yield f"model       {name}: {num_parameters / 1e6:.2f} M parameters, {num_networks} network(s)"
    yield (
        f"memory      per rank about {_mib(fixed)} weights, gradients and optimiser + "
        f"{_mib(activations)} activations of {num_rows} images"
    )
    num_workers = context.config.data.num_workers
    shared = num_workers * _STEPS_AHEAD * _largest_batch_bytes(context)
    yield f"reading     per rank {num_workers} worker(s) with at most about {_mib(shared)} of shared memory"
    state = context.table.bytes_per_sample
    owned = -(-len(context.train) // world_size)
    yield f"state       {state} bytes per sample, {_mib(state * owned)} on each rank"


def _num_copies(zero_stage: int, num_moments: int, world_size: int) -> float:
    """Tensors of the weights' size, in float32, that a rank keeps of a network while it trains it.

    They are weights, gradients and the optimiser's moments; under ZeRO also a master copy of the weights. What stage n
    divides over the ranks, stage n - 1 keeps whole.
    """
    optimizer, gradients = (1 / world_size if stage <= zero_stage else 1.0 for stage in (1, 2))
    return (num_moments + (zero_stage > 0)) * optimizer + gradients + 1


def _largest_batch_bytes(context: Context) -> int:
    """A sweep's batch of the largest images, as they are decoded."""
    largest = 0
    for index in (context.train, context.evaluation):
        sides = [min(int(side.max()), context.config.data.max_side) for side in (index.height, index.width)]
        largest = max(largest, 3 * sides[0] * sides[1])
    return largest * context.config.train.eval_batch_size


def _activation_bytes(context: Context, model: Network) -> float:
    """Memory that a training forward keeps for its backward, per image."""
    batch = _probe(context, "train")
    images = context.view(batch, 0, "probe")
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []  # alive until all are counted, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        (output,) = model.train()((images, next(iter(model.heads))))
        loss = output.logsumexp(1).sum()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del loss
    return sum(size for pointer, size in sizes.items() if pointer not in parameters) / len(images)


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
