"""Speech Commands 0.01: the whole data set in its official layout and splits, or a ten-word part of it in one archive."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from sparsekern.paper import mel
from sparsekern.paper.checkpoint import write_atomically
from sparsekern.paper.download import Progress, digest, download
from sparsekern.paper.mnist import NOISE_LEVELS
from sparsekern.paper.progress import bytes_bar, console, track

ARCHIVE = "speech_commands_v0.01.tar.gz"
ARCHIVE_SHA256 = "743935421bb51cccdb6bdd152e04c5c70274e935c82119ad7faeec31780d811d"
MIRRORS = [
    "https://storage.googleapis.com/download.tensorflow.org/data/",
    "http://download.tensorflow.org/data/",
]
TESTING, VALIDATION = "testing_list.txt", "validation_list.txt"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
EXTRACTED = "extracted.txt"  # written last: the archive's checksum

PART = "speech_commands_v0.01_10words_vorbis.tar.gz"
PART_MD5 = "d11371845e0e9e8670eb583946520d42"
PART_WORDS = ["zero", "one", "five", "eight", "up", "down", "left", "right", "go", "cat"]
# Where the files are looked for: here, and in a folder that checkouts side by side share.
FOLDERS = [
    Path("data/speech_commands"),
    Path("../shared/data/speech_commands"),
    Path(__file__).resolve().parents[3] / "shared/data/speech_commands",
]
CHUNK = 256  # clips whose spectrograms are taken at a time


class Speech:
    """Clips of ten words as log-mel spectrograms (N, 1, 32, 32), augmented anew in every epoch.

    The noise of the robustness test is white and uniform in [-1, 1], one second for each test clip, drawn from ``seed``, so
    that every epoch and every network is tested on the same clips.

    Of the whole data set, the paper's ten digits are used: what the testing list names is the test set, and the epoch of
    the best score is chosen on the validation list. Of the ten-word part, which has no test list, the validation clips are
    the held-out set.

    Args:
        folder: of the data; by default the first of FOLDERS that exists.
        seed: of the noise.
        fetch: download the whole data set if it is not there.
        device: where the clips are kept and the spectrograms taken.

    Raises:
        FileNotFoundError: there is no data; the message says what is wanted.
        ValueError: a file is not as it was published.
    """

    name = "speech"
    noise_levels = NOISE_LEVELS

    def __init__(self, folder: Path | None = None, *, seed: int = 42, fetch: bool = False, device="cpu"):
        folder = default_folder() if folder is None else Path(folder)
        self.folder = folder
        if fetch and (folder / PART).is_file():
            print(f"nothing is downloaded: {folder} holds {PART}; --data DIR names a folder for the whole data set")
        elif fetch:
            fetch_whole(folder)
        if (folder / TESTING).is_file():
            splits, self.checksum = read_whole(folder)
        elif (folder / PART).is_file():
            splits, self.checksum = read_part(folder / PART)
        else:
            raise FileNotFoundError(
                f"speech: wants {PART}, or the official layout (WORD/*.wav, {TESTING}, {VALIDATION}), in the folder "
                f"{folder.absolute()}. Name another folder with --data DIR, or get the data set with --download."
            )
        self.clips, self.labels = (t.to(device) for t in splits["train"])
        held_out = {name: tuple(t.to(device) for t in split) for name, split in splits.items() if name != "train"}
        self.test_clips, self.test_labels = held_out.pop("test", None) or held_out.pop("validation")
        self.validation = held_out.get("validation")
        self.seed = seed
        self._test_inputs: dict[float, Tensor] = {}
        self._validation_inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, rows: slice = slice(None), generator=None) -> tuple[Tensor, Tensor]:
        """Training spectrograms, augmented at random, and labels.

        Args:
            indices: of the whole global batch, which the augmentation is drawn for.
            rows: which of them are wanted here.
            generator: of the augmentation, on the CPU; torch's default one if None.
        """
        draws = mel.draw_augmentation(len(indices), generator).to(self.clips.device)
        indices = indices[rows]
        return mel.augmented_log_mel(_to_float(self.clips[indices]), draws[rows]), self.labels[indices]

    def test_batches(self, eta: float, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The test clips' spectrograms at a noise level, with their labels, in batches."""
        if eta not in self._test_inputs:
            self._test_inputs[eta] = self._spectrograms(self.test_clips, eta)
        yield from zip(self._test_inputs[eta].split(size), self.test_labels.split(size), strict=True)

    def validation_batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """What the best epoch is chosen by; the test set where there is no other."""
        if self.validation is None:
            yield from self.test_batches(0.0, size)
            return
        clips, labels = self.validation
        if self._validation_inputs is None:
            self._validation_inputs = self._spectrograms(clips, 0.0)
        yield from zip(self._validation_inputs.split(size), labels.split(size), strict=True)

    def _spectrograms(self, clips: Tensor, eta: float) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        inputs = []
        for chunk in clips.split(CHUNK):
            noise = torch.rand(chunk.shape, generator=generator).mul_(2).sub_(1).to(clips.device)
            inputs.append(mel.log_mel(_to_float(chunk) * (1 - eta) + noise * eta))
        return torch.cat(inputs)


def default_folder() -> Path:
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def read_part(archive: Path) -> tuple[dict, str]:
    """The splits of the ten-word archive, each (clips int16 (N, 16000), labels (N,)), and the archive's checksum."""
    found = digest(archive, "md5")
    if found != PART_MD5:
        raise ValueError(f"speech: wants MD5 {PART_MD5} of {archive}, got {found}: not the original file")
    return read_vorbis_archive(archive, PART_WORDS), found


def read_vorbis_archive(archive: Path, words: list[str]) -> dict:
    """The splits of an archive of ``WORD_SPLIT.ogg`` files, all clips of a word one after the other, and ``index.csv``."""
    soundfile = _soundfile()
    sounds, counts = {}, {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.name == "index.csv":
                rows = csv.DictReader(io.TextIOWrapper(tar.extractfile(member)))
                for row in rows:
                    key = f"{row['word']}_{row['split']}"
                    counts[key] = counts.get(key, 0) + 1
            elif name.suffix == ".ogg":
                audio, rate = soundfile.read(io.BytesIO(tar.extractfile(member).read()), dtype="float32")
                if rate != mel.RATE:
                    raise ValueError(f"speech: wants {mel.RATE} Hz, got {rate} Hz in {member.name} of {archive}")
                sounds[name.stem] = _to_int16(torch.from_numpy(audio))
    splits = {}
    for split in ("train", "validation"):
        clips = []
        for word in words:
            key = f"{word}_{split}"
            got = len(sounds.get(key, ()))
            if key not in sounds or got != counts.get(key, 0) * mel.SAMPLES:
                raise ValueError(
                    f"speech: wants {counts.get(key, 0)} clips of {mel.SAMPLES} samples in {key}.ogg of {archive}, "
                    f"got {got} samples"
                )
            clips.append(sounds[key].view(-1, mel.SAMPLES))
        splits[split] = (torch.cat(clips), _labels(clips))
    return splits


def read_whole(folder: Path, words: list[str] = DIGITS) -> tuple[dict, str]:
    """The train, validation and test splits of the official layout, and a checksum of its file names and sizes.

    A file that neither list names is for training.

    Raises:
        FileNotFoundError: a list or a file that a list names is not there.
    """
    lists = {}
    for split, name in (("validation", VALIDATION), ("test", TESTING)):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"speech: wants {name} in {folder}")
        lists[split] = {line for line in (folder / name).read_text().split() if line.split("/")[0] in words}
    there = {f"{word}/{path.name}" for word in words for path in (folder / word).glob("*.wav")}
    missing = sorted((lists["validation"] | lists["test"]) - there)
    without = [word for word in words if not any(name.startswith(f"{word}/") for name in there)]
    if missing or without:
        raise FileNotFoundError(
            f"speech: {folder} is not whole: "
            + (f"{len(missing)} files that its lists name are not there, {missing[0]} for one" if missing else "")
            + (f"no clips of {', '.join(without)}" if without else "")
            + "; get the data set with --download"
        )
    lists["train"] = there - lists["validation"] - lists["test"]
    checksum = hashlib.sha256()
    splits = {}
    for split in ("train", "validation", "test"):
        names = sorted(lists[split])
        splits[split] = (
            torch.stack([read_wav(folder / name) for name in track(names, f"reading {split} clips", console())]),
            torch.tensor([words.index(name.split("/")[0]) for name in names]),
        )
        for name in names:
            checksum.update(f"{split} {name} {(folder / name).stat().st_size}\n".encode())
    return splits, checksum.hexdigest()


def read_wav(path: Path) -> Tensor:
    """A clip of at most a second, padded with silence: int16 (16000,)."""
    soundfile = _soundfile()
    try:
        audio, rate = soundfile.read(path, dtype="int16")
    except soundfile.LibsndfileError as error:
        raise ValueError(f"speech: {path}: {error}") from None
    if rate != mel.RATE or audio.ndim != 1:
        raise ValueError(f"speech: wants one channel of {mel.RATE} Hz, got {audio.shape} of {rate} Hz in {path}")
    clip = torch.zeros(mel.SAMPLES, dtype=torch.int16)
    audio = torch.from_numpy(audio[: mel.SAMPLES])
    clip[: len(audio)] = audio
    return clip


def fetch_whole(folder: Path, urls: list[str] | None = None, checksum: str = ARCHIVE_SHA256) -> None:
    """Sees to it that the whole data set is in the folder: downloads and unpacks what is not there yet.

    A broken-off download or unpacking goes on where it stopped.
    """
    marker = folder / EXTRACTED
    if marker.is_file() and marker.read_text().strip() == checksum:
        return
    archive = folder / ARCHIVE
    if not archive.is_file() or digest(archive, "sha256") != checksum:
        print(f"downloading {ARCHIVE} to {folder}")
        with bytes_bar(ARCHIVE, console()) as progress:
            download(urls or [mirror + ARCHIVE for mirror in MIRRORS], archive, checksum, progress)
    print(f"unpacking {archive}")
    with bytes_bar(ARCHIVE, console()) as progress:
        unpack(archive, folder, progress)
    write_atomically(marker, f"{checksum}\n".encode())


def unpack(archive: Path, folder: Path, progress: Progress = lambda size, whole: None) -> None:
    """Unpacks the lists and the ten digits; every file is whole or not there, and the lists come last."""
    lists = {}
    with open(archive, "rb") as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            progress(file.tell(), archive.stat().st_size)
            name = PurePosixPath(member.name)
            if not member.isfile():
                continue
            if name.name in (TESTING, VALIDATION):
                lists[name.name] = tar.extractfile(member).read()
            elif name.suffix == ".wav" and name.parent.name in DIGITS:
                path = folder / name.parent.name / name.name
                if not path.is_file() or path.stat().st_size != member.size:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, tar.extractfile(member).read())
    if len(lists) < 2:
        raise ValueError(f"speech: wants {TESTING} and {VALIDATION} in {archive}, got {sorted(lists)}")
    for name, content in lists.items():
        write_atomically(folder / name, content)


def _soundfile():
    try:
        import soundfile
    except ImportError:
        raise ValueError("speech: wants the package soundfile; run: pip install -e '.[paper]' in a checkout") from None
    return soundfile


def _to_int16(audio: Tensor) -> Tensor:
    return (audio.clamp(-1, 1) * 32767).round_().short()


def _to_float(clips: Tensor) -> Tensor:
    return clips.float().div_(32767)


def _labels(clips: list[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(of_word),), label) for label, of_word in enumerate(clips)])
