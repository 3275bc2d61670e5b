"""NOT IN THE PAPER: what the game costs, in texts a second, FLOP and GB.

    text             one person as one sex, forward and backward
    sdpa             faircon with torch's fused attention instead of "eager"
    straight         the straightforward way, for comparison: one person at a time, both
                     whole texts, prompt and all, logits at every position
    matrix rate      GFLOP/s of a 1024 x 1024 matrix product: what the hardware gives

    python -m beyond.cost                                       # the bundled model
    python -m beyond.cost --model smollm2 --batch-size 20
"""
import multiprocessing
import sys

import numpy
import torch
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import adult
from beyond import people, runs
from beyond.load import load_model
from faircon import Game, LanguageModel, Options


class Straight(LanguageModel):
    """LanguageModel that reads every text as it stands."""

    def __call__(self, prefix, questions):
        found = []
        for texts in questions:
            for text in texts:
                x = torch.cat([prefix, self.embed[text]])[None].to(self.dtype)
                logits = self.model(inputs_embeds=x, use_cache=False).logits
                found.append(logits[0, -1].float())
        found = torch.stack(found)                                       # (B K, V)
        return found.view(len(questions), -1, found.shape[-1]).transpose(0, 1)


def timed(step, seconds=5.):
    """As many steps as fit in `seconds`, after a first -> .mean, .times (seconds)."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=seconds)


def matrix_rate(device, dtype, n=1024):
    """GFLOP/s of an n x n matrix product, the best of many."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(timed(lambda: a @ a, .2).times) / 1e9


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


def cost_of_steps(args, way, batch_size):
    """phi's and theta's step, theta given one prompt -> {what: number}.

    share: theta's GFLOP/s in percent of the matrix rate.
    """
    model = load_model(args.model, args.dtype, args.device)
    data = people.load(args.data)
    if way == "straight":
        model.__class__ = Straight
    if way == "sdpa":
        model.model.set_attn_implementation("sdpa")
    rng = numpy.random.default_rng(0)
    some = adult.sample(data.train, 4 * batch_size, None, rng)
    options = Options(batch_size=batch_size, prompt_length=args.prompt_length,
                      dropout=0.)
    game = Game(model, some, options, 0)
    batches = game.batches(10 ** 4)

    def phi():
        game.adversary.step([game.questions[i] for i in batches.pop()])

    def theta():
        game.theta_step(batches.pop())

    seconds_phi, seconds_theta = timed(phi).mean, timed(theta).mean
    with FlopCounterMode(display=False) as counter:
        theta()
    rate = matrix_rate(model.device, model.dtype)
    gflop = counter.get_total_flops() / 1e9
    texts = 2 * batch_size
    return {"phi": texts / seconds_phi, "theta": texts / seconds_theta,
            "share": 100 * gflop / seconds_theta / rate, "gb": peak_gb()}


def alone(work, *given):
    """A function's result, in a process of its own: a peak of memory never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def main(argv=None):
    parser = runs.Parser(prog="beyond.cost", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", metavar="PATH", help="as for train.py")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=runs.count, default=10)
    parser.add_argument("--prompt-length", type=runs.count, default=100)
    args = parser.parse_args(argv)
    print(f"{args.model}, {args.dtype}; a text is one person as one sex, with gradients"
          "\n\nway        batch  prompt   phi texts/s   theta texts/s   of matrix rate"
          "   peak GB")
    B = args.batch_size
    ways = [("straight", 1), ("faircon", 1), ("faircon", B)]
    if args.model != "tiny":                                # GPT-Neo has none
        ways.append(("sdpa", B))
    for way, size in ways:
        c = alone(cost_of_steps, args, way, size)
        print(f"{way:<10} {size:>5} {args.prompt_length:>7} {c['phi']:13.2f} "
              f"{c['theta']:15.2f} {c['share']:14.0f} % {c['gb']:9.2f}", flush=True)


if __name__ == "__main__":
    with runs.one_sentence("beyond.cost"):
        main()
