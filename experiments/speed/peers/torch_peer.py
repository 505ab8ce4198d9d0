"""PyTorch, in the variant its argument names: eager, compile or cudagraphs."""

import sys

import numpy as np
import protocol
import torch
import torch.nn.functional as F
import torch_networks
from protocol import Timed

from experiments.mnist.torch_peer import Decoder, Encoder

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
AT_ONCE = 10_000 if GPU else 250  # images, when only run forward: in cache on a CPU
# May use TF32 on a GPU, as JAX and TensorFlow do by default.
torch.set_float32_matmul_precision("high")
torch.backends.cudnn.benchmark = True


def build(network="conv"):
    torch.manual_seed(0)
    if network == "conv":
        modules = Encoder(2), Decoder(2)
    else:
        modules = (module() for module in torch_networks.MODULES[network])
    return (module.to(DEVICE, memory_format=torch.channels_last) for module in modules)


def load(encoder, decoder, weights):
    """Put ours' weights in place: from HWIO filters and (height, width, channel) features."""
    with torch.no_grad():
        for module, name in ((encoder, "encoder"), (decoder, "decoder")):
            for layer, part in module.named_children():
                kernel, bias = (weights[f"{name}/{layer}/{leaf}"] for leaf in ("kernel", "bias"))
                if layer == "conv_transpose":  # PyTorch convolves where ours correlates
                    kernel = kernel[::-1, ::-1].transpose(2, 3, 0, 1)
                elif kernel.ndim == 4:
                    kernel = kernel.transpose(3, 2, 0, 1)
                elif kernel.shape[0] == 14 * 14 * 64:
                    kernel = kernel.reshape(14, 14, 64, -1).transpose(3, 2, 0, 1)
                elif kernel.shape[1] == 14 * 14 * 64:
                    kernel = kernel.reshape(-1, 14, 14, 64).transpose(3, 1, 2, 0)
                    bias = bias.reshape(14, 14, 64).transpose(2, 0, 1)
                else:
                    kernel = kernel.T
                shape = part.weight.shape
                part.weight.copy_(torch.from_numpy(kernel.reshape(shape).copy()))
                part.bias.copy_(torch.from_numpy(bias.reshape(-1).copy()))


def to_device(images):
    """uint8 or float [N, 28, 28, 1] to [N, 1, 28, 28]."""
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.to(DEVICE).contiguous(memory_format=torch.channels_last)


def log_p_x(decoder, z, x):
    return -F.binary_cross_entropy_with_logits(decoder(z), x, reduction="none").sum((1, 2, 3))


def terms(encoder, decoder, x, eps):
    """log p(x|z) and KL of each image, nats."""
    mean, log_var = encoder(x)
    z = mean + torch.exp(log_var / 2) * eps
    return log_p_x(decoder, z, x), -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)


def terms_of(network):
    return torch_networks.ladder_terms if network == "ladder" else terms


def compiled(function):
    if VARIANT == "eager":
        return function
    mode = "reduce-overhead" if VARIANT == "cudagraphs" else None
    return torch.compile(function, mode=mode)


def wait():
    if GPU:
        torch.cuda.synchronize()


def trainer(network="conv"):
    encoder, decoder = build(network)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.RMSprop(
        parameters, lr=1e-3, alpha=0.9, eps=1e-7, capturable=GPU and VARIANT != "eager"
    )

    def loss(x):
        eps = torch.randn(len(x), torch_networks.LATENTS.get(network, 2), device=DEVICE)
        log_likelihood, kl = terms_of(network)(encoder, decoder, x, eps)
        return (kl - log_likelihood).mean()

    compiled_loss = compiled(loss)
    update = optimizer.step if VARIANT == "eager" else torch.compile(optimizer.step)

    def train(x):
        optimizer.zero_grad()
        compiled_loss(x).backward()
        update()

    return train


def step(batch, network="conv"):
    train, x = trainer(network), to_device(protocol.float_images(batch))

    def run(n):
        for _ in range(n):
            train(x)
        wait()

    # CUDA graphs are recorded in the second call and replayed from the third on.
    return Timed(run, batch, warm=lambda: run(3))


def epoch(batch, images):
    train, data = trainer(), to_device(protocol.make_images(images))

    def run(n):
        for _ in range(n):
            order = torch.randperm(images, device=DEVICE)
            for i in order[: images // batch * batch].view(-1, batch):
                train(data[i].float() / 255)
        wait()

    return Timed(run, images)


def forward(function, count):
    """Time function(first, last), which treats those images, over all `count` of them."""

    @torch.inference_mode()
    def run(n):
        for _ in range(n):
            for first in range(0, count, AT_ONCE):
                function(first, min(first + AT_ONCE, count))
        wait()

    return Timed(run, count)


def sample(images):
    _, decoder = build()
    decode = compiled(lambda z: torch.sigmoid(decoder(z)))
    result = torch.empty(images, 1, 28, 28, device=DEVICE)

    def draw(first, last):
        result[first:last] = decode(torch.randn(last - first, 2, device=DEVICE))

    return forward(draw, images)


def encode(images):
    encoder, _ = build()
    x, run_encoder = to_device(protocol.float_images(images)), compiled(encoder)
    result = torch.empty(2, images, 2, device=DEVICE)

    def put(first, last):
        result[0, first:last], result[1, first:last] = run_encoder(x[first:last])

    return forward(put, images)


def log_likelihood(images, samples):
    """log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), by blocks of (image, sample) pairs."""
    encoder, decoder = build()
    x = to_device(protocol.float_images(images))

    def log_weights(x, mean, log_var):
        eps = torch.randn_like(mean)
        z = mean + torch.exp(log_var / 2) * eps
        return log_p_x(decoder, z, x) - 0.5 * (z**2 - eps**2 - log_var).sum(1)

    run_weights = compiled(log_weights)

    @torch.inference_mode()
    def estimate(pairs):
        mean, log_var = encoder(x)
        image = torch.arange(pairs, device=DEVICE) // samples
        parts = [run_weights(x[i], mean[i], log_var[i]).clone() for i in image.split(AT_ONCE)]
        return torch.cat(parts)

    def run(n):
        for _ in range(n):
            weights = estimate(images * samples).view(images, samples)
            torch.logsumexp(weights, 1) - np.log(samples)
        wait()

    return Timed(run, images, warm=lambda: [estimate(AT_ONCE) for _ in range(3)])


def check(path, network="conv"):
    weights, images, eps = protocol.load_check(path)
    encoder, decoder = build(network)
    (load if network == "conv" else torch_networks.load)(encoder, decoder, weights)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    x, eps = to_device(images).float() / 255, torch.from_numpy(eps).to(DEVICE)
    with torch.no_grad():
        log_likelihood, kl = terms_of(network)(encoder, decoder, x, eps)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    sizes = (sum(p.numel() for p in module.parameters()) for module in (encoder, decoder))
    return protocol.check_answer(log_likelihood.cpu(), kl.cpu(), *sizes)


def peak():
    """The machine's own rates, as in ours.py."""
    kinds = {"float32": (torch.float32, "highest")}
    if GPU:
        kinds["float32, TF32 allowed"] = (torch.float32, "high")
        kinds["bfloat16"] = (torch.bfloat16, "high")
    rates = {}
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        best = 0.0
        for n in (4096, 8192, 16384) if GPU else (1024, 2048, 4096):
            a = torch.randn(n, n, device=DEVICE).to(dtype)
            seconds = protocol.best(lambda a=a: (torch.mm(a, a), wait()))
            best = max(best, 2 * n**3 / seconds)
        rates[f"matrix product, {name}"] = best
    torch.set_float32_matmul_precision("high")
    x = torch.ones(2**28 if GPU else 2**26, device=DEVICE)
    seconds = protocol.best(lambda: (x.neg_(), wait()))
    return {"flops": rates, "bytes": 2 * x.nbytes / seconds}


def info():
    device = torch.cuda.get_device_name() if GPU else "cpu"
    return {"device": device, "versions": {"torch": torch.__version__}}


def device_peak():
    return torch.cuda.max_memory_allocated() if GPU else None


if __name__ == "__main__":
    VARIANT = sys.argv[1]
    protocol.serve(
        {
            "info": info,
            "check": check,
            "step": step,
            "epoch": epoch,
            "sample": sample,
            "encode": encode,
            "log_likelihood": log_likelihood,
            **({"peak": peak} if VARIANT == "eager" else {}),
        },
        device_peak,
    )
