"""pythae's VAE around the PyTorch peer's encoder and decoder: the log-likelihood alone."""

from importlib.metadata import version

import protocol
import torch
import torch_peer
from protocol import Timed
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder

AT_ONCE = 10_000 if torch_peer.GPU else 250  # samples


class Encoder(BaseEncoder):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        mean, log_var = self.network(x)
        return ModelOutput(embedding=mean, log_covariance=log_var)


class Decoder(BaseDecoder):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, z):
        return ModelOutput(reconstruction=torch.sigmoid(self.network(z)))


def build():
    encoder, decoder = torch_peer.build()
    config = VAEConfig(input_dim=(1, 28, 28), latent_dim=2, reconstruction_loss="bce")
    return VAE(config, encoder=Encoder(encoder), decoder=Decoder(decoder)).to(torch_peer.DEVICE)


def log_likelihood(images, samples):
    model, x = build(), torch_peer.to_device(protocol.float_images(images))

    @torch.inference_mode()
    def run(n, samples=samples):
        for _ in range(n):
            # What does not fill a last block of its samples, pythae leaves out.
            model.get_nll(x, n_samples=samples, batch_size=min(AT_ONCE, samples))
        torch_peer.wait()

    return Timed(run, images, warm=lambda: run(1, min(AT_ONCE, samples)))


def check(path):
    """pythae draws its own noise, so it is handed the one given in place of its draw."""
    weights, images, eps = protocol.load_check(path)
    model = build()
    torch_peer.load(model.encoder.network, model.decoder.network, weights)
    eps = torch.from_numpy(eps).to(torch_peer.DEVICE)
    model._sample_gauss = lambda mean, std: (mean + eps * std, eps)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    x = torch_peer.to_device(images).float() / 255
    with torch.no_grad():
        # Its loss terms are means over the batch.
        output = model({"data": x})
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    sizes = (sum(p.numel() for p in m.parameters()) for m in (model.encoder, model.decoder))
    return protocol.check_answer(-output.recon_loss.cpu(), output.reg_loss.cpu(), *sizes)


def info():
    versions = {"pythae": version("pythae"), "torch": torch.__version__}
    return torch_peer.info() | {"versions": versions}


if __name__ == "__main__":
    protocol.serve({"info": info, "check": check, "log_likelihood": log_likelihood})
