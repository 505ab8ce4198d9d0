"""The networks `mlp`, `residual`, `spatial` and `ladder` of jaxvae in PyTorch, for 28x28 images."""

import torch
import torch.nn.functional as F
from torch import nn

SIDES = 28, 14, 7, 4  # of `residual`; `spatial` and `ladder` end at 7
CHANNELS = 32, 64, 128, 128
LATENTS = {"spatial": 4 * 7 * 7, "ladder": 4 * 2 * (7 * 7 + 14 * 14)}


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Down(nn.Conv2d):
    """A 3x3 convolution with stride 2 and "same" padding: of an even side, below and right only."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, stride=2)

    def forward(self, x):
        low = x.shape[-1] % 2
        return super().forward(F.pad(x, (low, 1, low, 1)))


class Up(nn.ConvTranspose2d):
    """A 3x3 transposed convolution with stride 2, cropped to `side`."""

    def __init__(self, inputs, outputs, side):
        super().__init__(inputs, outputs, 3, stride=2)
        self.side = side

    def forward(self, x):
        return super().forward(x)[:, :, : self.side, : self.side]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv_1, self.conv_2 = conv(width, width), conv(width, width)

    def forward(self, x):
        return x + self.conv_2(F.relu(self.conv_1(F.relu(x))))


class Mlp(nn.Module):
    """Two hidden layers of tanh units."""

    def __init__(self, inputs):
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(inputs, 200), nn.Linear(200, 200)

    def hidden(self, x):
        return torch.tanh(self.dense_2(torch.tanh(self.dense_1(x))))


class MlpEncoder(Mlp):
    def __init__(self):
        super().__init__(28 * 28)
        self.mean, self.log_var = nn.Linear(200, 2), nn.Linear(200, 2)

    def forward(self, x):
        x = self.hidden(x.flatten(1))
        return self.mean(x), self.log_var(x)


class MlpDecoder(Mlp):
    def __init__(self):
        super().__init__(2)
        self.pixels = nn.Linear(200, 28 * 28)

    def forward(self, z):
        return self.pixels(self.hidden(z)).view(-1, 1, 28, 28)


class ConvolutionalEncoder(nn.Module):
    """Strided convolutions and residual blocks, through `levels` halvings."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.conv_0 = conv(1, CHANNELS[0])
        for level in range(1, levels + 1):
            setattr(self, f"conv_{level}", Down(*CHANNELS[level - 1 : level + 1]))
            setattr(self, f"block_{level}_0", Block(CHANNELS[level]))

    def features(self, x):
        x = self.conv_0(x)
        for level in range(1, self.levels + 1):
            x = getattr(self, f"conv_{level}")(F.relu(x))
            x = getattr(self, f"block_{level}_0")(x)
        return F.relu(x)


class ConvolutionalDecoder(nn.Module):
    """Residual blocks and transposed convolutions, through as many doublings."""

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        for level in range(levels, 0, -1):
            setattr(self, f"block_{level}_0", Block(CHANNELS[level]))
            up = Up(CHANNELS[level], CHANNELS[level - 1], SIDES[level - 1])
            setattr(self, f"conv_transpose_{level}", up)
        self.conv = conv(CHANNELS[0], 1)

    def outputs(self, x):
        for level in range(self.levels, 0, -1):
            x = getattr(self, f"block_{level}_0")(x)
            x = getattr(self, f"conv_transpose_{level}")(F.relu(x))
        return self.conv(F.relu(x))


class ResidualEncoder(ConvolutionalEncoder):
    def __init__(self):
        super().__init__(3)
        self.dense = nn.Linear(4 * 4 * CHANNELS[3], 256)
        self.mean, self.log_var = nn.Linear(256, 2), nn.Linear(256, 2)

    def forward(self, x):
        x = F.relu(self.dense(_flat(self.features(x))))
        return self.mean(x), self.log_var(x)


class ResidualDecoder(ConvolutionalDecoder):
    def __init__(self):
        super().__init__(3)
        self.dense = nn.Linear(2, 4 * 4 * CHANNELS[3])

    def forward(self, z):
        return self.outputs(_grid(self.dense(z), 4))


class SpatialEncoder(ConvolutionalEncoder):
    def __init__(self):
        super().__init__(2)
        self.mean, self.log_var = conv(CHANNELS[2], 4), conv(CHANNELS[2], 4)

    def forward(self, x):
        x = self.features(x)
        return _flat(self.mean(x)), _flat(self.log_var(x))


class SpatialDecoder(ConvolutionalDecoder):
    def __init__(self):
        super().__init__(2)
        self.conv_in = conv(4, CHANNELS[2])

    def forward(self, z):
        return self.outputs(self.conv_in(_grid(z, 7)))


def _flat(x):
    """[N, C, H, W] to [N, H W C], which copies nothing of a tensor in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1)


def _grid(x, side):
    """[N, H W C] to [N, C, H, W] in channels_last."""
    return x.view(len(x), side, side, -1).permute(0, 3, 1, 2)


WIDTH, GROUP = 32, 4  # of `ladder`: channels, and latents at a place of a group
GROUP_SIDES = 7, 7, 14, 14


class Head(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_1, self.conv_2 = conv(inputs, WIDTH), conv(WIDTH, outputs)

    def forward(self, x):
        return self.conv_2(F.relu(self.conv_1(F.relu(x))))


class LadderEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_1_0, self.down_0_0 = Down(1, WIDTH), Down(WIDTH, WIDTH)
        for level in (0, 1):
            for block in (0, 1):
                setattr(self, f"block_{level}_{block}", Block(WIDTH))
        for g in range(4):
            setattr(self, f"q_{g}", Head(2 * WIDTH, 2 * GROUP))

    def forward(self, x):
        fine = self.block_1_1(self.block_1_0(self.down_1_0(x)))
        coarse = self.block_0_1(self.block_0_0(self.down_0_0(F.relu(fine))))
        return coarse, coarse, fine, fine


class LadderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = nn.Parameter(torch.zeros(WIDTH, GROUP_SIDES[0], GROUP_SIDES[0]))
        for g in range(4):
            if g:
                setattr(self, f"p_{g}", Head(WIDTH, 2 * GROUP + WIDTH))
            setattr(self, f"z_{g}", nn.Conv2d(GROUP, WIDTH, 1))
            setattr(self, f"block_{g}", Block(WIDTH))
        self.up_0_0, self.up_1_0 = Up(WIDTH, WIDTH, 14), Up(WIDTH, WIDTH, 28)
        self.conv = conv(WIDTH, 1)

    def up(self, g, h):
        return {1: self.up_0_0, 3: self.up_1_0}[g](F.relu(h)) if g in (1, 3) else h


MODULES = {
    "mlp": (MlpEncoder, MlpDecoder),
    "residual": (ResidualEncoder, ResidualDecoder),
    "spatial": (SpatialEncoder, SpatialDecoder),
    "ladder": (LadderEncoder, LadderDecoder),
}


def bounded(log_var):
    return 5 * torch.tanh(log_var / 5)


def ladder_terms(encoder, decoder, x, eps):
    """log p(x|z) and KL of each image, nats; eps is [batch, latent], a group after the other."""
    features = encoder(x)
    h = decoder.top.expand(len(x), -1, -1, -1)
    h = h.contiguous(memory_format=torch.channels_last)
    kl, sizes = 0.0, [side * side * GROUP for side in GROUP_SIDES]
    for g, (part, side) in enumerate(zip(eps.split(sizes, dim=1), GROUP_SIDES, strict=True)):
        part = _grid(part, side)
        h_p, mean_p, log_var_p = h, torch.zeros_like(part), torch.zeros_like(part)
        if g:
            outputs = getattr(decoder, f"p_{g}")(h)
            mean_p, log_var_p, added = outputs.split((GROUP, GROUP, WIDTH), dim=1)
            log_var_p, h_p = bounded(log_var_p), h + added
        residual = getattr(encoder, f"q_{g}")(torch.cat((h, features[g]), dim=1))
        mean, log_var = residual.split(GROUP, dim=1)
        log_var = bounded(log_var)
        z = mean_p + mean + torch.exp((log_var_p + log_var) / 2) * part
        each = log_var.exp() - 1 - log_var + mean**2 * torch.exp(-log_var_p)
        kl = kl + 0.5 * each.sum((1, 2, 3))
        h = getattr(decoder, f"block_{g}")(h_p + getattr(decoder, f"z_{g}")(z))
        h = decoder.up(g, h)
    logits = decoder.conv(F.relu(h))
    cross_entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return -cross_entropy.sum((1, 2, 3)), kl


def load(encoder, decoder, weights):
    """Copy weights of jaxvae, "encoder/q_0/conv_1/kernel" and so on, in its layout."""
    with torch.no_grad():
        for part, module in (("encoder", encoder), ("decoder", decoder)):
            for name, parameter in module.named_parameters():
                path = name.replace(".", "/").replace("weight", "kernel")
                value = torch.from_numpy(weights[f"{part}/{path}"].copy())
                if name == "top":
                    value = value.permute(2, 0, 1)
                elif value.ndim == 2:
                    value = value.T
                elif value.ndim == 4 and ("up_" in name or "transpose" in name):
                    # PyTorch convolves where jaxvae correlates.
                    value = value.flip(0, 1).permute(2, 3, 0, 1)
                elif value.ndim == 4:
                    value = value.permute(3, 2, 0, 1)
                parameter.copy_(value.reshape(parameter.shape))
