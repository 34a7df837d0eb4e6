"""What each command takes. Their docstrings are the help."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fitv2.config import Encoding, Guidance, Network, Positions, Precision, Sampling, Training
from fitv2.evaluation.settings import Evaluation, Scale
from fitv2.limits import check_limits
from fitv2.presets import PRESETS


@dataclass(frozen=True)
class Encode:
    """Turn a collection of images into training tokens, or resume where it was interrupted.

    SOURCE is a folder of images in folders named by their label (in train/ and val/, if there are splits),
    Parquet files, WebDataset tars, or a folder of the library `datasets`: a path, a pattern such as
    'shards/*.tar', or a URL such as s3://bucket/folder or hf://datasets/ORGANIZATION/NAME. Images that
    cannot be used are listed in OUT/skipped.jsonl; the exit status is then 3. Under torchrun all processes
    share the work: torchrun --nproc-per-node 8 -m fitv2 encode SOURCE OUT.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Where the images are."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for the tokens."""
    workers: int | None = None
    """Processes that read images; 0 reads them in this one [default: one a processor]."""
    encoding: Annotated[Encoding, tyro.conf.OmitArgPrefixes] = field(default_factory=Encoding)


@dataclass(frozen=True)
class Train:
    """Train a preset. Run the same command again to resume.

    What the data decide (size and channels of a token, labels) is no option here: it is chosen by `fitv2
    encode`.
    """

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """One of the presets; their settings are the defaults below."""
    data: str
    """Folder or URL of tokens, made by `fitv2 encode`."""
    out: Path
    """Folder of the run."""
    init: str | None = None
    """Start from the weights of this model: a folder, a run, or a shipped model."""
    reference: Path | None = None
    """Judge samples beside this folder `reference` of an evaluation, and keep the best model in OUT/best."""
    allow_download: bool = False
    """Fetch an autoencoder or a text encoder that is of the hub and not on this machine."""
    model: Annotated[Network, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: PRESETS["clipart"].model
    )
    training: Annotated[Training, tyro.conf.OmitArgPrefixes] = field(default_factory=Training)


@dataclass(frozen=True)
class Sample:
    """Make images: every label or prompt at every size, NUM of each.

    A model of labels and texts takes one label with all prompts. How a picture was made is written in its
    PNG. Run the same command again to resume: what is there is not made again. Under torchrun all processes
    share the work.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model folder, a run folder, or the name of a shipped model: emoji, emoji-any-step, clipart."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name or number of a label; repeat for several [default: all, or none with a prompt]."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to show, for a model of texts; repeat for several."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    size: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """HEIGHTxWIDTH in pixels, any; repeat for several [default: the largest square trained on]."""
    num: int = 1
    """Images of each label and size, with seeds SEED, SEED+1, …"""
    seed: int = 0
    """Seed of the first image."""
    toward_seed: int | None = None
    """Make the NUM images on the way from the noise of SEED to that of this seed."""
    one_noise: bool = False
    """The images of a seed are of one noise, seen at all sizes."""
    from_metadata: Path | None = None
    """Make the picture in this PNG again: all settings are read from it, and no others may be given."""
    out: Path = Path("samples")
    """Folder for the images, LABEL_HEIGHTxWIDTH_SEED.png, or PROMPT_…."""
    grid: bool = False
    """Also draw them, the first 200, on one sheet, OUT/grid.png."""
    npz: bool = False
    """Also write those of each size as OUT/HEIGHTxWIDTH.npz, for ADM's evaluator."""
    allow_download: bool = False
    """Fetch an autoencoder or a text encoder that is of the hub and not on this machine."""
    precision: Precision = "float32"
    """Of the transformer. Where there are bfloat16 products they are two to three times as fast."""
    guidance: Annotated[Guidance, tyro.conf.OmitArgPrefixes] = field(default_factory=Guidance)
    positions: Annotated[Positions, tyro.conf.OmitArgPrefixes] = field(default_factory=Positions)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)


@dataclass(frozen=True)
class Edit:
    """Make images from a picture: variations, a part made anew, a new shape, or what lies between two.

    Without --mask, --canvas and --toward: variations of all of it. See docs/guides/editing.md.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model as of `fitv2 sample`."""
    picture: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURE")]
    """An image file."""
    prompt: str | None = None
    """What to show, for a model of texts."""
    label: str | None = None
    """Name or number of a label."""
    negative_prompt: str | None = None
    """What guidance leads away from."""
    strength: float | None = None
    """How much of the picture is made anew, above 0 to 1: a little to all of it [default: 0.6; 1 with --mask
    or --canvas]."""
    mask: Path | None = None
    """Picture of the same size, white where it is made anew; the rest stays to the last bit."""
    canvas: str | None = None
    """HEIGHTxWIDTH in pixels: lay the picture on a larger canvas, and paint what is around it."""
    at: tuple[int, int] | None = None
    """Row and column of its upper left corner on the canvas [default: the middle]."""
    toward: Path | None = None
    """A second picture: make NUM images on the way from one to the other, without guidance unless it is asked
    for."""
    toward_prompt: str | None = None
    """What the second picture shows [default: as the first]."""
    size: str | None = None
    """HEIGHTxWIDTH in pixels that the picture is brought to first [default: its own]."""
    num: int = 4
    """Images, with seeds SEED, SEED+1, …; with --toward steps of the way."""
    seed: int = 0
    """Seed of the first image."""
    out: Path = Path("edited")
    """Folder for the images."""
    grid: bool = False
    """Also draw all of them on one sheet, OUT/grid.png."""
    allow_download: bool = False
    """Fetch an autoencoder or a text encoder that is of the hub and not on this machine."""
    precision: Precision = "float32"
    """As of `fitv2 sample`."""
    guidance: Annotated[Guidance, tyro.conf.OmitArgPrefixes] = field(default_factory=Guidance)
    positions: Annotated[Positions, tyro.conf.OmitArgPrefixes] = field(default_factory=Positions)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)


@dataclass(frozen=True)
class App:
    """Open a page in the browser: prompts, sizes, editing.

    Others can reach it with --host 0.0.0.0 alone; then put it behind a server that knows its visitors. See
    docs/guides/app.md.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = "emoji-any-step"
    """A model as of `fitv2 sample`."""
    host: str = "127.0.0.1"
    """Address that is listened at; this one is reached from this machine alone."""
    port: int = 7860
    """Port."""
    max_side: int = 512
    """Longest side of a picture, in pixels."""
    max_images: int = 16
    """Pictures at once."""
    queue: int = 32
    """Orders that wait; further ones are refused."""
    out: Path | None = None
    """Pictures go into a new folder in this one [default: they are kept for an hour]."""
    allow_download: bool = False
    """Fetch an autoencoder or a text encoder that is of the hub and not on this machine."""


@dataclass(frozen=True)
class Convert:
    """Turn a released checkpoint or released latents into a folder of ours, or a model back.

    SOURCE is a .safetensors or .bin file of FiT or FiTv2 (whlzy/FiT), or a folder with from_16_to_256
    and its like. Every bit is kept. Latents that cannot be used are listed in OUT/skipped.jsonl; the exit
    status is then 3.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A released file or folder; with --to-released a model folder, a run, or a shipped model's name."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder; with --to-released a new .safetensors file."""
    to_released: bool = False
    """From ours to the released names."""
    post_trained: Literal["by-name", "yes", "no"] = "by-name"
    """Whether the checkpoint was post-trained to 1024 tokens, which its shapes cannot tell. by-name: if
    its name or its folder's has "hr" in it, as the released ones have."""
    heads: int | None = None
    """Attention heads of a model that is none of the released ones."""
    autoencoder: str = "stabilityai/sd-vae-ft-ema"
    """What the latents are decoded with: a hub name or a local folder."""


@dataclass(frozen=True)
class Export:
    """Write a run's EMA model as a folder of its own, to be opened anywhere.

    What is in it: config.json, safetensors, card.json, and its autoencoder where that lies in a folder of
    this machine. `fitv2 sample` opens it, and so does FiT.from_pretrained.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or any other model."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """New folder."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights in the file; computing is in float32 all the same. float16 rounds the least of the short
    ones."""
    autoencoder: str | None = None
    """What decodes, by another name than the model's: a folder, or a name of the hub."""


@dataclass(frozen=True)
class Inspect:
    """Show what a folder of tokens holds, and check that every shard is whole.

    Prints counts; writes plots.png and samples.png into OUT.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder or URL of tokens, made by `fitv2 encode` or `fitv2 convert`."""
    out: Path = Path("inspection")
    """Folder for the images."""
    samples: int = 24
    """Images to decode; 0 needs no autoencoder."""
    seed: int = 0
    """Which images."""
    allow_download: bool = False
    """Fetch an autoencoder or a text encoder that is of the hub and not on this machine."""


@dataclass(frozen=True)
class Evaluate:
    """Compare pictures with real ones: Fréchet distances, precision, recall and more, each with its error.

    JUDGED is a model, an npz of ADM's evaluator, or a collection of pictures as `fitv2 encode` takes it. Run
    the same command again to resume. Under torchrun all processes share the work: torchrun -m -- fitv2
    evaluate …. Writes evaluation.json, table.md, plots.png and a sheet of each size into OUT.
    """

    judged: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JUDGED")]
    """A model as of `fitv2 sample`, an .npz with arr_0, or pictures; all of these, whatever --num is."""
    reference: str
    """Real pictures as `fitv2 encode` takes them, the folder `reference` of an earlier evaluation, or an
    .npz of ADM's."""
    out: Path
    """Folder for the results."""
    size: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """HEIGHTxWIDTH in pixels; repeat for several [default: the largest square trained on]."""
    allow_download: bool = False
    """Fetch what is of the hub and not on this machine: an autoencoder, a text encoder, Inception, DINOv2."""
    evaluation: Annotated[Evaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=Evaluation)
    guidance: Annotated[Guidance, tyro.conf.OmitArgPrefixes] = field(default_factory=Guidance)
    positions: Annotated[Positions, tyro.conf.OmitArgPrefixes] = field(default_factory=Positions)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)


@dataclass(frozen=True)
class StudySizes:
    """Fill the paper's Tables III to VI for any model, its sizes in proportion to those trained on.

    Trained sizes, and beyond them every extrapolation with and without the attention scale, and what
    `fitv2 sample` does by itself. Run the same command again to resume.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model as of `fitv2 sample`."""
    reference: str
    """Real pictures as of `fitv2 evaluate`."""
    out: Path
    """Folder for the results."""
    groups: tuple[Literal["trained", "beyond", "post-trained"], ...] = ("trained", "beyond")
    """Sizes: those of a 16x16 model are 16x16, 10x20, 8x24; 20x20, 14x28, 10x30; 32x32, 20x40, 16x48."""
    allow_download: bool = False
    """Fetch what is of the hub and not on this machine: an autoencoder, a text encoder, Inception, DINOv2."""
    evaluation: Annotated[Evaluation, tyro.conf.OmitArgPrefixes] = field(default_factory=Evaluation)
    guidance: Annotated[Guidance, tyro.conf.OmitArgPrefixes] = field(default_factory=Guidance)
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class StudySolvers:
    """Compare solvers at as many evaluations of a model: how near the exact solution, and what a judge sees.

    Run the same command again to resume. Writes table.md and solvers.png.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A model as of `fitv2 sample`."""
    reference: Path
    """The folder `reference` of an evaluation; its first size is judged."""
    out: Path
    """Folder for the results."""
    solvers: tuple[str, ...] = ("euler", "heun", "ab2", "dpm++", "unipc", "dopri5")
    """Which; those that choose their steps are tried once."""
    shifts: tuple[float, ...] = (1.0, 2.0)
    """Each of the others with each of these, as --shift of `fitv2 sample`."""
    evaluations: tuple[int, ...] = (4, 6, 8, 12, 16, 25, 50)
    """Of the model for each picture."""
    num: int = 100
    """Images that each makes."""
    allow_download: bool = False
    """As of `fitv2 sample`."""
    guidance: Annotated[Guidance, tyro.conf.OmitArgPrefixes] = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class TrainingStudy:
    """What all studies take that train models."""

    data: str
    """Tokens of `fitv2 encode`, with labels."""
    reference: Path
    """The folder `reference` of an evaluation; all its sizes are judged."""
    out: Path
    """Folder for the results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A run for each."""
    num: int = 200
    """Images that are judged of each size."""
    evaluations: int = 50
    """Evaluations of a model for each of them, a divisor of 1000: by Heun's method, or by DDIM."""
    scale: Annotated[Scale, tyro.conf.OmitArgPrefixes] = field(default_factory=Scale)

    def __post_init__(self) -> None:
        """UserError for a number outside its range."""
        check_limits(self)


@dataclass(frozen=True, kw_only=True)
class StudyConvergence(TrainingStudy):
    """Train DiT, SiT, FiT, the paper's ablation and FiTv2 at one size, and compare how fast they learn.

    Run the same command again to resume. Writes curves.png, table.md and a run for each variant and seed.
    """

    square: str
    """The same images encoded with --preprocess square, for DiT and SiT."""
    variants: tuple[str, ...] = ("DiT", "SiT", "FiT", "A", "B", "C", "D", "E", "F", "FiTv2", "fast")
    """Which; A to F are the paper's ablation. What follows a + is added, as in fast+half+levels: half,
    constant, late-decay, rampup, long-rampup, early, aligned, levels, muon, muon-3, muon-alternate,
    squared, logit-normal, rate=3e-3 (the learning rate), mean=-0.3 (of the times)."""


@dataclass(frozen=True, kw_only=True)
class StudyScaling(TrainingStudy):
    """Train FiTv2 of several sizes for as many multiply-adds each, and compare what they reach.

    Run the same command again to resume.
    """

    widths: tuple[int, ...] = (96, 192, 288)
    """Channels per token of each model."""
    depths: tuple[int, ...] = (3, 4, 6)
    """Depth of each, as in `fitv2 study convergence`."""


@dataclass(frozen=True)
class Flops:
    """Count parameters and multiply-adds of a preset or a model, for images of some sizes.

    Multiply-adds are those of one evaluation, without guidance: what papers on such models call FLOPs.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """A preset, or a model as of `fitv2 sample`."""
    size: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """HEIGHTxWIDTH in pixels; repeat for several [default: 256x256]."""


@dataclass(frozen=True)
class Demo:
    """Make sheets of images of captions with the shipped models, then train for another minute."""

    out: Path = Path("demo")
    """Folder for all that the demo makes."""
    data: Path = Path("data/emoji")
    """The emoji set."""
    minutes: float = 1.0
    """How long to train."""
