"""The default ladder of jaxvae in PyTorch: two groups of latents at 7x7, two at 14x14."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, LATENTS = 32, 4
SIDES = 7, 7, 14, 14


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_1, self.conv_2 = conv(WIDTH, WIDTH), conv(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.conv_2(F.relu(self.conv_1(F.relu(x))))


class Head(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv_1, self.conv_2 = conv(inputs, WIDTH), conv(WIDTH, outputs)

    def forward(self, x):
        return self.conv_2(F.relu(self.conv_1(F.relu(x))))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_1_0 = nn.Conv2d(1, WIDTH, 3, stride=2)
        self.down_0_0 = nn.Conv2d(WIDTH, WIDTH, 3, stride=2)
        for level in (0, 1):
            for block in (0, 1):
                setattr(self, f"block_{level}_{block}", Block())
        for g in range(4):
            setattr(self, f"q_{g}", Head(2 * WIDTH, 2 * LATENTS))

    def forward(self, x):
        # "Same" padding with stride 2 pads an even side below and to the right.
        x = self.down_1_0(F.pad(x, (0, 1, 0, 1)))
        fine = self.block_1_1(self.block_1_0(x))
        x = self.down_0_0(F.pad(F.relu(fine), (0, 1, 0, 1)))
        coarse = self.block_0_1(self.block_0_0(x))
        return coarse, coarse, fine, fine


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.top = nn.Parameter(torch.zeros(WIDTH, SIDES[0], SIDES[0]))
        for g in range(4):
            if g:
                setattr(self, f"p_{g}", Head(WIDTH, 2 * LATENTS + WIDTH))
            setattr(self, f"z_{g}", nn.Conv2d(LATENTS, WIDTH, 1))
            setattr(self, f"block_{g}", Block())
        self.up_0_0 = nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2)
        self.up_1_0 = nn.ConvTranspose2d(WIDTH, WIDTH, 3, stride=2)
        self.conv = conv(WIDTH, 1)

    def up(self, g, h):
        if g == 1:
            return self.up_0_0(F.relu(h))[:, :, :14, :14]
        return self.up_1_0(F.relu(h))[:, :, :28, :28] if g == 3 else h


def bounded(log_var):
    return 5 * torch.tanh(log_var / 5)


def terms(encoder, decoder, x, eps):
    """log p(x|z) and KL of each image, nats; eps is [batch, latent], a group after the other."""
    features = encoder(x)
    h = decoder.top.expand(len(x), -1, -1, -1)
    h = h.contiguous(memory_format=torch.channels_last)
    kl, sizes = 0.0, [side * side * LATENTS for side in SIDES]
    for g, (part, side) in enumerate(zip(eps.split(sizes, dim=1), SIDES, strict=True)):
        part = part.view(-1, side, side, LATENTS).permute(0, 3, 1, 2)
        h_p, mean_p, log_var_p = h, torch.zeros_like(part), torch.zeros_like(part)
        if g:
            outputs = getattr(decoder, f"p_{g}")(h)
            mean_p, log_var_p, added = outputs.split((LATENTS, LATENTS, WIDTH), dim=1)
            log_var_p, h_p = bounded(log_var_p), h + added
        residual = getattr(encoder, f"q_{g}")(torch.cat((h, features[g]), dim=1))
        mean, log_var = residual.split(LATENTS, dim=1)
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
                    value = value.T[:, :, None, None]
                elif "up_" in name and value.ndim == 4:  # convolves where jaxvae correlates
                    value = value.flip(0, 1).permute(2, 3, 0, 1)
                elif value.ndim == 4:
                    value = value.permute(3, 2, 0, 1)
                parameter.copy_(value.reshape(parameter.shape))
