"""Generate text from prompts, several at once, over a paged KV cache in a compiled loop.

    python examples/generate.py "What is the capital of France?" "Write a haiku about rain."
    python examples/generate.py --model path/to/checkpoint --temperature 0.8 --seed 1 < prompts.txt
    python examples/generate.py --device cuda --model random:llama-3-8b "Any words."

The prompts are prefilled in one call; then each step decodes one token of every sequence that is
still running. A sequence that ends gives up its blocks and leaves the batch.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TextIO

import torch
from decode_loop import (
    Chunk,
    DecodeLoop,
    Sampling,
    Step,
    compile_step,
    decode_step,
)
from decoder import Decoder
from load import Checkpoint, CheckpointError
from options import DTYPES, Parser, UsageError, add_common_options, checked, integer, manager_of
from random_models import MODELS, load_model
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from paged_ops import PagedAttentionManager


@dataclass
class Timing:
    """Seconds and tokens of a generation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    warmup_seconds: float = 0.0  # in which steps were compiled and captured
    decode_tokens: int = 0  # without those of the warm-up
    decode_seconds: float = 0.0
    steps: int = 0
    step_bytes: int = 0  # weights read by a step

    def report(self) -> str:
        lines = [f"prefill  {rate(self.prefill_tokens, self.prefill_seconds)}"]
        if self.steps:
            bandwidth = self.step_bytes * self.steps / self.decode_seconds / 1e9
            decode = rate(self.decode_tokens, self.decode_seconds)
            lines.append(f"decode   {decode}, {bandwidth:.1f} GB/s of weights")
        lines.append(f"warm-up  {self.warmup_seconds:.1f} s, to prepare the steps")
        return "\n".join(lines)

    def record(self, chunk: Chunk | None, num_tokens: int, seconds: float, warmup: bool) -> None:
        """Count a turn of the loop, in which a chunk has arrived or none."""
        if warmup or chunk is None:
            self.warmup_seconds += seconds
        else:
            self.decode_tokens += num_tokens
            self.decode_seconds += seconds
            self.steps += chunk.steps


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:8.1f} tokens/s ({tokens} tokens in {seconds:.2f} s)"


def generate(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    manager: PagedAttentionManager,
    step: Step,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    emit: Callable[[int, int | None], None],
    check_every: int = 1,
) -> Timing:
    """Continue each prompt until a stop token or max_new_tokens.

    Args:
        checkpoint: the model, its tokenizer and stop tokens.
        prompts: token ids of each; sequence i of the manager is prompt i.
        manager: holds no sequences, and blocks for all prompts and their new tokens.
        step: decode_step, compiled or not.
        max_new_tokens: for each prompt, at least 1.
        sampling: how tokens are chosen.
        emit: called with the prompt's index and each token as it is decoded, then with None.
        check_every: how many tokens are decoded before the host looks for stop tokens. What a
            sequence decodes after one is dropped.

    Returns:
        How long it took.
    """
    timing = Timing(step_bytes=sum(each.nbytes for each in checkpoint.model.parameters()))
    texts = Texts(manager, len(prompts), max_new_tokens, checkpoint.stop_tokens, emit)
    # A GPU works on the next chunk while the host looks at the tokens of the one before.
    ahead = 1 if manager.device.type == "cuda" else 0
    with torch.no_grad():
        loop = DecodeLoop(checkpoint.model, manager, step, sampling, check_every)
        started = time.perf_counter()
        logits = prefill(checkpoint.model, prompts, manager)
        texts.take(loop.begin(range(len(prompts)), logits))
        timing.prefill_seconds = time.perf_counter() - started
        timing.prefill_tokens = sum(map(len, prompts))
        launched: deque[Chunk] = deque()
        left = max_new_tokens - 1
        while texts.running:
            started = time.perf_counter()
            chunk, num_tokens, warmup = None, 0, False
            if left > 0:
                launched.append(loop.launch(texts.running, min(check_every, left)))
                warmup = launched[-1].prepared
                left -= launched[-1].steps
            if len(launched) > ahead or left == 0:
                chunk = launched.popleft()
                num_tokens = texts.take(chunk)
            timing.record(chunk, num_tokens, time.perf_counter() - started, warmup)
    return timing


def prefill(model: Decoder, prompts: list[list[int]], manager: PagedAttentionManager) -> Tensor:
    """Logits float32 [S, V] after the prompts, all in one call."""
    for seq_id, prompt in enumerate(prompts):
        manager.add_sequence(seq_id, len(prompt))
    batch = manager.batch(range(len(prompts)), [len(prompt) for prompt in prompts])
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=manager.device)
    return model(tokens, manager.caches, batch)


class Texts:
    """What has come of each prompt: which are still running, and how many tokens they have."""

    def __init__(
        self,
        manager: PagedAttentionManager,
        num_prompts: int,
        max_new_tokens: int,
        stop_tokens: frozenset[int],
        emit: Callable[[int, int | None], None],
    ) -> None:
        self.manager = manager
        self.running = list(range(num_prompts))
        self.lengths = [0] * num_prompts
        self.max_new_tokens = max_new_tokens
        self.stop_tokens = stop_tokens
        self.emit = emit

    def take(self, chunk: Chunk) -> int:
        """Emit the tokens of a chunk, which it waits for; returns how many there were."""
        before = sum(self.lengths)
        for tokens in chunk.wait():
            for seq_id, token in zip(chunk.seq_ids, tokens, strict=True):
                if seq_id in self.running:
                    self._add(seq_id, token)
        return sum(self.lengths) - before

    def _add(self, seq_id: int, token: int) -> None:
        stops = token in self.stop_tokens
        if not stops:
            self.emit(seq_id, token)
            self.lengths[seq_id] += 1
        if stops or self.lengths[seq_id] == self.max_new_tokens:
            self.emit(seq_id, None)
            self.running = [each for each in self.running if each != seq_id]
            self.manager.free_sequence(seq_id)


class Printer:
    """Prints texts as they are decoded, in the order of the prompts.

    The first text that has not ended is streamed; those after it wait for their turn.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: list[str]) -> None:
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.streams = [DecodeStream(skip_special_tokens=True) for _ in prompts]
        self.waiting = [""] * len(prompts)  # decoded and not yet printed
        self.ended = [False] * len(prompts)
        self.turn = -1
        self.next_turn()

    def __call__(self, prompt: int, token: int | None) -> None:
        if token is None:
            self.ended[prompt] = True
        else:
            self.waiting[prompt] += self.streams[prompt].step(self.tokenizer, token) or ""
        while self.turn < len(self.prompts):
            print(self.waiting[self.turn], end="", flush=True)
            self.waiting[self.turn] = ""
            if not self.ended[self.turn]:
                break
            print()
            self.next_turn()

    def next_turn(self) -> None:
        self.turn += 1
        if len(self.prompts) > 1 and self.turn < len(self.prompts):
            title = self.prompts[self.turn].strip().splitlines()[0]
            print(f"\n> {title}\n" if self.turn else f"> {title}\n")


def make_parser() -> Parser:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "prompts", nargs="*", help="texts to continue; if none: the lines of the standard input"
    )
    parser.add_argument("--model", help=f"{MODELS} (default: SmolLM2-135M)")
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompts themselves (default: in the model's chat template)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=integer(1),
        default=128,
        help="after which a text ends, if no stop token came before (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=checked(float, "0 or more", lambda value: 0 <= value < inf),
        default=0.0,
        help="how evenly tokens are drawn; 0: the likeliest one is taken (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=checked(float, "above 0 and at most 1", lambda value: 0 < value <= 1),
        default=1.0,
        help="draw only from the likeliest tokens, which have this probability together "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--check-every",
        type=integer(1),
        help="tokens that are decoded before the host looks for stop tokens "
        "(default: 8 on a GPU, else 1)",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the decode step, which takes a minute (default: yes)",
    )
    add_common_options(parser, dtype="bfloat16")
    parser.add_argument(
        "--num-blocks", type=integer(1), help="of the cache (default: as many as needed)"
    )
    return parser


def read_prompts(given: list[str], lines: TextIO) -> list[str]:
    if not given and lines.isatty():
        print("type a prompt on each line, and end with Ctrl-D", file=sys.stderr)
    try:
        prompts = given or [line.rstrip("\n") for line in lines if line.strip()]
        "".join(prompts).encode()  # arguments, and stdin in some locales, hold bytes as they came
    except UnicodeError as error:
        raise UsageError(f"a prompt must be UTF-8 text, got: {error}") from None
    if not prompts:
        raise UsageError("no prompt, neither as an argument nor on the standard input")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty")
    return prompts


def encode(checkpoint: Checkpoint, prompts: list[str], raw: bool) -> list[list[int]]:
    """Token ids of each prompt, in the model's chat template if it has one."""
    templated = not raw and checkpoint.render_chat is not None
    texts = [checkpoint.render_chat(prompt) for prompt in prompts] if templated else prompts
    encode_one = checkpoint.tokenizer.encode
    tokens = [encode_one(text, add_special_tokens=not templated).ids for text in texts]
    vocab_size = checkpoint.model.config.vocab_size
    largest = max(itertools.chain.from_iterable(tokens), default=0)
    if largest >= vocab_size:
        raise CheckpointError(f"the tokenizer has token {largest}, the model only {vocab_size}")
    if not all(tokens):
        raise UsageError("a prompt has no tokens")
    return tokens


def make_manager(
    arguments: argparse.Namespace, model: Decoder, prompts: list[list[int]]
) -> PagedAttentionManager:
    """A cache that holds all prompts and their new tokens, or an error that says why not."""
    config = model.config
    lengths = [len(prompt) + arguments.max_new_tokens for prompt in prompts]
    if max(lengths) > config.max_positions:
        raise UsageError(
            f"a prompt of {max(map(len, prompts))} tokens and {arguments.max_new_tokens} new ones "
            f"are more than the model's context of {config.max_positions}"
        )
    needed = sum(-(-length // arguments.block_size) for length in lengths)
    num_blocks = arguments.num_blocks or needed
    if needed > num_blocks:
        raise UsageError(
            f"the prompts and their new tokens need {needed} blocks of {arguments.block_size} "
            f"tokens, but the cache has {num_blocks} (--num-blocks)"
        )
    # On a CPU a batch of one has a row of padding.
    num_sequences = max(len(prompts), 2)
    return manager_of(model, arguments, num_sequences, num_blocks, max_seq_len=max(lengths))


def run(arguments: argparse.Namespace) -> None:
    prompts, device = read_prompts(arguments.prompts, sys.stdin), arguments.device
    checkpoint = load_model(arguments.model, DTYPES[arguments.dtype], device)
    tokens = encode(checkpoint, prompts, arguments.raw)
    manager = make_manager(arguments, checkpoint.model, tokens)
    if arguments.compile:
        print("compiling the decode step, which takes a minute at first", file=sys.stderr)
    timing = generate(
        checkpoint,
        tokens,
        manager,
        compile_step(device) if arguments.compile else decode_step,
        max_new_tokens=arguments.max_new_tokens,
        sampling=Sampling(
            arguments.temperature,
            arguments.top_p,
            torch.Generator(device).manual_seed(arguments.seed),
        ),
        emit=Printer(checkpoint.tokenizer, prompts),
        check_every=arguments.check_every or (8 if device.type == "cuda" else 1),
    )
    print(f"\n{timing.report()}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    make_parser().run(run, arguments)


if __name__ == "__main__":
    main()
