import csv
import hashlib
import io
import math
import tarfile

import pytest
import torch

from sparsekern.paper import mel, speech
from sparsekern.paper.speech import Speech

soundfile = pytest.importorskip("soundfile")


def tone(hertz, seconds=1.0, amplitude=0.5):
    time = torch.arange(int(mel.RATE * seconds)) / mel.RATE
    return amplitude * torch.sin(2 * math.pi * hertz * time)


@pytest.fixture
def whole(tmp_path):
    """The official layout with three clips of each digit, one in each split, and a word that is no digit."""
    lists = {speech.VALIDATION: [], speech.TESTING: []}
    for i, word in enumerate([*speech.DIGITS, "bed"]):
        (tmp_path / word).mkdir()
        for speaker, of_list in (("a1", None), ("b2", speech.VALIDATION), ("c3", speech.TESTING)):
            name = f"{word}/{speaker}_nohash_0.wav"
            soundfile.write(tmp_path / name, tone(300 + 200 * i, 0.5 if speaker == "c3" else 1.0), mel.RATE, "PCM_16")
            if of_list:
                lists[of_list].append(name)
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_official_layout_and_its_splits(whole):
    data = Speech(whole)
    assert (len(data), len(data.test_labels), len(data.validation[1])) == (10, 10, 10)
    assert sorted(data.labels.tolist()) == list(range(10))
    for clip, label in zip(data.clips, data.labels.tolist(), strict=True):
        assert torch.allclose(clip / 32767, tone(300 + 200 * label), atol=1e-4)
    assert (data.test_clips[:, mel.SAMPLES // 2 :] == 0).all()  # half a second, padded with silence


def test_batches(whole):
    data = Speech(whole)
    generator = torch.Generator().manual_seed(1)
    x, labels = data.batch(torch.arange(10), generator=generator)
    assert x.shape == (10, 1, mel.BANDS, mel.FRAMES)
    assert torch.equal(labels, data.labels)
    generator.manual_seed(1)
    some, _ = data.batch(torch.arange(10), slice(3, 7), generator)
    assert torch.equal(some, x[3:7])  # a rank's share is augmented as in the whole batch
    [(quiet, test_labels)] = data.test_batches(0.0, 100)
    [(noisy, _)] = data.test_batches(0.5, 100)
    assert quiet.shape == noisy.shape == x.shape
    assert torch.equal(test_labels, data.test_labels)
    assert noisy.mean() > quiet.mean() + 20  # dB: white noise fills the silence
    [(again, _)] = Speech(whole).test_batches(0.5, 100)
    assert torch.equal(noisy, again)
    batches = [list(data.validation_batches(4)) for _ in range(2)]
    assert [len(labels) for _, labels in batches[0]] == [4, 4, 2]
    assert all(a[0].data_ptr() == b[0].data_ptr() for a, b in zip(*batches, strict=True))  # taken once


def test_a_download_that_the_part_stands_in_the_way_of_is_named(tmp_path, capsys):
    (tmp_path / speech.PART).write_bytes(b"")
    with pytest.raises(ValueError, match="not the original file"):
        Speech(tmp_path, fetch=True)
    assert "nothing is downloaded" in capsys.readouterr().out


def test_what_is_not_there_is_named(whole, tmp_path):
    (whole / "two" / "c3_nohash_0.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files that its lists name.*two/c3_nohash_0\.wav"):
        Speech(whole)
    with pytest.raises(FileNotFoundError, match="--download"):
        Speech(tmp_path / "nowhere")


def test_a_wrong_rate_is_refused(whole):
    soundfile.write(whole / "one" / "a1_nohash_0.wav", tone(100), 8000)
    with pytest.raises(ValueError, match=r"wants one channel of 16000 Hz, got .* of 8000 Hz"):
        Speech(whole)


def archive_of(folder, path, only=None):
    with tarfile.open(path, "w:gz") as tar:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and (only is None or only(file.name)):
                tar.add(file, f"./{file.relative_to(folder)}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_whole_data_set_is_fetched_unpacked_and_resumed(whole, tmp_path_factory):
    served = tmp_path_factory.mktemp("served") / "archive.tar.gz"
    checksum = archive_of(whole, served)
    folder = tmp_path_factory.mktemp("fetched")
    part = folder / (speech.ARCHIVE + ".part")
    part.write_bytes(served.read_bytes()[:1000])  # a download that broke off; a file URL is sent whole again
    with pytest.raises(OSError, match="wants SHA-256 0000"):
        speech.fetch_whole(folder, [served.as_uri()], "0" * 64)
    speech.fetch_whole(folder, [served.as_uri()], checksum)
    assert Speech(folder).checksum == Speech(whole).checksum
    assert not (folder / "bed").exists()
    served.unlink()
    speech.fetch_whole(folder, [served.as_uri()], checksum)  # nothing is fetched or unpacked again
    (folder / speech.EXTRACTED).unlink()
    (folder / "six" / "a1_nohash_0.wav").write_bytes(b"half a fi")
    speech.fetch_whole(folder, [served.as_uri()], checksum)
    assert Speech(folder).checksum == Speech(whole).checksum


def test_an_archive_without_lists_is_refused(whole, tmp_path_factory):
    archive = tmp_path_factory.mktemp("archive") / "a.tar.gz"
    archive_of(whole, archive, lambda name: name.endswith(".wav"))
    with pytest.raises(ValueError, match=r"wants testing_list\.txt and validation_list\.txt"):
        speech.unpack(archive, tmp_path_factory.mktemp("out"))


def test_an_archive_of_words(tmp_path):
    words = ["up", "cat"]
    index = io.StringIO()
    writer = csv.DictWriter(index, ["word", "split"])
    writer.writeheader()
    with tarfile.open(tmp_path / "part.tar.gz", "w:gz") as tar:
        for i, word in enumerate(words):
            for split, clips in (("train", 3), ("validation", 1)):
                path = tmp_path / f"{word}_{split}.ogg"
                soundfile.write(path, tone(500 + 500 * i, clips), mel.RATE, format="OGG", subtype="VORBIS")
                tar.add(path, path.name)
                writer.writerows([{"word": word, "split": split}] * clips)
        member = tarfile.TarInfo("index.csv")
        member.size = len(index.getvalue())
        tar.addfile(member, io.BytesIO(index.getvalue().encode()))
    splits = speech.read_vorbis_archive(tmp_path / "part.tar.gz", words)
    clips, labels = splits["train"]
    assert clips.shape == (6, mel.SAMPLES)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits["validation"][1].tolist() == [0, 1]
    assert loudest_band(clips[0]) < loudest_band(clips[5])
    with pytest.raises(ValueError, match="wants 0 clips of 16000 samples in dog_train"):
        speech.read_vorbis_archive(tmp_path / "part.tar.gz", ["dog"])


@pytest.mark.skipif(not (speech.default_folder() / speech.PART).is_file(), reason="the ten-word part is not here")
def test_the_real_ten_words():
    data = Speech()
    assert len(data) + len(data.test_labels) == 5554
    assert data.validation is None
    assert data.labels.bincount().min() > 400
    assert sum(len(labels) for _, labels in data.validation_batches(100)) == len(data.test_labels)


def loudest_band(clip):
    return int(mel.log_mel(clip.float().div(32767)[None]).sum((0, 1, 3)).argmax())


@pytest.mark.parametrize(("hertz", "band"), [(0, 0), (1000, None), (8000, mel.BANDS - 1)])
def test_bands_follow_pitch(hertz, band):
    spectrogram = mel.log_mel(torch.cos(2 * math.pi * hertz * torch.arange(mel.SAMPLES) / mel.RATE)[None])
    assert spectrogram.shape == (1, 1, mel.BANDS, mel.FRAMES)
    assert spectrogram.max() == 0
    assert spectrogram.min() >= -mel.FLOOR_DB
    loudest = int(spectrogram.sum((0, 1, 3)).argmax())
    centres = mel.mel_filters() @ torch.linspace(0, mel.RATE / 2, mel.FFT // 2 + 1) / mel.mel_filters().sum(1)
    assert loudest == (int((centres - hertz).abs().argmin()) if band is None else band)


def test_filters_have_the_same_area():
    area = mel.mel_filters().sum(1) * (mel.RATE / mel.FFT)
    assert torch.allclose(area, torch.ones(mel.BANDS), rtol=0.1)  # narrow bands lie on few bins


def draws(applied, value):
    """Draws of one augmentation alone: 0 amplitude, 1 speed, 2 stretch, 3 shift."""
    d = torch.full((1, 8), 0.999)
    d[0, applied], d[0, 4 + applied] = 0.0, value
    return d


def test_augmentation_that_does_nothing():
    clip = tone(700)[None]
    assert torch.equal(mel.augmented_log_mel(clip, torch.full((1, 8), 0.999)), mel.log_mel(clip))
    for applied in (1, 2):
        assert torch.allclose(mel.augmented_log_mel(clip, draws(applied, 0.5)), mel.log_mel(clip), atol=1e-2)


def test_speed_moves_the_pitch_and_shift_moves_the_time():
    clip = tone(2000)[None]
    band = [int(mel.augmented_log_mel(clip, draws(1, v))[0, 0, :, 5:20].sum(1).argmax()) for v in (0.0, 0.5, 0.999)]
    assert band[0] > band[1] > band[2]
    clip = torch.cat([tone(2000, 0.5), torch.zeros(mel.SAMPLES // 2)])[None]
    loud = [mel.augmented_log_mel(clip, draws(3, v))[0, 0].amax(0) > -20 for v in (0.0, 0.5, 0.999)]
    later, here, earlier = (frames.nonzero().flatten().tolist() for frames in loud)
    assert later[0] == here[0] + mel.SHIFT
    assert earlier[-1] == here[-1] - mel.SHIFT


def test_stretch_changes_the_tempo():
    clip = tone(2000)[None]
    assert not torch.equal(*(mel.augmented_log_mel(clip, draws(2, v)) for v in (0.0, 0.999)))


def test_augmentation_is_drawn_once_for_each_clip():
    generator = torch.Generator().manual_seed(3)
    clips = torch.randn(4, mel.SAMPLES, generator=generator)
    d = mel.draw_augmentation(4, generator)
    whole = mel.augmented_log_mel(clips, d)
    parts = torch.cat([mel.augmented_log_mel(clips[i : i + 1], d[i : i + 1]) for i in range(4)])
    assert torch.allclose(whole, parts, atol=1e-3)
