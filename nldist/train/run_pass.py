"""One pass alone, outside a run's epochs."""

from nldist.passes.base import Metrics, Pass
from nldist.passes.context import Context
from nldist.train.meter import Watch


def run_pass(context: Context, task: Pass, num_steps: int | None = None) -> Metrics:
    """Run a pass from its first step to its end (or the first `num_steps`), and return what it found. A collective.

    Lines tell of the progress.
    """
    plan = task.plan()
    task.start(plan.num_steps, 0)
    watch = Watch(task.name, plan.num_steps, 0, context.config.track.every_seconds)
    stream = context.stream(task.split, plan)
    for step, batches in enumerate(stream):
        task.step(batches, step)
        if step + 1 == num_steps:
            break
        if watch.due() and context.world.is_main:
            rates = watch.rates(stream.num_images * context.world.size, stream.wait_seconds)
            print(watch.line(step + 1, rates, {}), flush=True)
    return task.finish()
