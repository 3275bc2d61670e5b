"""NOT IN THE PAPER: what the game costs, in seconds, FLOP and GB.

    text             one person as one sex, forward and backward
    matrix rate      GFLOP/s of a 1024 x 1024 matrix product: what the hardware gives

    python -m beyond.cost                                       # the embedded model
    python -m beyond.cost --model DIR --batch-size 8 --prompt-length 10
"""
import argparse
import sys
import time

import numpy
import torch
from torch.utils.flop_counter import FlopCounterMode

import adult
import faircon
import lora
from adult import InputError
from beyond import runs
from beyond.fast import load_model
from beyond.options import COUNT


def matrix_rate(device, dtype, n=1024, seconds=.2):
    """GFLOP/s of an n x n matrix product, the best of many."""
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0.
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        a @ a
        synchronise(device)
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began) / 1e9)
    return best


def synchronise(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_gb():
    """The most memory this process ever held; NaN where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource
    except ImportError:                                          # Windows
        return float("nan")
    unit = 2 ** 30 if sys.platform == "darwin" else 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def timed(step, device, seconds):
    """Seconds of one `step`, mean over as many as fit in `seconds`, after a first."""
    step()
    synchronise(device)
    began, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - began < seconds:
        step()
        synchronise(device)
        n += 1
    return (time.perf_counter() - began) / n


def flop_of(step):
    """GFLOP of the matrix products of one `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def cost_of_steps(args, batch_size, prompt_length, seconds=5.):
    """phi's and theta's step -> {"phi": texts/s, "theta": ..., "share": ..., "gb": ...}

    theta's step is behind one prompt here; in the default game it is behind two.
    share: theta's GFLOP/s in percent of the matrix rate.
    """
    model, _ = load_model(args.model, args.dtype, args.device)
    data = adult.load(args.data)
    people = adult.sample(data.train, 4 * batch_size, 0., numpy.random.default_rng(0))
    lora.inject(model.model, args.rank)
    options = faircon.Options(batch_size=batch_size, prompt_length=prompt_length,
                              labelled=False, renew=False)
    game = faircon.Game(model, people, options, seed=0)
    adversary, turn = game.adversaries[0], [0]

    def batch():
        turn[0] = (turn[0] + 1) % 4
        return range(turn[0] * batch_size, (turn[0] + 1) * batch_size)

    def phi():
        adversary.step([game.questions[i] for i in batch()])

    def theta():
        game.theta_step(batch())

    with lora.merged(model.model):
        seconds_phi = timed(phi, model.device, seconds)
    seconds_theta = timed(theta, model.device, seconds)
    gflop = flop_of(theta)
    rate = matrix_rate(model.device, model.embed.dtype)
    texts = 2 * batch_size
    return {"phi": texts / seconds_phi, "theta": texts / seconds_theta,
            "share": 100 * gflop / seconds_theta / rate, "gb": peak_gb()}


def cost_of_shots(args, shots, seconds=5.):
    """People a second, both twins, behind labelled people -> {"people":, "gb":}"""
    model, _ = load_model(args.model, args.dtype, args.device)
    data, rng = adult.load(args.data), numpy.random.default_rng(0)
    questions = model.questions(adult.sample(data.test, 48, 0., rng))
    prompt = adult.few_shot(data.train, shots, 0., rng)

    def evaluate():
        model.predict(questions, context=prompt)

    return {"people": 48 / timed(evaluate, model.device, seconds), "gb": peak_gb()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(adult.TINY))
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rank", type=COUNT, default=32)
    parser.add_argument("--batch-size", type=COUNT, default=10)
    parser.add_argument("--prompt-length", type=COUNT, default=280)
    parser.add_argument("--shots", type=COUNT, nargs="*", default=[4, 16])
    args = parser.parse_args()
    print(f"{args.model}, {args.dtype}; a text is one person as one sex, with gradients"
          "\n\nbatch  prompt   phi texts/s   theta texts/s   of matrix rate   peak GB")
    B, L = args.batch_size, args.prompt_length
    lines = [(1, L), (max(1, B // 2), L), (B, L), (B, 2 * L)]
    for batch_size, length in sorted(set(lines)):
        # A process for each line: a peak of memory never goes down. Two, so that it is
        # a pool's worker and not this one.
        c, = runs.run_jobs(cost_of_steps, [(args, batch_size, length)], 2)
        print(f"{batch_size:>5} {length:>7} {c['phi']:13.2f} {c['theta']:15.2f} "
              f"{c['share']:14.0f} % {c['gb']:9.2f}", flush=True)
    print("\nshots   people/s, both twins   peak GB")
    for shots in args.shots:
        c, = runs.run_jobs(cost_of_shots, [(args, shots)], 2)
        print(f"{shots:>5} {c['people']:23.2f} {c['gb']:9.2f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as problem:
        sys.exit(f"beyond.cost: {problem}")
