"""Serve requests that arrive over time, continuously batched over one paged KV cache.

    python examples/serve_loop.py --requests 64 --shared 512 --num-blocks 200 --plot blocks.png

In each step every running request computes one chunk of tokens, all in one mixed call: one token if
it is decoding, more while its prompt is being prefilled. Waiting requests are admitted while there
is room, and begin with what the prefix cache has of their prompts. When blocks run out, the request
that was admitted last makes room: it is computed again later, or swapped to host memory and back.

Iteration-level scheduling: Yu et al., "Orca: A Distributed Serving System for Transformer-Based
Generative Models" (OSDI 2022); chunked prefill: Agrawal et al., "SARATHI" (2023).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from decoder import Config, Decoder
from options import DTYPES, Parser, UsageError, add_common_options, checked, integer, manager_of
from random_models import MODELS, load_model

from paged_ops import Batch, OutOfBlocks, PagedAttentionManager

# Of the requests, tokens at the least and at the most: their own part of the prompt, and new ones.
OWN_TOKENS, NEW_TOKENS = (4, 64), (8, 48)


@dataclass(eq=False)
class Request:
    """A prompt to be continued greedily; `tokens` grows by what is generated."""

    seq_id: int
    prompt: list[int]
    max_new_tokens: int
    arrival: int = 0  # the step before which it arrives
    tokens: list[int] = field(default_factory=list)
    swapped: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


@dataclass
class BlockUse:
    """What the blocks of the cache do after a step."""

    held: int
    cached: int  # by the prefix cache alone
    free: int


@dataclass
class Report:
    """What a server has done."""

    steps: int = 0
    computed_tokens: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    preemptions: int = 0
    seconds: float = 0.0
    tokens_asked: int = 0  # of the prefix cache
    tokens_found: int = 0
    block_use: list[BlockUse] = field(default_factory=list)

    def __str__(self) -> str:
        peak = max((use.held for use in self.block_use), default=0)
        num_blocks = sum(vars(self.block_use[0]).values()) if self.block_use else 0
        return "\n".join(
            (
                f"throughput   {self.new_tokens / self.seconds:.1f} new tokens/s "
                f"({self.new_tokens} in {self.steps} steps, {self.seconds:.2f} s)",
                f"computed     {self.computed_tokens} tokens (prompts have {self.prompt_tokens})",
                f"prefix hits  {self.tokens_found / max(self.tokens_asked, 1):.1%} of the tokens "
                "of admitted requests",
                f"blocks       {peak} of {num_blocks} held at the peak, "
                f"{self.preemptions} preemptions",
            )
        )


class Server:
    """Schedules requests onto the sequences and blocks of a manager.

    Args:
        model: what continues them.
        manager: without sequences. Its num_sequences limits how many have been begun, its
            watermark how full the cache may be when one more is.
        tokens_per_step: at most so many tokens are computed in a step.
        swap: whether a preempted request is swapped to host memory, not computed again.
    """

    def __init__(
        self,
        model: Decoder,
        manager: PagedAttentionManager,
        *,
        tokens_per_step: int = 256,
        swap: bool = False,
    ) -> None:
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        self.model, self.manager = model, manager
        self.tokens_per_step, self.swap = tokens_per_step, swap
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order of their admission
        self.report = Report()

    def submit(self, request: Request) -> None:
        """Let a request wait for its turn; ValueError if it could not even run alone."""
        length = len(request.prompt) + request.max_new_tokens
        blocks = self.manager.blocks
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {request.seq_id} must have a prompt and ask for new tokens")
        if blocks.blocks_for(length) > blocks.num_blocks or length > self.manager.max_seq_len:
            raise ValueError(
                f"request {request.seq_id} must fit the cache of {blocks.num_blocks} blocks and "
                f"max_seq_len={self.manager.max_seq_len}, got {length} tokens"
            )
        self.report.prompt_tokens += len(request.prompt)
        self.waiting.append(request)

    def run(self, requests: Iterable[Request]) -> Report:
        """Serve requests, each from the step of its arrival on, until all have ended."""
        coming = deque(sorted(requests, key=lambda request: request.arrival))
        started = time.perf_counter()
        now = 0
        with torch.no_grad():
            while coming or self.waiting or self.running:
                while coming and coming[0].arrival <= now:
                    self.submit(coming.popleft())
                if self.waiting or self.running:
                    self.step()
                now += 1
        self.report.seconds += time.perf_counter() - started
        prefix = self.manager.blocks.state()["prefix"]
        self.report.tokens_asked = prefix["tokens_asked"]
        self.report.tokens_found = prefix["tokens_found"]
        return self.report

    def step(self) -> None:
        """Compute one chunk of every request that is running or can be admitted."""
        chunks = self.schedule()
        batch = self.grow(chunks)
        new: list[int] = []
        for request, number in chunks.items():
            end = self.computed(request)
            new += request.tokens[end - number : end]
        tokens = torch.tensor(new, device=self.manager.device)
        logits = self.model(tokens, self.manager.caches, batch)
        self.settle(list(chunks), logits.argmax(-1).tolist())
        self.report.steps += 1
        self.report.computed_tokens += len(tokens)
        blocks = self.manager.blocks
        free, cached = blocks.num_free_blocks, blocks.num_evictable_blocks
        self.report.block_use.append(BlockUse(blocks.num_blocks - free - cached, cached, free))

    def computed(self, request: Request) -> int:
        """How many of its tokens have their keys and values in the cache, or are about to."""
        return self.manager.blocks.length(request.seq_id)

    def schedule(self) -> dict[Request, int]:
        """How many tokens of which requests are next: those that decode come before prompts."""
        budget = self.tokens_per_step
        chunks: dict[Request, int] = {}
        for request in sorted(self.running, key=lambda each: self.pending(each) > 1):
            chunks[request] = min(self.pending(request), budget)
            budget -= chunks[request]
        while budget > 0 and self.waiting and self.admit(self.waiting[0]):
            request = self.waiting.popleft()
            self.running.append(request)
            chunks[request] = min(self.pending(request), budget)
            budget -= chunks[request]
        return {request: number for request, number in chunks.items() if number > 0}

    def pending(self, request: Request) -> int:
        return len(request.tokens) - self.computed(request)

    def admit(self, request: Request) -> bool:
        """Begin a request, or one that was preempted again, if there is room for its tokens."""
        manager, seq_id = self.manager, request.seq_id
        if request.swapped:
            if not manager.can_allocate(len(request.tokens)):
                return False
            manager.swap_in(seq_id)
            request.swapped = False
            return True
        # At least one token is left to compute: the next one comes from its logits.
        known = request.tokens[:-1]
        if not manager.can_allocate(len(request.tokens) - manager.blocks.lookup(known)):
            return False
        if seq_id not in manager.blocks:
            if len(manager.rows) == manager.num_sequences:
                return False
            manager.add_sequence(seq_id, 0)
        manager.share(seq_id, known)
        return True

    def grow(self, chunks: dict[Request, int]) -> Batch:
        """Take the blocks of the chunks, if need be from the requests that were admitted last."""
        while True:
            seq_ids = [request.seq_id for request in chunks]
            numbers = list(chunks.values())
            try:
                if max(numbers) == 1:
                    return self.manager.step(seq_ids)
                self.manager.append(seq_ids, numbers)
                return self.manager.batch(seq_ids, numbers)
            except OutOfBlocks:
                chunks.pop(self.preempt(), None)

    def preempt(self) -> Request:
        request = self.running.pop()
        if self.swap:
            self.manager.swap_out(request.seq_id)
            request.swapped = True
        else:
            self.manager.preempt(request.seq_id)
        self.waiting.appendleft(request)
        self.report.preemptions += 1
        return request

    def settle(self, requests: list[Request], next_tokens: list[int]) -> None:
        """Publish what was computed, and end the requests that have all their tokens."""
        for request, token in zip(requests, next_tokens, strict=True):
            computed = self.computed(request)
            self.manager.blocks.publish(request.seq_id, request.tokens[:computed])
            if computed < len(request.tokens):
                continue  # in the middle of its prompt
            request.tokens.append(token)
            self.report.new_tokens += 1
            if len(request.new_tokens) == request.max_new_tokens:
                self.manager.free_sequence(request.seq_id)
                self.running.remove(request)


def random_requests(arguments: argparse.Namespace, vocab_size: int) -> list[Request]:
    """Ragged prompts after one system prompt, arriving at random times."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def text(length: int) -> list[int]:
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    shared, last = text(arguments.shared), int(arguments.requests / arguments.rate)
    return [
        Request(
            seq_id,
            shared + text(number(*OWN_TOKENS)),
            number(*NEW_TOKENS),
            arrival=number(0, last),
        )
        for seq_id in range(arguments.requests)
    ]


def longest_request(options: argparse.Namespace, config: Config) -> int:
    """Tokens that a request may have; refuses what would be too long for the model or the cache."""
    own = OWN_TOKENS[1] + NEW_TOKENS[1]
    longest = options.shared + own
    if longest > config.max_positions:
        raise UsageError(
            f"argument --shared: must be at most {config.max_positions - own} for this model, "
            f"which has {config.max_positions} positions, got {options.shared}"
        )
    needed = -(-longest // options.block_size)
    if options.num_blocks < needed:
        raise UsageError(
            f"argument --num-blocks: must be at least {needed} for requests of {longest} tokens, "
            f"got {options.num_blocks}"
        )
    return longest


def plot(report: Report, path: Path) -> None:
    """Block use over time, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    rows = {name: [getattr(use, name) for use in report.block_use] for name in ("held", "cached")}
    axes.stackplot(range(report.steps), *rows.values(), labels=["held by requests", "cached"])
    axes.set(xlabel="step", ylabel="blocks", xlim=(0, report.steps - 1))
    axes.set_ylim(0, sum(vars(report.block_use[0]).values()))
    axes.legend(loc="lower center")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # the folder, or the format
        raise UsageError(f"argument --plot: {path} cannot be written: {error}") from None


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:tiny", help=f"{MODELS} (default: %(default)s)")
    parser.add_argument(
        "--requests",
        type=integer(1),
        default=64,
        help="how many arrive in all (default: %(default)s)",
    )
    parser.add_argument(
        "--rate",
        type=checked(float, "at least 0.001", lambda value: value >= 0.001),
        default=2.0,
        help="requests that arrive in a step (default: %(default)s)",
    )
    parser.add_argument(
        "--shared",
        type=integer(0),
        default=512,
        help="tokens of the system prompt, with which all requests begin (default: %(default)s)",
    )
    add_common_options(parser, dtype="float32")
    parser.add_argument(
        "--num-blocks",
        type=integer(1),
        default=400,
        help="of the cache (default: %(default)s)",
    )
    parser.add_argument(
        "--watermark",
        type=integer(0),
        default=4,
        help="blocks that a new request leaves for those that run (default: %(default)s)",
    )
    parser.add_argument(
        "--max-running",
        type=integer(1),
        default=32,
        help="requests that have been begun, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens-per-step",
        type=integer(1),
        default=256,
        help="that are computed, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--swap",
        action="store_true",
        help="swap preempted requests to host memory (default: compute them again)",
    )
    parser.add_argument(
        "--plot", type=Path, help="save an image of the block use here (default: none is made)"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; run: pip install matplotlib")
    model = load_model(options.model, DTYPES[options.dtype], options.device).model
    manager = manager_of(
        model,
        options,
        min(options.max_running, options.requests),
        options.num_blocks,
        max_seq_len=longest_request(options, model.config),
        watermark=options.watermark,
    )
    server = Server(model, manager, tokens_per_step=options.tokens_per_step, swap=options.swap)
    print(server.run(random_requests(options, model.config.vocab_size)))
    if options.plot:
        plot(server.report, options.plot)


def main(arguments: list[str] | None = None) -> None:
    make_parser().run(run, arguments)


if __name__ == "__main__":
    main()
