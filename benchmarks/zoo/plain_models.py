"""Architectures written with torch alone: what people train that is in no model library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo._case import CLASSES, Case, image_batch, token_batch, waveform_batch

__all__ = ["CASES"]

VOCABULARY = 256
LENGTH = 24
NUMERIC = 8
CARDINALITIES = (12, 5, 30, 7)
"""How many values each categorical column of the tabular cases has."""


# Tables


def mlp(width: int = 512) -> nn.Module:
    """Three wide layers, where the time of a step at a small batch is the host's."""
    return nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
    )


class EmbeddingMLP(nn.Module):
    """Categorical columns embedded and concatenated to normalized numeric ones (Guo and Berkhahn, 2016)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(values, width) for values in CARDINALITIES)
        self.norm = nn.BatchNorm1d(NUMERIC)
        self.layers = nn.Sequential(
            nn.Linear(NUMERIC + width * len(CARDINALITIES), 128),
            nn.ReLU(),
            nn.BatchNorm1d(128),
            nn.Dropout(0.1),
            nn.Linear(128, CLASSES),
        )

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        embedded = [each(categorical[:, i]) for i, each in enumerate(self.embeddings)]
        return self.layers(torch.cat([self.norm(numeric), *embedded], dim=1))


class FTTransformer(nn.Module):
    """Every column a token, and attention between them (Gorishniy et al., 2021)."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.numeric_weight = nn.Parameter(torch.randn(NUMERIC, width) * 0.02)
        self.numeric_bias = nn.Parameter(torch.zeros(NUMERIC, width))
        self.categories = nn.Embedding(sum(CARDINALITIES), width)
        self.register_buffer("offsets", torch.tensor([0, *CARDINALITIES[:-1]]).cumsum(0))
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        tokens = [
            self.cls.expand(numeric.shape[0], -1, -1),  # len() would fix the batch size in a graph
            numeric.unsqueeze(-1) * self.numeric_weight + self.numeric_bias,
            self.categories(categorical + self.offsets),
        ]
        return self.head(self.encoder(torch.cat(tokens, dim=1))[:, 0])


class WideAndDeep(nn.Module):
    """A linear model of the categories beside a deep one of all columns (Cheng et al., 2016)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *CARDINALITIES[:-1]]).cumsum(0))
        self.wide = nn.EmbeddingBag(sum(CARDINALITIES), 1, mode="sum")
        self.embedding = nn.Embedding(sum(CARDINALITIES), width)
        self.deep = nn.Sequential(
            nn.Linear(NUMERIC + width * len(CARDINALITIES), 64),
            nn.SELU(),
            nn.AlphaDropout(0.1),
            nn.Linear(64, 1),
        )

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        rows = categorical + self.offsets
        deep = self.deep(torch.cat([numeric, self.embedding(rows).flatten(1)], dim=1))
        return (self.wide(rows) + deep).squeeze(1)


# Sequences and text


class RecurrentClassifier(nn.Module):
    """Word embeddings, a recurrent network, and a head on the mean of its states."""

    def __init__(self, recurrent: Callable[..., nn.RNNBase], width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.recurrent = recurrent(width, width, batch_first=True)
        self.head = nn.Linear(width * (2 if self.recurrent.bidirectional else 1), CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        return self.head(states.mean(1))


class SeriesForecaster(nn.Module):
    """An LSTM that reads a series of 6 values a step and predicts the next 4 steps from its last state."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(6, width, batch_first=True)
        self.head = nn.Linear(width, 4 * 6)

    def forward(self, series: Tensor) -> Tensor:
        _, (last, _) = self.recurrent(series)
        return self.head(last[-1]).unflatten(1, (4, 6))


class TemporalConvNet(nn.Module):
    """Dilated causal convolutions with residuals and weight norm (Bai et al., 2018)."""

    def __init__(self, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv1d(6, width, 1)
        self.layers = nn.ModuleList(
            nn.utils.parametrizations.weight_norm(nn.Conv1d(width, width, 3, dilation=2**i)) for i in range(layers)
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        x = self.lift(series.transpose(1, 2))
        for layer in self.layers:
            x = x + F.dropout(F.relu(layer(F.pad(x, (2 * layer.dilation[0], 0)))), 0.1, self.training)
        return self.head(x[..., -1])


class EncoderClassifier(nn.Module):
    """``nn.TransformerEncoder`` with its padding mask, pooled over the words that are there."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, width) * 0.02)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        states = self.encoder(self.embedding(tokens) + self.positions, src_key_padding_mask=padding)
        states = states.masked_fill(padding.unsqueeze(-1), 0.0)
        return self.head(states.sum(1) / (~padding).sum(1, keepdim=True))


class TextConvNet(nn.Module):
    """Convolutions of several widths over word embeddings, each pooled by its maximum (Kim, 2014)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, kernel) for kernel in (3, 4, 5))
        self.head = nn.Linear(3 * width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2)
        return self.head(torch.cat([F.relu(each(x)).amax(-1) for each in self.convolutions], dim=1))


class TiedLanguageModel(nn.Module):
    """A causal transformer whose last layer is its embedding, transposed (Press and Wolf, 2017)."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for i, (qkv, projection, mlp) in enumerate(zip(self.qkv, self.projections, self.mlps)):
            q, k, v = qkv(self.norms[2 * i](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + projection(attended.transpose(1, 2).flatten(2))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


# Images and sound


class Generator(nn.Module):
    """DCGAN's generator (Radford et al., 2016): noise ``(n, 32)`` to images ``(n, 3, 32, 32)``."""

    def __init__(self, noise: int = 32, width: int = 16) -> None:
        super().__init__()
        sizes = [noise, 4 * width, 2 * width, width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return self.layers(noise[:, :, None, None])


class Discriminator(nn.Module):
    """DCGAN's discriminator: images ``(n, 3, 32, 32)`` to logits ``(n,)``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(after)] if i else []
            layers += [nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten()


class GeneratorThroughDiscriminator(nn.Module):
    """The generator's half of a GAN step: the gradient passes through the discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = Generator()
        self.discriminator = Discriminator()

    def forward(self, noise: Tensor) -> Tensor:
        return self.discriminator(self.generator(noise))


class UNet(nn.Module):
    """Segmentation with skip connections by concatenation (Ronneberger et al., 2015)."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(_double(before, after) for before, after in zip([3, *widths], widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(before, after, 2, 2) for after, before in pairwise(widths))
        self.merge = nn.ModuleList(_double(2 * each, each) for each in widths[:-1])
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x, skips = images, []
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, merge, skip in reversed(list(zip(self.up, self.merge, skips))):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


def _double(before: int, after: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3, padding=1, bias=False),
        nn.GroupNorm(4, after),
        nn.SiLU(inplace=True),
    )


class VariationalAutoencoder(nn.Module):
    """Images to a normal distribution each, a sample of it back to an image (Kingma and Welling, 2014)."""

    def __init__(self, width: int = 16, latent: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ELU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ELU(),
            nn.Flatten(),
        )
        self.moments = nn.Linear(2 * width * 49, 2 * latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 2 * width * 49),
            nn.Unflatten(1, (2 * width, 7, 7)),
            nn.ConvTranspose2d(2 * width, width, 3, 2, 1, output_padding=1),
            nn.ELU(),
            nn.ConvTranspose2d(width, 1, 3, 2, 1, output_padding=1),
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.moments(self.encoder(images)).chunk(2, dim=1)
        sample = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(sample), mean, log_variance


def digits_cnn() -> nn.Module:
    """A small convolutional network for 8 x 8 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32 * 4, CLASSES),
    )


def waveform_cnn(width: int = 16) -> nn.Module:
    """M5 (Dai et al., 2017): convolutions on the samples themselves."""
    layers: list[nn.Module] = [
        nn.Conv1d(1, width, 80, stride=8),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.MaxPool1d(4),
    ]
    for before, after in ((width, width), (width, 2 * width)):
        layers += [nn.Conv1d(before, after, 3), nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, CLASSES))


class SpectrogramCNN(nn.Module):
    """A classifier of sound that computes its log-power spectrogram itself, with a fixed window."""

    def __init__(self, window: int = 128) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(window))
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.BatchNorm2d(16),
            nn.Hardswish(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.InstanceNorm2d(32, affine=True),
            nn.PReLU(32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        size = len(self.window)
        spectrum = torch.stft(waveforms.squeeze(1), size, size // 2, window=self.window, return_complex=True)
        return self.layers(spectrum.abs().square().add(1e-6).log().unsqueeze(1))


# Batches and losses


def _vectors(n: int, *, width: int) -> tuple[Tensor, ...]:
    return torch.randn(n, width), torch.randint(CLASSES, (n,))


def _rows(n: int, *, regression: bool = False) -> tuple[Tensor, ...]:
    categorical = torch.stack([torch.randint(values, (n,)) for values in CARDINALITIES], dim=1)
    target = torch.randn(n) if regression else torch.randint(CLASSES, (n,))
    return torch.randn(n, NUMERIC), categorical, target


def _series(n: int, *, forecast: bool = False) -> tuple[Tensor, ...]:
    return torch.randn(n, LENGTH, 6), torch.randn(n, 4, 6) if forecast else torch.randint(CLASSES, (n,))


def _padded_tokens(n: int) -> tuple[Tensor, ...]:
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (n, 1))
    tokens = torch.randint(1, VOCABULARY, (n, LENGTH)) * (torch.arange(LENGTH) < lengths)
    return tokens, torch.randint(CLASSES, (n,))


def _next_tokens(n: int) -> tuple[Tensor, ...]:
    tokens = torch.randint(VOCABULARY, (n, LENGTH + 1))
    return tokens[:, :-1].clone(), tokens[:, 1:].clone()


def _noise(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 32), torch.ones(n)


def _real_or_not(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 32, 32), torch.randint(2, (n,)).float()


def _segments(n: int) -> tuple[Tensor, ...]:
    return torch.randn(n, 3, 32, 32), torch.randint(CLASSES, (n, 32, 32))


def _to_reconstruct(n: int) -> tuple[Tensor, ...]:
    images = torch.rand(n, 1, 28, 28)
    return images, images.clone()


def _word_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _evidence_loss(outputs: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """The negative evidence lower bound, a mean over the batch."""
    logits, mean, log_variance = outputs
    reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return (reconstruction + divergence).mean()


Loss = Callable[[Any, Tensor], Tensor]
Batch = Callable[[int], tuple[Tensor, ...]]

# name: (modality, build, batch, loss)
MODELS: dict[str, tuple[str, Callable[[], nn.Module], Batch, Loss]] = {
    "mlp": ("tabular", mlp, partial(_vectors, width=512), F.cross_entropy),
    "embedding_mlp": ("tabular", EmbeddingMLP, _rows, F.cross_entropy),
    "ft_transformer": ("tabular", FTTransformer, _rows, F.cross_entropy),
    "wide_and_deep": ("tabular", WideAndDeep, partial(_rows, regression=True), F.mse_loss),
    "lstm_classifier": (
        "text",
        partial(RecurrentClassifier, partial(nn.LSTM, bidirectional=True)),
        token_batch(12, vocabulary=VOCABULARY),
        F.cross_entropy,
    ),
    "gru_classifier": (
        "text",
        partial(RecurrentClassifier, partial(nn.GRU, num_layers=2, dropout=0.1)),
        token_batch(12, vocabulary=VOCABULARY),
        F.cross_entropy,
    ),
    "lstm_forecaster": ("sequence", SeriesForecaster, partial(_series, forecast=True), F.smooth_l1_loss),
    "temporal_conv": ("sequence", TemporalConvNet, _series, F.cross_entropy),
    "transformer_encoder": ("text", EncoderClassifier, _padded_tokens, F.cross_entropy),
    "text_cnn": ("text", TextConvNet, token_batch(LENGTH, vocabulary=VOCABULARY), F.cross_entropy),
    "tied_lm": ("text", TiedLanguageModel, _next_tokens, _word_loss),
    "digits_cnn": ("image", digits_cnn, image_batch(8, channels=1), F.cross_entropy),
    "unet": ("image", UNet, _segments, F.cross_entropy),
    "autoencoder": ("image", VariationalAutoencoder, _to_reconstruct, _evidence_loss),
    "gan_generator": (
        "image",
        GeneratorThroughDiscriminator,
        _noise,
        F.binary_cross_entropy_with_logits,
    ),
    "gan_discriminator": ("image", Discriminator, _real_or_not, F.binary_cross_entropy_with_logits),
    "waveform_cnn": ("audio", waveform_cnn, waveform_batch(4000), F.cross_entropy),
    "spectrogram_cnn": ("audio", SpectrogramCNN, waveform_batch(4000), F.cross_entropy),
}

CASES: tuple[Case, ...] = tuple(Case(name, "torch", *entry) for name, entry in MODELS.items())
