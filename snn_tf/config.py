"""Every hyper-parameter once: default, meaning, unit, range, and the stages it concerns.

`Config` is frozen and checked when made. The command line's flags are derived from it, so a
setting is added here and nowhere else. Nothing here loads TensorFlow: help and flag errors are
answered before that.
"""

import dataclasses
import zlib
from typing import Any

from snn_tf import contradictions
from snn_tf.settings import check, setting, setting_of

TRAIN_ANN, COMPRESS, CONVERT, TRAIN_SNN, EVALUATE, EXPORT = STAGES = (
    "train_ann",
    "compress",
    "convert",
    "train_snn",
    "evaluate",
    "export",
)
NETWORKS = ("vgg5", "vgg9", "vgg11", "vgg13", "vgg16", "vgg19", "resnet12", "resnet20", "resnet34")
FOLDER = "folder:"
"""How a `--dataset` begins that is a folder of images."""
METHODS = ("attention", "magnitude", "magnitude_uniform", "random", "dense")
SALIENCIES = ("layer_magnitude", "magnitude", "weight_gradient", "fisher")
# How the density of each method runs as published: what `--density_schedule=auto` stands for.
PUBLISHED_SCHEDULES = {
    method: "cubic" if method.startswith("magnitude") else "constant" for method in METHODS
}

_TRAINING = (TRAIN_ANN, COMPRESS, TRAIN_SNN)
_ANN = (TRAIN_ANN, COMPRESS)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Raises `UsageError` naming flag, value and what is allowed."""

    # fmt: off
    run_dir: str = setting("runs/default", "Folder of the run; each stage has a subfolder.", "Run")
    stage: tuple[str, ...] = setting(
        ("all",), "Stages to run, comma-separated.", "Run", choices=("all", *STAGES))
    meta_model: str = setting(
        "", "Run folder whose train_ann result is the teacher; empty: this run's own.", "Run")
    snn_start: str = setting(
        "", "Run folder whose trained SNN is where train_snn starts, at this T; the stages before are "
        "that run's. Empty: the converted SNN.", "Run")
    overwrite: bool = setting(
        False, "Move a stage's folder aside when its settings have changed, and run it again.", "Run")
    seed: int = setting(
        0, "Seed of everything random.", "Run", (*_TRAINING, CONVERT), low=0, high=2**31 - 1)

    dataset: str = setting(
        "cifar10", "digits, tiny_imagenet, folder:/path (one folder per class), or the name of an "
        "image-classification data set of TFDS.", "Data", STAGES)
    data_dir: str = setting(
        "", "Folder of prepared TFDS data sets, where a missing one is downloaded to; empty: TFDS's "
        "default.", "Data")
    manual_dir: str = setting("", "Folder that holds tiny-imagenet-200.zip.", "Data")
    image_size: int = setting(
        0, "Images of folder: are resized to this side; 0 keeps them as they are.", "Data", STAGES,
        "pixels", low=0, high=4096)
    validation_fraction: float = setting(
        0.1, "Share of the training split held out where the data set has no validation split, or no "
        "test split, whose place its validation split then takes.",
        "Data", STAGES, low=0, high=1, low_open=True, high_open=True)
    augment: str = setting(
        "auto", "crop: a random one after padding by 4; crop_flip: and half of the images mirrored; "
        "auto knows what suits the data set.",
        "Data", _TRAINING, choices=("auto", "none", "crop", "crop_flip"))
    ann_cutout: int = setting(
        0, "Side of a square at a random place of each image, blanked in both ANN stages; 0: none.",
        "Data", _ANN, "pixels", low=0, high=4096)
    snn_cutout: int = setting(
        0, "The same in the SNN stage.", "Data", (TRAIN_SNN,), "pixels", low=0, high=4096)
    batch_size: int = setting(128, "Images in a step.", "Data", _TRAINING, "images", low=1)
    cache_gib: float = setting(
        4.0, "Images of folder: are decoded once and kept in memory if all together take at most this, "
        "else decoded at every use.", "Data", (), "GiB", low=0)

    network: str = setting("vgg16", "Architecture.", "Network", STAGES, choices=NETWORKS)
    width: float = setting(
        1.0, "Multiplies every hidden width, rounded to multiples of 8.", "Network", STAGES,
        low=0, high=64, low_open=True)
    head: str = setting(
        "mlp", "VGG's head: mlp = 4096, 4096, classes; linear = one more pool where it fits, then "
        "classes. ResNets have the linear one.", "Network", STAGES, choices=("mlp", "linear"))
    batch_norm: bool = setting(
        False, "Batch normalisation after every convolution and hidden fully connected layer of the "
        "ANN; conversion folds it into weights and bias currents.", "Network", STAGES)
    dropout: float = setting(
        0.2, "Dropout rate after a hidden neuron, except before a pool and at the end of a ResNet's "
        "block.", "Network", STAGES, low=0, high=1, high_open=True)
    head_dropout: float = setting(
        0.5, "Dropout rate in the mlp head.", "Network", STAGES, low=0, high=1, high_open=True)

    ann_epochs: int = setting(
        100, "Training length of the meta-model.", "Training", (TRAIN_ANN,), "epochs", low=1)
    compress_epochs: int = setting(
        100, "Training length of the student.", "Training", (COMPRESS,), "epochs", low=1)
    snn_epochs: int = setting(
        30, "Training length of the SNN.", "Training", (TRAIN_SNN,), "epochs", low=1)
    ann_optimizer: str = setting(
        "sgd", "Optimizer of both ANN stages.", "Training", _ANN, choices=("sgd", "adam"))
    snn_optimizer: str = setting(
        "adam", "Optimizer of the SNN stage.", "Training", (TRAIN_SNN,), choices=("sgd", "adam"))
    ann_learning_rate: float = setting(
        0.01, "Peak learning rate of both ANN stages.", "Training", _ANN, low=0, low_open=True)
    snn_learning_rate: float = setting(
        1e-4, "Peak learning rate of weights, v_th and leak.", "Training", (TRAIN_SNN,),
        low=0, low_open=True)
    ann_weight_decay: float = setting(
        5e-4, "L2 coefficient added to the weights' gradient in both ANN stages.", "Training", _ANN,
        low=0)
    snn_weight_decay: float = setting(
        0.0, "L2 coefficient of the SNN stage; never on v_th and leak.", "Training", (TRAIN_SNN,),
        low=0)
    momentum: float = setting(
        0.9, "Momentum of sgd.", "Training", _TRAINING, low=0, high=1, high_open=True)
    schedule: str = setting(
        "cosine", "Learning rate over a stage: cosine, to 0; step, a tenth after 60, 80 and 90 % of "
        "the steps; constant.", "Training", _TRAINING, choices=("cosine", "step", "constant"))
    warmup_epochs: float = setting(
        0.0, "Linear rise of the learning rate from 0 at the start of a stage.", "Training",
        _TRAINING, "epochs", low=0)
    label_smoothing: float = setting(
        0.0, "Share of the target spread evenly over the classes.", "Training", _TRAINING,
        low=0, high=1, high_open=True)
    clip_norm: float = setting(
        0.0, "Largest global norm of the gradient; 0 does not clip.", "Training", _TRAINING, low=0)

    method: str = setting(
        "attention", "Where masks come from. attention: weights go by --saliency, and grow back where "
        "the attention-guided loss has the largest mean gradient. magnitude: tfmot's schedule, one "
        "global cut. magnitude_uniform: stock tfmot, per layer. random: chance. All of these train with "
        "the losses of --distillation and --attention. dense: the meta-model passes through unchanged.",
        "Compression", (COMPRESS,), choices=METHODS)
    structure: str = setting(
        "irregular", "What is removed: single weights, or whole channels, cut out at the end.",
        "Compression", (COMPRESS,), choices=("irregular", "channel"))
    density: float = setting(
        0.05, "Share of the prunable weights (or MACs, see --budget) that is kept.", "Compression",
        (COMPRESS,), low=0, high=1, low_open=True)
    student_start: str = setting(
        "fresh", "The student's first weights: fresh ones, from another seed, or the meta_model's.",
        "Compression", (COMPRESS,), choices=("fresh", "meta_model"))
    activation_levels: int = setting(
        0, "L: the student's activations are clipped, and rounded to L levels above 0, as spikes over "
        "T = L time steps will be (QCFS); the clips are trained and become v_th. Goes with "
        "--initial_membrane=0.5. 0: ReLU, and v_th is calibrated.", "Compression", (COMPRESS,),
        low=0, high=1024)
    density_schedule: str = setting(
        "cubic", "Density over the mask updates. cubic: from 1 to --density. constant: --density from "
        "the first step (magnitude: from the first update). auto: each method's published form, cubic "
        "for magnitude, constant for attention (the paper's) and random.",
        "Compression", (COMPRESS,), choices=("auto", "constant", "cubic"))
    saliency: str = setting(
        "layer_magnitude", "What --method=attention keeps. layer_magnitude: the largest |W| of each "
        "layer, after one cut through those of all layers where the density falls; layers share the "
        "regrowth by mean |m|, as in the paper. The others rank all layers at once, which then regrow "
        "in proportion to what they keep. magnitude: |W|. weight_gradient: |W m|. fisher: |W| times "
        "the root of the mean squared gradient. Channels are dropped within their group and regrown "
        "over all, so that the first two are one.",
        "Compression", (COMPRESS,), choices=SALIENCIES)
    macs_exponent: float = setting(
        0.0, "Where layers compete for weights, the worth of each is divided by the layer's multiply-"
        "accumulates per weight to this power: more than 0 spares multiply-accumulates (with fisher, "
        "0.5 ranks the loss per multiply-accumulate). Random masks have none.",
        "Compression", (COMPRESS,), low=0, high=1)
    dense_ends: bool = setting(
        False, "Keep the first and the last layer dense; their weights count in the density.",
        "Compression", (COMPRESS,))
    budget: str = setting(
        "weights", "What --density counts.", "Compression", (COMPRESS,), choices=("weights", "macs"))
    min_layer_density: float = setting(
        0.005, "No layer gets sparser than this (irregular structure).",
        "Compression", (COMPRESS,), low=0, high=1)
    mask_update: int = setting(
        0, "Steps between mask updates; 0: an epoch.", "Compression", (COMPRESS,), "steps", low=0)
    mask_update_end: float = setting(
        0.75, "Share of the stage's steps after which masks are fixed.", "Compression", (COMPRESS,),
        low=0, high=1)
    drop_fraction: float = setting(
        0.5, "p at the first step: share of the active weights (with layer_magnitude of each layer's) "
        "that an update drops; while the density falls, never more than can grow back.",
        "Compression", (COMPRESS,), low=0, high=1)
    drop_fraction_end: float = setting(
        0.005, "p at the last update; a cosine leads there.", "Compression", (COMPRESS,),
        low=0, high=1)
    score_decay: float = setting(
        0.9, "Decay of m, the moving average of the gradient: the score; of its square too.",
        "Compression", (COMPRESS,), low=0, high=1, high_open=True)
    distillation: float = setting(
        0.9, "Weight alpha of L_KD; L_CE has 1 - alpha.", "Compression", (COMPRESS,), low=0, high=1)
    temperature: float = setting(
        4.0, "Temperature rho of L_KD.", "Compression", (COMPRESS, TRAIN_SNN), low=0, low_open=True)
    attention: float = setting(
        100.0, "Weight beta of the attention term, beta/2 * L_AT.", "Compression", (COMPRESS,),
        low=0)

    calibration_percentile: float = setting(
        99.7, "Percentile of a neuron's input current that becomes v_th.", "Conversion", (CONVERT,),
        "%", low=0, high=100, low_open=True)
    calibration_timesteps: int = setting(
        100, "Time steps simulated to calibrate v_th.", "Conversion", (CONVERT,), "steps", low=1)
    calibration_batches: int = setting(
        8, "Batches of training images used to calibrate v_th.", "Conversion", (CONVERT,), low=1)
    calibration_batch_size: int = setting(
        16, "Images in such a batch.", "Conversion", (CONVERT,), "images", low=1)
    v_th_scale: float = setting(
        0.3, "kappa: all calibrated v_th are multiplied by it; v_th from --activation_levels are not.",
        "Conversion", (CONVERT,), low=0, low_open=True)
    weight_rms: float = setting(
        0.0, "Root mean square of the kept weights before each layer of neurons, about which weights, "
        "bias current and v_th are scaled together, by a power of two: spikes stay the same, and steps "
        "of adam are a like share of all layers' weights. 0: as converted.", "Conversion", (CONVERT,),
        low=0)
    bias_current: bool = setting(
        False, "Give spiking neurons a trained bias current per channel, from 0. Those that follow a "
        "batch normalisation have one in any case, from what it folds into.", "Conversion", (CONVERT,))

    timesteps: int = setting(
        5, "T: time steps for which an image is presented.", "SNN", (CONVERT, TRAIN_SNN), "steps",
        low=1)
    surrogate: str = setting(
        "triangle", "Surrogate of the spike's derivative.", "SNN", (CONVERT, TRAIN_SNN),
        choices=("triangle", "rectangular", "sigmoid", "arctan"))
    surrogate_scale: float = setting(
        0.3, "gamma: height of the surrogate.", "SNN", (CONVERT, TRAIN_SNN), low=0, low_open=True)
    initial_membrane: float = setting(
        0.0, "eta: membrane before the first step, as a share of v_th. 0 rounds the number of spikes of "
        "a constant current down, 0.5 to the nearest.", "SNN", (CONVERT, TRAIN_SNN), low=0, high=1,
        high_open=True)
    train_leak: bool = setting(True, "Whether the leaks are trained.", "SNN", (TRAIN_SNN,))
    train_v_th: bool = setting(True, "Whether the thresholds v_th are trained.", "SNN", (TRAIN_SNN,))

    snn_distill: float = setting(
        0.0, "Weight of L_KD, the compressed ANN being the teacher; L_CE has the rest.", "SNN",
        (TRAIN_SNN,), low=0, high=1)
    spike_penalty: float = setting(
        0.0, "Weight of the spikes per neuron in the loss.", "SNN", (TRAIN_SNN,), low=0)

    precision: str = setting(
        "auto", "Type of convolutions and matrix products; membranes, loss and optimizer stay float32. "
        "auto: mixed_bfloat16 where the hardware multiplies it (AVX-512, AMX, Ampere).",
        "Execution", STAGES, choices=("auto", "float32", "mixed_bfloat16"))
    export_precision: str = setting(
        "as_trained", "Type that the exported network computes in. as_trained: as --precision says; "
        "TensorFlow Lite and processors without bfloat16 want float32.", "Execution", (EXPORT,),
        choices=("as_trained", "float32"))
    lif: str = setting(
        "auto", "Implementation of the neuron. native: one C++ operation, for CPUs; fused: TensorFlow "
        "with its own gradient; rnn: the Keras RNN. auto: native on a CPU with a compiler, else "
        "fused, as with --jit_compile=true.",
        "Execution", choices=("auto", "native", "fused", "rnn"))
    jit_compile: str = setting(
        "auto", "Compile the training step with XLA. auto: on GPUs.", "Execution",
        choices=("auto", "true", "false"))
    steps_per_call: int = setting(
        0, "Most optimizer steps in one call of the compiled function; 0: as two seconds hold. No "
        "call goes past a mask update, a checkpoint, a log point or an epoch's end.", "Execution", (),
        "steps", low=0)
    checkpoint_every: str = setting(
        "0", "A whole number of steps between checkpoints, or of minutes with an m, such as 10m; 0: an "
        "epoch.", "Execution", (), "steps or minutes")
    keep_checkpoints: int = setting(2, "Checkpoints kept per stage.", "Execution", low=1)
    on_nonfinite: str = setting(
        "stop", "What a step does whose loss or gradient is not finite. stop: ends the training at the "
        "last good checkpoint. skip: leaves weights, scores and slots as they are, and is counted; an "
        "epoch without a finite step ends the training all the same.",
        "Execution", choices=("stop", "skip"))
    on_degenerate: str = setting(
        "warn", "What a training does where a validation finds that no spike reaches the output layer, "
        "or an epoch ends with a trained v_th, leak or clip at its lower bound. stop: ends there, at "
        "the last good checkpoint.",
        "Execution", choices=("warn", "stop"))
    deterministic: bool = setting(
        False, "Only TensorFlow operations whose result is the same to the bit every time. Costs up to "
        "a ninth of a step on CPUs, where results are the same without it.", "Execution")
    log_every: int = setting(
        50, "Steps between the TensorBoard points of a training step.", "Execution", (), "steps",
        low=1)
    validate_every: int = setting(
        1, "Epochs between validations and what TensorBoard shows of the network.", "Execution",
        (), "epochs", low=1)
    profile_steps: tuple[int, ...] = setting(
        (), "First and last step of a profiler trace, such as 10,20.", "Execution", (), "steps", low=0)
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        contradictions.check(vars(self))

    def stages(self) -> tuple[str, ...]:
        """The stages to run, in the pipeline's order."""
        return STAGES if "all" in self.stage else tuple(s for s in STAGES if s in self.stage)

    def checkpoint_interval(self) -> tuple[int, float]:
        """Steps and seconds between checkpoints: one of the two is 0, both are if it is an epoch."""
        number = int(str(self.checkpoint_every).removesuffix("m"))
        return (0, 60.0 * number) if str(self.checkpoint_every).endswith("m") else (number, 0.0)

    def stage_seed(self, stage: str) -> int:
        """Seed of one stage's random numbers: its own, so that no two stages share any."""
        return zlib.crc32(f"{self.seed}/{stage}".encode()) & 0x7FFFFFFF

    def concerning(self, stage: str) -> dict[str, Any]:
        """The settings on which the result of `stage` depends, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if stage in setting_of(field).stages
        }
