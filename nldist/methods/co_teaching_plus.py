"""Co-teaching+ (Yu et al., ICML 2019): docs/baselines.md."""

from collections.abc import Sequence

from torch import Tensor

from nldist.methods.co_teaching import CoTeaching


class CoTeachingPlus(CoTeaching):
    """Co-teaching, and after some epochs only among the samples about which the networks disagree."""

    def candidates(self, logits: Sequence[Tensor], epoch: int) -> Tensor:
        """Algorithm 1, line 4: those with different predictions; all during the warm-up."""
        if epoch < self.context.config.method.co_teaching_plus.warmup_epochs:
            return super().candidates(logits, epoch)
        first, second = (each.argmax(1) for each in logits)
        return first != second
