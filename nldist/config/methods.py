"""Which method, and the settings of each."""

from typing import Literal

from pydantic import Field

from nldist.config.section import File, Name, Section


class MixtureSection(Section):
    """The two-component mixture over the losses (DivideMix, section 3.1; defaults of its authors' code)."""

    max_iter: int = Field(10, ge=1, description="EM iterations at most; the early stop is part of the method")
    tol: float = Field(1e-2, gt=0, description="stop when the mean log-likelihood changes by less")
    reg_covar: float = Field(5e-4, gt=0, description="added to both variances")
    history: int = Field(1, ge=1, description="epochs of normalised losses averaged (reference: 5 at 90 % noise)")


class MixupMethod(Section):
    """Settings of method.name=mixup."""

    alpha: float = Field(1.0, gt=0, description="mixing weight ~ Beta(alpha, alpha)")


class DivideMixMethod(Section):
    """Settings of method.name=dividemix (symbols as in the paper; docs/dividemix.md)."""

    warmup_epochs: int = Field(10, ge=0, description="epochs of cross-entropy before the first split")
    warmup_penalty: bool = Field(False, description="add negative entropy in the warm-up (asymmetric or real noise)")
    tau: float = Field(0.5, gt=0, lt=1, description="labelled if the clean probability exceeds it")
    temperature: float = Field(0.5, gt=0, description="T of sharpening")
    alpha: float = Field(4.0, gt=0, description="mixing weight ~ Beta(alpha, alpha)")
    lambda_u: float = Field(25.0, ge=0, description="weight of the unlabelled loss (form=cifar)")
    rampup_epochs: float = Field(16.0, gt=0, description="epochs over which lambda_u grows from 0")
    form: Literal["cifar", "real"] = Field(
        "cifar", description="real: the published WebVision/Clothing1M form, labelled rows only, no unlabelled loss"
    )
    peers: Literal["sequential", "parallel"] = Field(
        "parallel", description="train against the updated peer, or against last epoch's"
    )
    subset: int | None = Field(
        None, ge=2, description="class-balanced samples drawn per network and epoch (Clothing1M); none = all"
    )
    warmup_subset: int | None = Field(None, ge=2, description="the same for the epochs of the warm-up; none = all")


ViewName = Literal["weak", "strong", "by_noise"]


class ScanMixMethod(Section):
    """Settings of method.name=scanmix, beside those of method.dividemix (docs/scanmix.md)."""

    lambda_e: float = Field(5.0, ge=0, description="weight of the entropy of the mean prediction")
    batch_size: int = Field(128, ge=4, description="anchors per step, rank and network in the clustering pass")
    cluster_every: int | None = Field(
        1, ge=1, description="epochs between clustering passes; none = never, the paper's ablation"
    )
    anchors: int | None = Field(None, ge=2, description="anchors drawn afresh for a clustering pass; none = all images")
    include_self: bool = Field(True, description="count an image among its own neighbours, as the authors' code")
    noise_threshold: float = Field(0.6, ge=0, le=1, description="estimated noise rate above which noise is high")
    lr_low: float = Field(1e-5, gt=0, description="clustering learning rate at low noise")
    lr_high: float = Field(1e-3, gt=0, description="clustering learning rate at high noise")
    warmup_view: Literal["weak", "strong"] = Field("strong", description="weak is views.train, strong views.strong")
    ssl_view: ViewName = Field("by_noise", description="by_noise: strong where the estimated noise is high")
    cluster_view: ViewName = Field("by_noise", description="by_noise: strong where the estimated noise is high")


class SANMSection(Section):
    """Settings of method.ssl=sanm (docs/sanm.md); shares are of an image's area."""

    ratio_low: float = Field(0.02, ge=0, le=1, description="s_l: least masking ratio of a sample whose label is right")
    ratio_high: float = Field(0.07, ge=0, le=1, description="s_h: greatest one")
    noise_ratio: float = Field(0.03, ge=0, le=1, description="gamma: what it grows by with the probability of noise")
    area: float = Field(0.5, gt=0, le=1, description="of the ratio, that each of the two masks covers")
    separate_draws: bool = Field(False, description="draw aspect and filling for each of the two masks (Clothing1M)")
    lambda_rec: float = Field(0.02, ge=0, description="weight of the reconstruction")
    guess_view: Name = Field("train", description="view that targets are guessed from and that is masked")
    pair_view: Name = Field("train", description="view of two more rows of each image (dividemix.form=cifar)")
    strong_view: Name = Field("strong", description="view of two more rows of each image (dividemix.form=cifar)")


class LendMethod(Section):
    """Settings of method.name=lend (symbols as in the paper; docs/lend.md)."""

    profile: Literal["code", "paper"] = Field("code", description="the authors' code, or the paper: docs/lend.md")
    k: int = Field(3, ge=2, description="K, neighbours of a sample; profile=code counts the sample itself")
    gamma: float = Field(3.0, gt=0, description="power of the inner products of features")
    alpha: float = Field(0.99, gt=0, lt=1, description="how far neighbours' labels count in the dilution")
    dilution: Literal["closed", "zhou", "lazy"] | None = Field(
        None,
        description="closed form, or `steps` of Zhou's iteration or of the paper's; none = the profile's: closed, lazy",
    )
    steps: int = Field(3, ge=1, description="T, of dilution=zhou and lazy")
    beta: float = Field(
        0.9, ge=0, le=1, description="weight of the given label (profile=code), of the epochs before (profile=paper)"
    )
    history_from: int = Field(10, ge=1, description="epoch from which on profile=code looks at the epochs before")
    graph: Literal["rank", "all_ranks"] = Field("rank", description="over a rank's batch, or those of all ranks as one")


class MixNNMethod(Section):
    """Settings of method.name=mixnn (docs/mixnn.md). Epochs are counted from 1, as in the authors' code."""

    warmup_epochs: int = Field(9, ge=0, description="epochs of cross-entropy at the start")
    turning_epoch: int = Field(60, ge=0, description="es: mixup until then, synthetic samples after it")
    mixup_loss: Literal["linear", "cross_entropy"] = Field(
        "linear", description="of the epochs of mixup; linear: minus the label's probability, as the authors' code"
    )
    momentum: float = Field(0.9, ge=0, le=1, description="m of the soft labels' moving average")
    update_every: int = Field(10, ge=1, description="soft labels move in the epochs from es on that this divides")
    k: int = Field(2, ge=1, le=256, description="samples that make a synthetic one, itself counted")
    neighbours: Literal["in_batch", "data_set"] = Field(
        "in_batch", description="nearest in the rank's batch, as the authors' code, or in the whole data set"
    )
    refresh_epochs: int = Field(10, ge=1, description="epochs between searches of neighbours=data_set")
    subset: int | None = Field(
        None, ge=2, description="train on about so many samples, class-balanced, the same all the time; none = all"
    )


class SELCMethod(Section):
    """Settings of method.name=selc (docs/selc.md)."""

    turning_epoch: int = Field(40, ge=0, description="es: epochs of cross-entropy before the labels are corrected")
    momentum: float = Field(0.9, ge=0, le=1, description="alpha of the soft labels' moving average")
    subset: int | None = Field(
        None, ge=2, description="train on about so many samples, class-balanced, the same all the time; none = all"
    )


class ELRMethod(Section):
    """Settings of method.name=elr (docs/baselines.md)."""

    beta: float = Field(0.7, ge=0, lt=1, description="share of a sample's target that stays at each update")
    lambda_elr: float = Field(3.0, ge=0, description="weight of the regularisation")


class CoTeachingMethod(Section):
    """Settings of method.name=co_teaching and co_teaching_plus (docs/baselines.md)."""

    forget_rate: float = Field(
        0.2, ge=0, lt=1, description="tau, the share that is left out in the end: the noise rate, known or estimated"
    )
    gradual_epochs: int = Field(10, ge=1, description="T_k, epochs over which that share grows from 0")
    exponent: float = Field(1.0, gt=0, description="c, of that growth")


class CoTeachingPlusMethod(Section):
    """Settings of method.name=co_teaching_plus, beside those of method.co_teaching."""

    warmup_epochs: int = Field(20, ge=0, description="epochs of co-teaching before only disagreements are learnt")


class ForwardMethod(Section):
    """Settings of method.name=forward (docs/baselines.md)."""

    transition: File | None = Field(
        None, description=".npy file of T (C, C), T_ij = p(label j | class i); none = estimated"
    )
    estimate_epochs: int = Field(
        120, ge=1, description="epochs of cross-entropy, before train.epochs, whose network shows T"
    )
    percentile: float = Field(
        97.0, gt=0, le=100, description="a class's anchor is its surest sample below this percentile; 100 = of all"
    )


class PencilMethod(Section):
    """Settings of method.name=pencil (symbols as in the paper; docs/baselines.md)."""

    warmup_epochs: int = Field(70, ge=0, description="epochs of cross-entropy before labels are learnt")
    correction_epochs: int = Field(130, ge=0, description="epochs in which labels are learnt; then fine-tuning")
    alpha: float = Field(0.1, ge=0, description="weight of the compatibility with the given labels")
    beta: float = Field(0.8, ge=0, description="weight of the predictions' entropy")
    label_lr: float = Field(600.0, ge=0, description="lambda, learning rate of the labels")
    label_lr_batch: int = Field(128, ge=1, description="samples per step that label_lr is meant for")
    finetune_lr: float = Field(0.2, gt=0, description="optim.lr of the fine-tuning, under the same schedule")


class MCorrectionMethod(Section):
    """Settings of method.name=m_correction (docs/baselines.md)."""

    warmup_epochs: int = Field(105, ge=1, description="epochs of mixup before the first mixture")
    alpha: float = Field(32.0, gt=0, description="mixing weight ~ Beta(alpha, alpha)")
    bootstrap: Literal["hard", "soft"] = Field("hard", description="towards the predicted class, or the prediction")
    prior_weight: float = Field(1.0, ge=0, description="weight of the penalty of an uneven mean prediction")


class MethodSection(Section):
    """Which method, and the settings of each."""

    name: Literal[
        "cross_entropy",
        "mixup",
        "dividemix",
        "scanmix",
        "lend",
        "mixnn",
        "selc",
        "elr",
        "co_teaching",
        "co_teaching_plus",
        "forward",
        "pencil",
        "m_correction",
    ] = "dividemix"
    ssl: Literal["mixmatch", "sanm"] = Field(
        "mixmatch", description="what dividemix and scanmix do in their semi-supervised epochs"
    )
    sanm: SANMSection = SANMSection()
    mixup: MixupMethod = MixupMethod()
    dividemix: DivideMixMethod = DivideMixMethod()
    scanmix: ScanMixMethod = ScanMixMethod()
    lend: LendMethod = LendMethod()
    mixnn: MixNNMethod = MixNNMethod()
    selc: SELCMethod = SELCMethod()
    elr: ELRMethod = ELRMethod()
    co_teaching: CoTeachingMethod = CoTeachingMethod()
    co_teaching_plus: CoTeachingPlusMethod = CoTeachingPlusMethod()
    forward: ForwardMethod = ForwardMethod()
    pencil: PencilMethod = PencilMethod()
    m_correction: MCorrectionMethod = MCorrectionMethod()
    mixture: MixtureSection = MixtureSection()
    soft_dtype: Literal["float32", "float16"] = Field(
        "float32", description="of the soft labels that some methods keep of every sample; float16 halves them"
    )
