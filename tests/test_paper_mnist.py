import gzip
import hashlib
import os
import re
import struct
from pathlib import Path

import pytest
import torch

from sparsekern.paper import mnist
from sparsekern.paper.mnist import Mnist


def write_idx(path, tensor):
    header = b"\0\0\x08" + bytes([tensor.dim()]) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    path.write_bytes(gzip.compress(header + bytes(tensor.flatten().tolist()), mtime=0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of four small files in MNIST's format, whose checksums are the expected ones."""
    generator = torch.Generator().manual_seed(0)
    for name in mnist.FILES:
        count = 40 if name.startswith("train") else 30
        shape = (count, 28, 28) if "images" in name else (count,)
        high = 256 if "images" in name else 10
        write_idx(tmp_path / name, torch.randint(high, shape, generator=generator))
    checksums = {name: hashlib.md5((tmp_path / name).read_bytes()).hexdigest() for name in mnist.FILES}
    monkeypatch.setattr(mnist, "FILES", checksums)
    return tmp_path


def test_images_and_labels(folder):
    data = Mnist(folder)
    assert len(data) == 40
    assert data.images.shape == (40, 1, 28, 28)
    assert data.test_images.shape == (30, 1, 28, 28)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    first = torch.tensor(list(raw[: 28 * 28])).view(28, 28) / 255
    torch.testing.assert_close(data.images[0, 0], (first - 0.1307) / 0.3081)
    x, labels = data.batch(torch.tensor([3, 1]))
    assert torch.equal(x, data.images[[3, 1]])
    assert labels.tolist() == [int(data.labels[3]), int(data.labels[1])]


@pytest.mark.parametrize("eta", mnist.NOISE_LEVELS)
def test_noise_sets_that_many_pixels_to_the_bright_grey(folder, eta):
    data = Mnist(folder)
    grey = (0.1307 + 2 * 0.3081 - 0.1307) / 0.3081
    noisy = data.noisy(eta)
    changed = noisy != data.test_images
    assert torch.isclose(noisy[changed], torch.tensor(grey)).all()
    at_grey = torch.isclose(noisy, torch.tensor(grey)).flatten(1).sum(1)
    assert (at_grey >= int(784 * eta)).all()
    assert (changed.flatten(1).sum(1) <= int(784 * eta)).all()
    assert (changed.flatten(1).sum(1) >= int(784 * eta) - 10).all()  # a pixel may have had that value
    if eta:
        assert not torch.equal(changed[0], changed[1])


def test_noise_is_decided_by_the_seed_and_the_same_in_batches(folder):
    data = Mnist(folder, seed=1)
    whole = data.noisy(0.25)
    assert torch.equal(whole, Mnist(folder, seed=1).noisy(0.25))
    assert not torch.equal(whole, Mnist(folder, seed=2).noisy(0.25))
    batches = list(data.test_batches(0.25, 7))
    assert torch.equal(torch.cat([x for x, _ in batches]), whole)
    assert torch.equal(torch.cat([labels for _, labels in batches]), data.test_labels)


def test_missing_files_are_named(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: t10k-labels-idx1-ubyte.gz.*--download") as error:
        Mnist(folder)
    assert str(folder) in str(error.value)


def test_a_changed_file_is_refused(folder):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="wants MD5"):
        Mnist(folder)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\1a", b"\0\0\x08\x01\0\0\0\2a"])
def test_what_is_no_idx_file_is_refused(tmp_path, content):
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"read_idx: wants .*{re.escape(path.name)}"):
        mnist.read_idx(path)


def test_download_gets_what_is_missing(folder, monkeypatch):
    path = folder / "t10k-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    path.unlink()
    asked = []

    def fake(urls, target, checksum, progress):
        asked.append((urls, checksum))
        target.write_bytes(content)

    monkeypatch.setattr(mnist, "download", fake)
    assert len(Mnist(folder, fetch=True)) == 40
    [(urls, checksum)] = asked
    assert urls[0] == "https://ossci-datasets.s3.amazonaws.com/mnist/t10k-labels-idx1-ubyte.gz"
    assert checksum == mnist.FILES[path.name]


def test_default_folder_is_the_first_that_exists(tmp_path, monkeypatch):
    inside = tmp_path / "checkout"
    inside.mkdir()
    monkeypatch.chdir(inside)
    monkeypatch.setattr(mnist, "FOLDERS", mnist.FOLDERS[:2])
    assert mnist.default_folder() == Path("data/mnist")
    os.makedirs(tmp_path / "shared/data/mnist")
    assert mnist.default_folder() == Path("../shared/data/mnist")
    os.makedirs(inside / "data/mnist")
    assert mnist.default_folder() == Path("data/mnist")


def test_the_real_data_is_whole():
    if not mnist.default_folder().is_dir():
        pytest.skip(f"no MNIST in {mnist.default_folder()}")
    data = Mnist()
    assert torch.bincount(data.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert torch.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(float(data.images.mean())) < 1e-3
    assert abs(float(data.images.std()) - 1) < 1e-3
