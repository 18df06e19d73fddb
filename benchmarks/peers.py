"""Time training of peers beside ours: same machine, game, network, frame-skip and batch, taking turns.

    .venv-peers/bin/python -m benchmarks.peers --rounds 5 --seconds 20 --json peers.json

`ours` is the training of `a3c.py` with its defaults. `sb3-16` and `sb3-64` are A2C of Stable-Baselines3 with 16 games
(its default) and with 64. `pytorch` is the A2C below with 64, written as most are. `tuned` is the same with what we
found to make it faster. `pytorch-bf16` and `tuned-bf16` are these two with PyTorch's automatic mixed precision, which
only a GPU, or a CPU with AMX or AVX512-BF16, makes fast. All run on the CPU, or on a GPU by `--device cuda`, which
needs PyTorch's and TensorFlow's builds for it. Where a peer can be set up in several ways
(`VARIANTS`), each is timed first and the fastest takes part. A step is one action in one game, 3 emulator frames.
Start-up and warm-up are left out, for everyone. `requirements-peers.txt` says how to install the peers. Flags of
`a3c.py` may follow, for ours: `--compute_dtype=float32` where it would take bfloat16, which is printed.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import gymnasium
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_atari_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack
from torch import nn

from benchmarks.common import CORES, LIMIT, REPOSITORY, ask, processor, spread, train

FRAMESKIP, STICKY, STEPS, DISCOUNT = 3, 0.25, 5, 0.99  # as our Breakout-v0
WARM_UP = 3.0  # seconds
DEVICES = {"cpu": "cpu", "cuda": "gpu"}  # PyTorch's name -> ours
OURS = """
import sys, a3c, json, network, settings
config = a3c.parse_config(sys.argv[1:])
dtype = network.choose_dtype(config.compute_dtype, config.device.upper())
print(json.dumps({"tensorflow": settings.versions()["tensorflow"], "ours computes in": dtype, "flags": sys.argv[1:]}))
"""

# Every way worth trying to set up a peer; PyTorch's threads are within one operation, the games' are always CORES.
THREADS = sorted({1, min(2, CORES), CORES})
VARIANTS = {
    "sb3-16": [{"num_envs": 16, "vec_env": v, "threads": t} for v in ("dummy", "subproc") for t in THREADS],
    "sb3-64": [{"num_envs": 64, "vec_env": v, "threads": t} for v in ("dummy", "subproc") for t in THREADS],
    **{
        peer: [{"num_envs": 64, "vec_env": v, "threads": t} for v in ("envpool", "ale") for t in THREADS]
        for peer in ("pytorch", "tuned", "pytorch-bf16", "tuned-bf16")
    },
}


class Timer:
    """Counts steps between updates, once WARM_UP seconds have passed since the first."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.begin = self.start = self.rate = None

    def finished(self, steps: int) -> bool:
        """Call between two updates with all steps so far; when it returns True, `rate` is their number per second."""
        now = time.perf_counter()
        self.begin = self.begin or now
        if self.start is None and now >= self.begin + WARM_UP:
            self.start = (now, steps)
        elif self.start and now - self.start[0] >= self.seconds:
            self.rate = (steps - self.start[1]) / (now - self.start[0])
        return self.rate is not None


class Layers(BaseFeaturesExtractor):
    """Our layers up to the heads: 84 -> 21 -> 11 (with SAME's number of pixels padded), 64 * 11 * 11 -> 256."""

    def __init__(self, observation_space: gymnasium.Space):
        super().__init__(observation_space, features_dim=256)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(64 * 11 * 11, 256),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return features [B, 256] of x [B, 4, 84, 84] float32."""
        return self.layers(x)


def train_sb3(timer: Timer, device: str, num_envs: int, vec_env: str) -> None:
    """Train Stable-Baselines3's A2C until the timer has finished.

    With its usual Atari pipeline (no-op starts, a lost life ends an episode, maximum of two frames, clipped rewards,
    four frames) and its default hyperparameters, but for our entropy weight.
    """

    class StopWatch(BaseCallback):
        def _on_rollout_start(self):
            timer.finished(self.num_timesteps)

        def _on_step(self):
            return timer.rate is None

    envs = make_atari_env(
        "BreakoutNoFrameskip-v4",
        num_envs,
        env_kwargs={"repeat_action_probability": STICKY},
        wrapper_kwargs={"frame_skip": FRAMESKIP},
        vec_env_cls={"dummy": DummyVecEnv, "subproc": SubprocVecEnv}[vec_env],
        vec_env_kwargs={"start_method": "fork"} if vec_env == "subproc" else None,  # else each imports PyTorch
    )
    layers = {"features_extractor_class": Layers}
    changed = {"n_steps": STEPS, "ent_coef": 0.01, "policy_kwargs": layers}
    A2C("CnnPolicy", VecFrameStack(envs, 4), device=device, **changed).learn(10**9, callback=StopWatch())


def make_envs(num_envs: int, vec_env: str) -> gymnasium.vector.VectorEnv:
    """Return native Breakouts, observations [B, 4, 84, 84] uint8, rewards clipped."""
    both = {"num_threads": CORES, "repeat_action_probability": STICKY, "use_fire_reset": False}
    if vec_env == "ale":  # what our own training plays
        same_step = gymnasium.vector.AutoresetMode.SAME_STEP
        own = {"frameskip": FRAMESKIP, "maxpool": False, "noop_max": 0, "autoreset_mode": same_step}
        return AtariVectorEnv("breakout", num_envs, **own, **both)
    import envpool  # here, because not every platform has it

    own = {"frame_skip": FRAMESKIP, "noop_max": 1, "reward_clip": True}  # it cannot turn off the max of two frames
    return envpool.make_gymnasium("Breakout-v5", num_envs=num_envs, **own, **both)


class ActorCritic(nn.Module):
    """Our network, in the given memory layout of images, its layers in bfloat16 if so asked."""

    def __init__(self, envs: gymnasium.vector.VectorEnv, layout: torch.memory_format, bfloat16: bool):
        super().__init__()
        self.layout, self.bfloat16 = layout, bfloat16
        self.layers = Layers(envs.single_observation_space).to(memory_format=layout)
        self.policy = nn.Linear(256, int(envs.single_action_space.n))
        self.value = nn.Linear(256, 1)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits [B, A] and values [B] of frames [B, 4, 84, 84] uint8."""
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=self.bfloat16):
            x = self.layers(frames.to(torch.float32, memory_format=self.layout).div_(255))
            return self.policy(x).float(), self.value(x).squeeze(1).float()


def train_pytorch(timer: Timer, device: str, num_envs: int, vec_env: str, tuned: bool, bfloat16: bool) -> None:
    """Train a synchronous A2C until the timer has finished.

    The plain one acts without gradients and passes the whole batch through the network once more to learn. The tuned
    one keeps the graph of the passes that chose the actions, as we do, and the channels-last layout.
    """
    envs = make_envs(num_envs, vec_env)
    action_type = envs.single_action_space.dtype
    network = ActorCritic(envs, torch.channels_last if tuned else torch.contiguous_format, bfloat16).to(device)
    optimizer = torch.optim.RMSprop(network.parameters(), lr=7e-4, alpha=0.99, eps=1e-5)
    frames, _ = envs.reset()
    frames = torch.from_numpy(frames).to(device)
    for update in itertools.count():
        if timer.finished(update * STEPS * num_envs):
            return
        seen, outputs, actions, rewards, continues = [], [], [], [], []
        for _ in range(STEPS):
            with torch.set_grad_enabled(tuned):
                logit, value = network(frames)
            action = torch.multinomial(logit.detach().softmax(1), 1)
            seen.append(frames)
            frames, reward, terminated, truncated, _ = envs.step(action.squeeze(1).cpu().numpy().astype(action_type))
            frames = torch.from_numpy(frames).to(device)
            outputs.append((logit, value))
            actions.append(action)
            rewards.append(torch.from_numpy(reward.astype(np.float32)).to(device))
            continues.append(torch.from_numpy(~(terminated | truncated)).to(device))

        with torch.no_grad():
            following, returns = network(frames)[1], []
            for reward, go_on in zip(reversed(rewards), reversed(continues), strict=True):
                following = reward + DISCOUNT * following * go_on
                returns.append(following)
        if tuned:
            logits, values = (torch.cat(parts) for parts in zip(*outputs, strict=True))
        else:
            logits, values = network(torch.cat(seen))
        advantage = torch.cat(returns[::-1]) - values
        log_policy = logits.log_softmax(1)
        log_prob = log_policy.gather(1, torch.cat(actions)).squeeze(1)
        entropy = -(log_policy.exp() * log_policy).sum(1).mean()
        loss = -(log_prob * advantage.detach()).mean() + 0.5 * advantage.square().mean() - 0.01 * entropy
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()


# Measuring.


def run_child(peer: str, seconds: float, device: str, threads: int, **variant) -> None:
    """Train one peer in this process and print its steps per second."""
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # as TensorFlow does
    timer = Timer(seconds)
    if peer.startswith("sb3"):
        train_sb3(timer, device, **variant)
    else:
        train_pytorch(timer, device, tuned="tuned" in peer, bfloat16="bf16" in peer, **variant)
    print(json.dumps(timer.rate))


def measure_peer(name: str, variant: dict, seconds: float, device: str) -> float:
    """Return the steps per second of a peer, in a process of its own."""
    job = json.dumps({"peer": name, "seconds": seconds, "device": device, **variant})
    return ask([sys.executable, "-m", "benchmarks.peers", "--child", job], limit=seconds + LIMIT)


def machine() -> dict:
    """Return what the figures depend on, besides our own versions."""
    packages = ("torch", "stable-baselines3", "envpool", "ale-py", "gymnasium", "numpy", "opencv-python-headless")
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {
        "cpu": processor(),
        "cores": CORES,
        "load_average_before": round(os.getloadavg()[0], 2),  # well under 1, or the figures mean little
        "python": platform.python_version(),
        **{name: installed.get(name) for name in packages},
    }


def choose_variants(peers: list[str], seconds: float, device: str) -> dict[str, dict]:
    """Time every variant of each peer for a few seconds; return the fastest of each."""
    chosen = {}
    for peer in peers:
        variants, rates = VARIANTS[peer], []
        for variant in variants:
            try:
                rates.append(measure_peer(peer, variant, seconds, device))
                print(f"  {peer:12} {rates[-1]:7,.0f} steps/s  {variant}", flush=True)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                rates.append(0.0)
                print(f"  {peer:12} skipped  {variant}: {str(error).splitlines()[-1]}", flush=True)
        if not any(rates):
            raise RuntimeError(f"{peer}: no variant runs; the reasons are above")
        chosen[peer] = variants[rates.index(max(rates))]
    return chosen


def main() -> None:
    """Run the command line."""
    own = REPOSITORY / ".venv" / "bin" / "python"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--peers", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="all, if not given")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where all networks live (%(default)s)")
    parser.add_argument("--python", default=str(own) if own.exists() else sys.executable, help="runs ours")
    parser.add_argument("--rounds", type=int, default=5, help="each times ours, then every peer")
    parser.add_argument("--seconds", type=float, default=20.0, help="per measurement")
    parser.add_argument("--json", help="write everything to this file, after every round")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.child:
        return run_child(**json.loads(args.child))
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds and --seconds must be above 0")
    if args.device == "cuda" and not torch.cuda.is_available():  # Stable-Baselines3 would take the CPU
        parser.error("--device cuda: this PyTorch sees no GPU. Its build for CUDA is installed by: pip install torch")

    flags = [f"--device={DEVICES[args.device]}", *flags]
    hardware = {**machine(), "device": args.device, **ask([args.python, "-c", OURS, *flags])}
    print(", ".join(f"{name} {value}" for name, value in hardware.items()))
    print("Choosing the fastest variant of each peer:")
    chosen = choose_variants(args.peers, max(3.0, args.seconds / 4), args.device)
    rates = {name: [] for name in ("ours", *chosen)}
    for number in range(1, args.rounds + 1):
        for name, values in rates.items():
            if name == "ours":
                rate = train(flags, args.seconds, python=args.python)
            else:
                rate = measure_peer(name, chosen[name], args.seconds, args.device)
            values.append(rate)
            print(f"round {number} of {args.rounds}  {name:12} {rate:7,.0f} steps/s", flush=True)
        ratios = {peer: [a / b for a, b in zip(rates["ours"], rates[peer], strict=True)] for peer in chosen}
        if args.json:
            result = {"machine": hardware, "variants": chosen, "steps_per_second": rates, "ours_over_peer": ratios}
            result["medians"] = {name: statistics.median(values) for name, values in rates.items()}
            result["median_ratios"] = {name: statistics.median(values) for name, values in ratios.items()}
            pathlib.Path(args.json).write_text(json.dumps({"seconds": args.seconds, **result}, indent=2) + "\n")

    print(f"\nmedian (min - max) of {args.rounds} rounds of {args.seconds:g} s")
    print(f"{'':12}  {'agent steps/s':24}  ours is faster by")
    print(f"{'ours':12}  {spread(rates['ours'], ',.0f'):24}")
    for peer in chosen:
        print(f"{peer:12}  {spread(rates[peer], ',.0f'):24}  {spread(ratios[peer], '.2f')}  {chosen[peer]}")


if __name__ == "__main__":
    main()
