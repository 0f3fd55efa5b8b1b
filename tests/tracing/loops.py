"""Sampling loops as users write them: those that a table follows, and those that are traced rightly or refused.

Only the decorators belong to the tests.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import deque, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from cases import MLP, Mixing, conv, either, plain, start, traces, traces_as
from torch import Tensor, nn
from tqdm import tqdm

betas = torch.linspace(0.05, 0.4, 8)
alphas_bar = torch.cumprod(1 - betas, 0)
sigmas = torch.tensor([4.0, 2.5, 1.5, 0.8, 0.4, 0.1, 0.0])
Output = namedtuple("Output", ["samples", "steps"])


@traces()
@torch.no_grad()
def euler_maruyama(model, n=3):
    device = next(model.parameters()).device
    model.eval()
    ts = torch.linspace(1, 0, 8, device=device)
    x = torch.randn(n, 2, device=device)
    for i in range(len(ts) - 1):
        dt = ts[i] - ts[i + 1]
        beta = 0.1 + 3.9 * ts[i]
        drift = 0.5 * beta * x + beta * model(x, ts[i].expand(n))
        x = x + drift * dt + torch.sqrt(beta * dt) * torch.randn_like(x)
    return x.detach().cpu()


@traces()
@torch.no_grad()
def augmented_assignments(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x += 0.1 * model(x, torch.full((3,), 1 - i / 6))
        x *= 0.9
        x -= 0.05 * x
        x += 0.3 * torch.randn_like(x)
    x /= 2
    return x


@traces(Mixing)
@torch.no_grad()
def in_place_methods(net):
    x = torch.randn(2, 1, 4, 4)
    for i in range(8):
        f = net(x, torch.ones(2) * i)
        x.mul_(0.95).add_(f, alpha=0.2).add_(torch.randn_like(x), alpha=0.1).sub_(f.mul_(0.5), alpha=0.01)
    return x


@traces(Mixing)
@torch.no_grad()
def out_arguments(net):
    x = torch.randn(3, 2)
    noise, buffer = torch.empty_like(x), torch.empty_like(x)
    for i in range(6):
        torch.randn(x.shape, out=noise)
        torch.add(x, net(x, i / 6), alpha=0.2, out=buffer)
        torch.add(buffer, noise, alpha=0.3, out=x)
    return x


@traces()
@torch.no_grad()
def list_of_states(model, n=3):
    xs = [torch.randn(n, 2)]
    for t in torch.linspace(1, 0.1, 6):
        x = xs[-1]
        xs.append(x + 0.2 * model(x, t.repeat(n)) + 0.1 * torch.randn(n, 2))
    return xs


@traces()
@torch.no_grad()
def list_of_the_same_tensor(model):  # the copies forgotten: each entry is the last state
    x = torch.randn(3, 2)
    history = []
    for i in range(6):
        x += 0.2 * model(x, i / 6)
        history.append(x)
    return history


@traces(Mixing)
@torch.no_grad()
def stacked_trajectory(net, steps=5):
    x = torch.randn(2, 1, 4, 4)
    trajectory = [x.clone()]
    for i in range(steps):
        x += net(x, 1 - i / steps) / steps
        trajectory.append(x.clone())
    return torch.stack(trajectory, dim=1)


@traces(double=False)  # its own memory is fp32
@torch.no_grad()
def trajectory_in_a_tensor(model, n=3, steps=6):
    out = torch.zeros(steps + 1, n, 2)
    out[0] = torch.randn(n, 2)
    for k in range(steps):
        out[k + 1] = 0.9 * out[k] + 0.2 * model(out[k], k / steps)
    return out


@traces()
@torch.no_grad()
def dict_result(model):
    x, predictions = torch.randn(3, 2), []
    for i in reversed(range(6)):
        eps = model(x, torch.full((3,), i, dtype=torch.long))
        predictions.append(x - 0.5 * eps)
        x = x - 0.1 * eps
    return {"samples": x, "predictions": predictions, "steps": 6, "name": "ode"}


@traces()
@torch.no_grad()
def tuple_with_times(model):
    times = torch.linspace(1, 0, 7)
    x = torch.randn(3, 2)
    for t, s in zip(times[:-1], times[1:], strict=True):  # noqa: RUF007
        x = torch.lerp(x, model(x, t), float(t - s))
    return x, times


@traces()
@torch.no_grad()
def named_tuple(model):
    x = torch.randn(3, 2)
    for i in range(5):
        x = torch.addcmul(x, model(x, i / 5), torch.tensor(0.2), value=-1)
    return Output(samples=x, steps=5)


@traces(Mixing, lambda dtype, seed: {"progress": True})
@torch.no_grad()
def progress_bar(net, progress=False):
    img = torch.randn((2, 1, 4, 4))
    bar = tqdm(reversed(range(8)), total=8, desc="sampling", disable=not progress)
    for i in bar:
        b = torch.full((2,), i, dtype=torch.long)
        img = (img - betas[i] / (1 - alphas_bar[i]).sqrt() * net(img, b)) / (1 - betas[i]).sqrt()
        if i > 0:
            img += betas[i].sqrt() * torch.randn_like(img)
        bar.set_postfix(step=i, shape=tuple(img.shape))
    return img


def _euler(model, x, sigmas, callback=None):
    s_in = x.new_ones([x.shape[0]])
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * s_in)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "denoised": denoised})
        d = (x - denoised) / sigmas[i]
        x = x + d * (sigmas[i + 1] - sigmas[i])
    return x


@traces(Mixing, start(3, 2, scale=4.0), state="x")
@torch.no_grad()
def callback_that_stores(model, x):
    previews = []
    x = _euler(model, x, sigmas, callback=lambda d: previews.append(d["denoised"].clone()))
    return x, previews


@traces()
def inference_mode(model, batch_size=3):
    with torch.inference_mode():
        x = torch.randn(batch_size, 2)
        for i in range(6):
            x = x + 0.2 * model(x, torch.tensor([i / 6])) + 0.1 * torch.randn(batch_size, 2)
        return x


def _low_precision(model, dtype):
    x = torch.randn(3, 2).to(dtype)
    for i in range(6):
        x = x + 0.2 * model(x, torch.full((3,), i / 6, dtype=dtype)) + 0.1 * torch.randn_like(x)
    return x


@traces(lambda: MLP().half(), dtype=torch.float16, double=False)
@torch.no_grad()
def half_states(model):
    return _low_precision(model, torch.half)


@traces(lambda: MLP().bfloat16(), lambda dtype, seed: {"weight_dtype": dtype}, dtype=torch.bfloat16, double=False)
@torch.no_grad()
def bfloat16_states(model, weight_dtype):
    return _low_precision(model, weight_dtype).float()


@traces(lambda: MLP().half(), dtype=torch.float16, double=False)
@torch.no_grad()
def float_state_half_network(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x = x + 0.2 * model(x.half(), torch.tensor(i / 6).half()).float()
    return x


@traces(arguments=lambda dtype, seed: {"device": torch.device("cpu"), "dtype": dtype})
@torch.no_grad()
def device_and_dtype(model, device="cuda", dtype=torch.float32):
    model = model.to(device=device, dtype=dtype)
    x = torch.randn((3, 2), device=device, dtype=dtype)
    for t in torch.arange(6, 0, -1, device=device):
        x = x.to(device) + 0.1 * model(x, (t / 6).to(dtype).expand(3)).to(x)
    return x.to("cpu")


class Diffusion:
    """A class with its schedule in self."""

    def __init__(self, steps=6, eta=1.0):
        self.steps, self.eta = steps, eta
        self.beta = torch.linspace(0.05, 0.4, steps)
        self.alpha_hat = torch.cumprod(1.0 - self.beta, dim=0)

    def predict(self, model, x, i):
        return (x - torch.sqrt(1 - self.alpha_hat[i]) * model(x, i)) / torch.sqrt(self.alpha_hat[i])

    @torch.no_grad()
    def __call__(self, model, n=3):
        x = torch.randn((n, 2))
        for i in reversed(range(1, self.steps)):
            x0 = self.predict(model, x, i).clamp(-1, 1)
            x = self.alpha_hat[i - 1].sqrt() * x0 + self.eta * (1 - self.alpha_hat[i - 1]).sqrt() * torch.randn_like(x)
        self.last_steps = self.steps
        return x


traces_as("class_with_schedule", lambda net: functools.partial(Diffusion(), net), made=True)
traces_as("partial_of_a_loop", functools.partial(euler_maruyama, n=2))
traces_as("lambda_loop", lambda model, n: Diffusion(eta=0.5)(model, n), arguments=lambda dtype, seed: {"n": 4})


class GaussianDiffusion(nn.Module):
    """A module that holds the network and its schedule as buffers."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("alphas_cumprod", alphas_bar.clone())
        self.num_timesteps = len(alphas_bar)

    def extract(self, a, t, shape):
        return a.gather(-1, t).reshape(t.shape[0], *((1,) * (len(shape) - 1)))

    def p_sample(self, x, i):
        t = torch.full((x.shape[0],), i, dtype=torch.long)
        a = self.extract(self.alphas_cumprod, t, x.shape)
        x_start = ((x - (1 - a).sqrt() * self.model(x, t)) / a.sqrt()).clamp_(-1.0, 1.0)
        noise = torch.randn_like(x) if i > 0 else 0.0
        return a.sqrt() * x_start + (1 - a).sqrt() * 0.5 * noise

    @torch.inference_mode()
    def sample(self, shape=(2, 1, 4, 4)):
        img = torch.randn(shape)
        for t in reversed(range(self.num_timesteps)):
            img = self.p_sample(img, t)
        return (img + 1) * 0.5


@traces(Mixing, made=True)
def bound_method_with_buffers(net):
    return GaussianDiffusion(net).sample


@traces(arguments=lambda dtype, seed: {"generator": torch.Generator().manual_seed(seed)})
@torch.no_grad()
def generator_argument(model, generator=None):
    x = torch.randn((3, 2), generator=generator)
    for i in range(6):
        x = 0.9 * x + 0.2 * model(x, i / 6) + 0.1 * torch.randn(x.shape, generator=generator)
    return x


@traces(arguments=lambda dtype, seed: {"generators": [torch.Generator().manual_seed(10 * seed + i) for i in range(3)]})
@torch.no_grad()
def generator_for_each_sample(model, generators):
    def draw():
        return torch.cat([torch.randn((1, 2), generator=g) for g in generators], dim=0)

    x = draw()
    for i in range(6):
        x = 0.9 * x + 0.2 * model(x, i / 6) + 0.1 * draw()
    return x


@traces(Mixing, double=False)  # empty() is fp32
@torch.no_grad()
def draws_in_other_ways(net):
    x = torch.empty(3, 2).normal_()
    for i in range(5):
        x = 0.9 * x + 0.2 * net(x, i / 5)
        x = (
            x
            + 0.1 * torch.normal(0.0, 1.0, size=(3, 2))
            + torch.normal(torch.zeros(3, 2), 0.1)
            + x.new_empty(2).normal_(0, 0.1)
        )
    return x


@traces()
@torch.no_grad()
def torch_distributions(model):
    prior = torch.distributions.Normal(torch.zeros(2), 2 * torch.ones(2))
    x = prior.sample((3,))
    for i in range(6):
        x = x + 0.2 * model(x, i / 6) + 0.1 * torch.distributions.Normal(0.0, 1.0).sample(x.shape)
    return x


@traces(plain)
@torch.no_grad()
def time_column_in_a_sequential(net, n=3):
    x = torch.randn(n, 2)
    for t in torch.linspace(1, 0.2, 5):
        t = t * torch.ones(n, 1)
        x = x + 0.2 * net(torch.cat((x, t), dim=-1))
    return x


@traces()
@torch.no_grad()
def times_of_many_forms(model):
    x = torch.randn(3, 2)
    for t in (torch.ones(3, 1), torch.tensor(0.8), 0.6, torch.tensor([2]), torch.tensor(1), np.float64(0.1)):
        x = x + 0.2 * model(x, t)
    return x


@traces(conv)
@torch.no_grad()
def time_as_a_channel(net):
    x = torch.randn(2, 1, 4, 4)
    for i in range(5):
        t_plane = torch.full_like(x[:, :1], 1 - i / 5)
        x = x + 0.2 * net(torch.cat([x, t_plane], dim=1)) + 0.1 * torch.randn_like(x)
    return x


@traces(arguments=lambda dtype, seed: {"labels": torch.tensor([1, 2, 3]), "w": 2.0})
@torch.no_grad()
def guidance_in_one_batch(model, labels, w=3.0):
    x = torch.randn(len(labels), 2)
    y = torch.cat([torch.zeros_like(labels), labels])
    for i in range(6):
        uncond, cond = model(torch.cat([x] * 2), torch.full((2 * len(x),), i / 6), y).chunk(2)
        x = x + 0.1 * (uncond + w * (cond - uncond))
    return x


@traces(arguments=lambda dtype, seed: {"y": torch.tensor([3, 0, 1])})
@torch.no_grad()
def guidance_in_two_calls(model, y=None, cfg_scale=3):
    x = torch.randn(3, 2)
    for i in range(5):
        t = (torch.ones(3) * i).long()
        noise = model(x, t, y)
        if cfg_scale > 0:
            noise = torch.lerp(model(x, t, None), noise, cfg_scale)
        x = 0.9 * x - 0.1 * noise + 0.1 * torch.randn_like(x)
    return x


@traces(made=True)
def condition_in_a_closure(net):
    labels = torch.tensor([0, 1, 2])

    def denoise(x, t):
        return net(x, t, y=labels)

    @torch.no_grad()
    def sample():
        x = torch.randn(3, 2)
        for k in range(6):
            x = x + 0.1 * denoise(x, k / 6)
        return x

    return sample


class Scheduler:
    """Keeps the last output, and is reset by set_timesteps."""

    def set_timesteps(self, n):
        self.timesteps = np.linspace(0, 7, n).round()[::-1].copy().astype(np.int64)
        self.last = None

    def step(self, f, t, x):
        h = 1 / len(self.timesteps)
        x = x + h * (1.5 * f - 0.5 * self.last) if self.last is not None else x + h * f
        self.last = f
        return {"prev_sample": x, "denoised": x + (t / 8) * f}


class Pipeline:
    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler

    @torch.no_grad()
    def __call__(self, batch_size=2, num_inference_steps=6):
        image = torch.randn((batch_size, 1, 4, 4))
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            image = self.scheduler.step(self.unet(image, torch.tensor([int(t)])), t, image)["prev_sample"]
        image = (image / 2 + 0.5).clamp(0, 1)
        return image.cpu().permute(0, 2, 3, 1)


traces_as("pipeline_with_scheduler", lambda net: Pipeline(net, Scheduler()), network=Mixing, made=True)


@traces(Mixing, start(2, 1, 4, 4, scale=4.0, name="latents"), state="latents")
@torch.no_grad()
def initial_state_argument(net, latents):
    s_in = latents.new_ones([latents.shape[0]])
    x = latents
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):  # noqa: RUF007
        d = (x - net(x, sigma.log() * s_in)) / sigma
        dt = sigma_next - sigma
        if sigma_next == 0:
            x = x + d * dt
        else:  # Heun
            x_2 = x + d * dt
            d_2 = (x_2 - net(x_2, sigma_next.log() * s_in)) / sigma_next
            x = x + (d + d_2) / 2 * dt
    return x


def _image(dtype, seed):
    known = start(1, 1, 4, 4, name="image")(dtype, 5)
    return {**known, "mask": torch.arange(16).reshape(1, 1, 4, 4) % 3 == 0}


@traces(Mixing, _image)
@torch.no_grad()
def inpainting_with_a_mask(net, image, mask):
    x = torch.randn(2, 1, 4, 4)
    for i in reversed(range(6)):
        noisy = alphas_bar[i].sqrt() * image + (1 - alphas_bar[i]).sqrt() * torch.randn_like(x)
        x = torch.where(mask, noisy, x)
        x = x + 0.2 * net(x, i)
    return torch.where(mask, image, x)


@traces(Mixing)
@torch.no_grad()
def inpainting_by_product(net):
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    x = torch.randn(2, 1, 4, 4)
    for i in range(6):
        x = x + 0.2 * net(x, i / 6)
        x = x * (1 - mask) + (0.5 + 0.1 * torch.randn_like(x)) * mask
    return x.masked_fill(mask.bool(), 0.5)


@traces()
@torch.no_grad()
def index_assignment(model):
    x = torch.randn(3, 2)
    for i in range(6):
        x[:, 0] = 0.25
        x = x + 0.2 * model(x, i / 6)
        x[..., 1] += 0.1
    x[:, 0] = 0.25
    return x


@traces()
@torch.no_grad()
def final_clamp_and_scale(model):
    x = 2 * torch.randn(3, 2)
    for i in range(5):
        x = x + 0.2 * model(x, i / 5)
    return x.clamp_(-1, 1).add_(1).div_(2)


@traces(Mixing)
@torch.no_grad()
def channels_last_and_back(net):
    x = torch.randn(2, 4, 4, 1)
    for i in range(5):
        f = net(x.permute(0, 3, 1, 2).contiguous(), i / 5).permute(0, 2, 3, 1)
        x = x + 0.2 * f + 0.1 * torch.randn(2, 16).view(2, 4, 4, 1)
    return x.squeeze(-1).flatten(1)


@traces()
@torch.no_grad()
def while_loop(model, h=0.15):
    t, x = 1.0, torch.randn(3, 2)
    while t > 1e-3:
        step = min(h, t)
        x = x + step * model(x, t) + math.sqrt(step) * torch.randn(3, 2)
        t -= step
    return x


@traces(Mixing, start(3, 2, scale=4.0), state="x")
@torch.no_grad()
def multistep_with_a_deque(model, x):
    history = deque(maxlen=3)
    for s, s_next in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        history.appendleft((x - model(x, s)) / s)
        weights = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}[len(history)]
        x = x + (s_next - s) * sum(w * d for w, d in zip(weights, history, strict=True))
    return x


@traces()
@torch.no_grad()
def numpy_schedule(model):
    t = np.geomspace(1.0, 0.01, 7)
    x = torch.randn(3, 2)
    for i in range(6):
        x = (
            x
            + (t[i] - t[i + 1]) * model(x, torch.from_numpy(t[i : i + 1]).float())
            + np.sqrt(t[i + 1]) * 0.1 * torch.randn(3, 2)
        )
    return x


@traces()
@torch.no_grad()
def recursion(model):
    def back(x, i):
        return x if i == 0 else back(x + 0.2 * model(x, i / 6), i - 1)

    return back(torch.randn(3, 2), 6)


@traces()
@torch.no_grad()
def states_from_a_generator(model):
    def states(x):
        for i in range(5):
            x = x + 0.2 * model(x, i / 5) + 0.1 * torch.randn_like(x)
            yield i, x

    return [x for i, x in states(torch.randn(3, 2)) if i % 2 == 0]


@traces(Mixing)
@torch.no_grad()
def predictor_corrector(score, snr_step=0.05):
    x = torch.randn(2, 1, 4, 4)
    for t in torch.linspace(1, 0.2, 4):
        for _ in range(2):
            x_mean = x + snr_step * score(x, t)
            x = x_mean + math.sqrt(2 * snr_step) * torch.randn_like(x)
        x_mean = x + 0.1 * score(x, t)
        x = x_mean + 0.3 * torch.randn_like(x)
    return x_mean


# Traced rightly or refused, but never wrong ---------------------------------------------------------------------------


@either()
@torch.no_grad()
def centred_batch(model):
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.2 * model(x, i / 5)
        x = x - x.mean(0, keepdim=True)
    return x


@either(Mixing)
@torch.no_grad()
def matrix_product(net):
    rotation = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    x = torch.randn(3, 2)
    for i in range(5):
        x = (x + 0.2 * net(x, i / 5)) @ rotation.to(x)
    return x


@either(Mixing)
@torch.no_grad()
def flips_and_rolls(net):
    x = torch.randn(2, 1, 4, 4)
    for i in range(5):
        x = x + 0.1 * net(x, i / 5) + 0.1 * net(x.flip(-1), i / 5).flip(-1)
        x = x.roll(1, 0)
    return x


@either()
@torch.no_grad()
def one_batch_after_the_other(model):
    batches = []
    for _ in range(2):
        x = torch.randn(3, 2)
        for i in range(3):
            x = x + 0.2 * model(x, i / 3) + 0.1 * torch.randn_like(x)
        batches.append(x)
    return torch.cat(batches)


@either()
@torch.no_grad()
def asks_for_nan(model):
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.2 * model(x, i / 5)
        if torch.isnan(x).any():
            raise ValueError("diverged")
    return x


@either()
@torch.no_grad()
def unused_norm(model):
    x = torch.randn(3, 2)
    for i in range(5):
        f = model(x, i / 5)
        size = f.norm(dim=-1).mean()
        x = x + 0.2 * f
    return x if size is not None else None


@either()
@torch.no_grad()
def deep_copies(model):
    x, best = torch.randn(3, 2), None
    for i in range(5):
        x += 0.2 * model(x, i / 5)
        best = copy.deepcopy(x)
        x = F.hardtanh(x, -2, 2)
    return best


@either(lambda: MLP(), dtype=torch.bfloat16)
@torch.no_grad()
def autocast(model):
    x = torch.randn(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for i in range(5):
            x = x + 0.2 * model(x, i / 5)
    return x


@either()
@torch.no_grad()
def yields_its_states(model):
    x = torch.randn(3, 2)
    for i in range(5):
        x = x + 0.2 * model(x, i / 5)
        yield x


@either(arguments=start(3, 2), state="x")
@torch.no_grad()
def changes_its_argument(model, x):
    for i in range(5):
        x.add_(model(x, i / 5), alpha=0.2)
    return x


class SelfConditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP()

    def forward(self, x: Tensor, t: object, last: Tensor) -> Tensor:
        return self.inner(x + 0.5 * last, t)


@traces(SelfConditioned)
@torch.no_grad()
def self_conditioning(model):
    x = torch.randn(3, 2)
    x0 = torch.zeros_like(x)
    for i in range(6):
        x0 = model(x, i / 6, x0)
        x = 0.8 * x + 0.2 * x0
    return x
