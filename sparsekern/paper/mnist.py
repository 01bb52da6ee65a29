"""MNIST, whole in memory, with the noise of the paper's robustness test."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from sparsekern.paper.download import digest, download
from sparsekern.paper.progress import bytes_bar, console

# The original files and their MD5.
FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
MIRRORS = [
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
]
# Where the files are looked for: here, and in a folder that checkouts side by side share.
FOLDERS = [
    Path("data/mnist"),
    Path("../shared/data/mnist"),
    Path(__file__).resolve().parents[3] / "shared/data/mnist",
]
SIDE = 28
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, in [0, 1]
NOISE_LEVELS = [level / 20 for level in range(11)]  # eta: 0, 0.05, ..., 0.50
GAUSSIAN_LEVELS = [level / 10 for level in range(9)]  # s: 0, 0.1, ..., 0.8
NOISE_PIXEL = 2.0  # MEAN + 2 * STD, normalised


class Mnist:
    """The data set on one device: normalised images (N, 1, 28, 28) float32 and labels (N,) int64.

    Noisy pixels: each test image has one random order of its 784 pixels, drawn from ``seed``, and a noise level takes the
    first ``int(784 * eta)`` of them, so that every epoch and every network is tested on the same images.

    Args:
        folder: of the four files; by default the first of FOLDERS that exists.
        seed: of the noise.
        fetch: download the files that are not there.
        device: where the tensors are put.

    Raises:
        FileNotFoundError: files are missing; the message names them and the folder.
        ValueError: a file is not the original one.
    """

    name = "mnist"
    noise_levels = NOISE_LEVELS

    def __init__(self, folder: Path | None = None, *, seed: int = 42, fetch: bool = False, device="cpu"):
        folder = default_folder() if folder is None else Path(folder)
        self.folder = folder
        find_files(folder, fetch=fetch)
        images, labels, test_images, test_labels = (read_idx(folder / name) for name in FILES)
        self.checksum = "-".join(FILES.values())
        self.images = _normalise(images, device)
        self.labels = labels.long().to(device)
        self.test_images = _normalise(test_images, device)
        self.test_labels = test_labels.long().to(device)
        self.pixel_order = _pixel_order(len(test_images), seed).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, rows: slice = slice(None), generator=None) -> tuple[Tensor, Tensor]:
        """Training images and labels of some rows of a global batch, by index; nothing is drawn at random."""
        indices = indices[rows]
        return self.images[indices], self.labels[indices]

    def test_batches(self, eta: float, size: int):
        """The test images at a noise level, with their labels, in batches."""
        for start in range(0, len(self.test_labels), size):
            rows = slice(start, start + size)
            yield self.noisy(eta, rows), self.test_labels[rows]

    def noisy(self, eta: float, rows: slice = slice(None)) -> Tensor:
        """Test images whose pixels at ``int(784 * eta)`` random positions are set to a bright grey (section 4.1)."""
        images = self.test_images[rows]
        positions = self.pixel_order[rows, : int(SIDE * SIDE * eta)].long()
        return images.flatten(1).scatter(1, positions, NOISE_PIXEL).view_as(images)


class GaussianMnist(Mnist):
    """MNIST under Gaussian pixel noise: ``clamp(x + s * gaussian, 0, 1)`` of pixels in [0, 1], s being the noise level."""

    name = "gaussian"
    noise_levels = GAUSSIAN_LEVELS

    def __init__(self, folder: Path | None = None, *, seed: int = 42, fetch: bool = False, device="cpu"):
        super().__init__(folder, seed=seed, fetch=fetch, device=device)
        generator = torch.Generator().manual_seed(seed)
        self.gaussian = torch.randn(self.test_images.shape, generator=generator).to(device)

    def noisy(self, eta: float, rows: slice = slice(None)) -> Tensor:
        """Test images with noise of standard deviation eta, the same normal numbers at every level."""
        pixels = self.test_images[rows] * STD + MEAN
        return pixels.add_(self.gaussian[rows], alpha=eta).clamp_(0, 1).sub_(MEAN).div_(STD)


def default_folder() -> Path:
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def find_files(folder: Path, *, fetch: bool) -> None:
    """Sees to it that the four files are in the folder, as they were published."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing and not fetch:
        raise FileNotFoundError(
            f"mnist: wants {', '.join(FILES)} in the folder {folder.absolute()}; not there: {', '.join(missing)}. "
            "Name another folder with --data DIR, or get them with --download."
        )
    for name in missing:
        print(f"downloading {name} to {folder}")
        with bytes_bar(name, console()) as progress:
            download([mirror + name for mirror in MIRRORS], folder / name, FILES[name], progress)
    for name, checksum in FILES.items():
        found = digest(folder / name, "md5")
        if found != checksum:
            raise ValueError(
                f"mnist: wants MD5 {checksum} of {folder / name}, got {found}: not the original file; "
                "remove it and get it again with --download"
            )


def read_idx(path: Path) -> Tensor:
    """An idx file of unsigned bytes: uint8, of the shape that its header says.

    Raises:
        ValueError: not such a file, or of another length than its header says.
    """
    with gzip.open(path, "rb") as file:
        data = bytearray(file.read())
    if len(data) < 4 or data[:3] != b"\0\0\x08":  # 8: unsigned bytes
        raise ValueError(f"read_idx: wants an idx file of unsigned bytes, got {path} which begins {bytes(data[:4])!r}")
    rank = data[3]
    start = 4 + 4 * rank
    shape = struct.unpack_from(f">{rank}I", data, 4) if len(data) >= start else ()
    size = torch.Size(shape).numel()
    if len(data) != start + size:
        raise ValueError(f"read_idx: wants {start + size} bytes in {path} for shape {shape}, got {len(data)}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=start).view(shape) if size else torch.empty(shape).byte()


def _normalise(images: Tensor, device) -> Tensor:
    pixels = images.to(device, torch.float32).unsqueeze(1)
    return pixels.div_(255).sub_(MEAN).div_(STD)


def _pixel_order(images: int, seed: int) -> Tensor:
    """A random order of each image's pixels: int16 (images, 784)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, SIDE * SIDE, generator=generator).argsort(dim=1, stable=True).short()
