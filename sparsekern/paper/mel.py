"""The speech front end: log-mel spectrograms of one-second clips, and their augmentation, in batches on any device."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

RATE = SAMPLES = 16_000  # Hz; a clip is one second
BANDS = FRAMES = 32
FFT, HOP = 2048, 512
FLOOR_DB = 80.0  # below the clip's loudest point
POWER_FLOOR = 1e-10
AMPLITUDES = (0.7, 1.1)
SPEED, STRETCH, SHIFT = 0.2, 0.2, 8  # at most: two fractions and a number of frames
APPLIED = 0.5  # the share of the clips that each augmentation changes


def log_mel(audio: Tensor) -> Tensor:
    """Log-mel spectrograms in decibels below the loudest point, down to -80: (B, 16000) -> (B, 1, 32, 32)."""
    return _log_mel(_magnitudes(audio))


def augmented_log_mel(audio: Tensor, draws: Tensor) -> Tensor:
    """The spectrograms of clips whose amplitude, speed and pitch, stretch and time shift are changed at random.

    Args:
        audio: (B, 16000).
        draws: from :func:`draw_augmentation`, (B, 8).
    """
    applied = draws[:, :4] < APPLIED
    value = draws[:, 4:]
    low, high = AMPLITUDES  # matters next to the floor alone, since the loudest point is the reference
    amplitude = torch.where(applied[:, 0], low + (high - low) * value[:, 0], 1.0)
    speed = torch.where(applied[:, 1], 1 / (1 + SPEED * (2 * value[:, 1] - 1)), 1.0)
    stretch = torch.where(applied[:, 2], 1 + STRETCH * (2 * value[:, 2] - 1), 1.0)
    shift = torch.where(applied[:, 3], (value[:, 3] * (2 * SHIFT + 1)).floor() - SHIFT, 0.0)
    audio = _change_speed(audio * amplitude[:, None], speed)
    return _log_mel(_stretch_and_shift(_magnitudes(audio), stretch, shift))


def draw_augmentation(clips: int, generator=None) -> Tensor:
    """What decides the augmentation of that many clips: (clips, 8), uniform in [0, 1)."""
    return torch.rand(clips, 8, generator=generator)


def _change_speed(audio: Tensor, speed: Tensor) -> Tensor:
    """Plays each clip faster, and higher, by its factor: linear interpolation, cut or padded with silence."""
    position = torch.arange(SAMPLES, device=audio.device) * speed[:, None]  # (B, 16000)
    left = position.long().clamp_(max=SAMPLES - 1)
    right = (left + 1).clamp_(max=SAMPLES - 1)
    value = torch.lerp(audio.gather(1, left), audio.gather(1, right), position - left)
    return value.masked_fill_(position >= SAMPLES, 0)


def _stretch_and_shift(magnitudes: Tensor, stretch: Tensor, shift: Tensor) -> Tensor:
    """Linear interpolation between frames, whose product with a matrix a clip it is: (B, 32, 1025)."""
    frames = torch.arange(FRAMES, device=magnitudes.device)
    position = (frames + shift[:, None]) * stretch[:, None]  # (B, 32): where each new frame comes from
    distance = (position[:, :, None] - frames).abs()  # (B, 32 new, 32 old)
    weight = (1 - distance).clamp_(min=0) * (position >= 0)[:, :, None]
    return weight @ magnitudes


def _magnitudes(audio: Tensor) -> Tensor:  # (B, 16000) -> (B, 32, 1025)
    # A third of the time of torch.stft and abs.
    padded = nn.functional.pad(audio[:, None], (FFT // 2, FFT // 2), mode="reflect").squeeze(1)
    spectrum = torch.fft.rfft(padded.unfold(1, FFT, HOP) * _window(audio.device))
    real, imaginary = torch.view_as_real(spectrum).unbind(-1)
    return (real * real).addcmul_(imaginary, imaginary).sqrt_()


def _log_mel(magnitudes: Tensor) -> Tensor:
    power = (magnitudes.square() @ mel_filters().to(magnitudes.device).T).transpose(1, 2)  # (B, 32 bands, 32 frames)
    decibels = 10 * power.clamp(min=POWER_FLOOR).log10_()
    decibels -= decibels.amax((1, 2), keepdim=True)
    return decibels.clamp_(min=-FLOOR_DB).unsqueeze(1)


@cache
def _window(device) -> Tensor:
    return torch.hann_window(FFT, device=device)


@cache
def mel_filters() -> Tensor:
    """Triangular bands of equal area, evenly spaced on Slaney's mel scale from 0 Hz to half the rate: (32, 1025)."""
    edges = _mel_to_hz(torch.linspace(0, _hz_to_mel(RATE / 2), BANDS + 2, dtype=torch.float64))
    bins = torch.linspace(0, RATE / 2, FFT // 2 + 1, dtype=torch.float64)
    ramps = edges[:, None] - bins  # (34, 1025)
    width = edges.diff()[:, None]
    rising, falling = -ramps[:-2] / width[:-1], ramps[2:] / width[1:]
    bands = torch.minimum(rising, falling).clamp(min=0)
    return (bands * (2 / (edges[2:] - edges[:-2]))[:, None]).float()


LINEAR_HZ, LOG_FROM_HZ = 200 / 3, 1000.0  # Hz a mel below the knee; from there on 27 mels are a factor 6.4
LOG_FROM_MEL, LOG_STEP = LOG_FROM_HZ / LINEAR_HZ, math.log(6.4) / 27


def _hz_to_mel(hz: float) -> float:
    return hz / LINEAR_HZ if hz < LOG_FROM_HZ else LOG_FROM_MEL + math.log(hz / LOG_FROM_HZ) / LOG_STEP


def _mel_to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < LOG_FROM_MEL, mel * LINEAR_HZ, LOG_FROM_HZ * torch.exp(LOG_STEP * (mel - LOG_FROM_MEL)))
