"""The same VAE, initialisation and RMSprop in PyTorch, trained on the same images.

    python experiments/mnist/torch_peer.py --data FOLDER --run-dir DIR [--seed N]

Writes DIR/metrics.jsonl as `jaxvae train` does. Needs PyTorch.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv_2 = nn.Conv2d(32, 64, 3, stride=2)
        self.conv_3 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv_4 = nn.Conv2d(64, 64, 3, padding=1)
        self.dense = nn.Linear(14 * 14 * 64, 32)
        self.mean = nn.Linear(32, latent_dim)
        self.log_var = nn.Linear(32, latent_dim)

    def forward(self, x):
        x = F.relu(self.conv_1(x))
        # "Same" padding with stride 2 pads an even side below and to the right.
        x = F.relu(self.conv_2(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(self.conv_4(F.relu(self.conv_3(x))))
        x = F.relu(self.dense(x.flatten(1)))
        return self.mean(x), self.log_var(x)


class Decoder(nn.Module):
    def __init__(self, latent_dim):
        super().__init__()
        self.dense = nn.Linear(latent_dim, 14 * 14 * 64)
        self.conv_transpose = nn.ConvTranspose2d(64, 32, 3, stride=2)
        self.conv = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, z):
        x = F.relu(self.dense(z)).view(-1, 64, 14, 14)
        x = F.relu(self.conv_transpose(x)[:, :, :28, :28])
        return self.conv(x)


def terms(encoder, decoder, x):
    """log p(x|z) and KL(q(z|x) || p(z)) of each image, one sample, nats."""
    mean, log_var = encoder(x)
    z = mean + torch.exp(log_var / 2) * torch.randn_like(mean)
    cross_entropy = F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none")
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)
    return -cross_entropy.sum((1, 2, 3)), kl


def main():
    from jaxvae import load_data  # experiments/speed uses the model where there is no jaxvae

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    train, test = (
        (torch.tensor(images).permute(0, 3, 1, 2) / 255).contiguous(
            memory_format=torch.channels_last
        )
        for images in load_data(options.data)
    )
    encoder = Encoder(2).to(memory_format=torch.channels_last)
    decoder = Decoder(2).to(memory_format=torch.channels_last)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    for parameter in parameters:
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.RMSprop(parameters, lr=1e-3, alpha=0.9, eps=1e-7)

    options.run_dir.mkdir(parents=True, exist_ok=True)
    with (options.run_dir / "metrics.jsonl").open("w") as file:
        for epoch in range(1, options.epochs + 1):
            began = time.perf_counter()
            order = torch.randperm(len(train))
            steps = len(train) // options.batch_size
            for batch in order[: steps * options.batch_size].view(steps, -1):
                log_likelihood, kl = terms(encoder, decoder, train[batch])
                optimizer.zero_grad()
                (kl - log_likelihood).mean().backward()
                optimizer.step()
            with torch.no_grad():
                parts = [terms(encoder, decoder, images) for images in test.split(500)]
            log_likelihood, kl = (
                torch.cat(part).mean().item() for part in zip(*parts, strict=True)
            )
            record = {
                "epoch": epoch,
                "step": epoch * steps,
                "test": {
                    "elbo": log_likelihood - kl,
                    "log_likelihood": log_likelihood,
                    "kl": kl,
                },
                "seconds": round(time.perf_counter() - began, 3),
            }
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(f"epoch {epoch:2}  test ELBO {record['test']['elbo']:.2f}", flush=True)


if __name__ == "__main__":
    main()
