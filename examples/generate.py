"""Generate text from prompts, several at once, over a paged KV cache in a compiled loop.

    python examples/generate.py "What is the capital of France?" "Write a haiku about rain."
    python examples/generate.py --model path/to/checkpoint --temperature 0.8 --seed 1 < prompts.txt

The prompts are prefilled in one call; then each step decodes one token of every sequence that is
still running. A sequence that ends gives up its blocks and leaves the batch.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from decoder import Decoder
from load import Checkpoint, CheckpointError, load
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from paged_ops import PagedAttentionManager
from paged_ops.manager import Batch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WARMUP_STEPS = 2  # in which the step is compiled


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one sentence."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Token ids int64 [S] from logits float32 [S, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits / self.temperature, -1)
        if self.top_p < 1:
            probabilities = keep_nucleus(probabilities, self.top_p)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)


def keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zero all but the likeliest tokens that reach top_p together (Holtzman et al., 2020)."""
    ordered, tokens = probabilities.sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (before < top_p))


@dataclass
class Timing:
    """Seconds and tokens of a generation."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    warmup_seconds: float = 0.0  # of the first steps, compilation included
    steps: list[tuple[int, float]] = field(default_factory=list)  # (tokens, seconds) of the others
    step_bytes: int = 0  # weights read by a step

    def report(self) -> str:
        lines = [f"prefill  {rate(self.prefill_tokens, self.prefill_seconds)}"]
        if self.steps:
            tokens, seconds = (sum(column) for column in zip(*self.steps, strict=True))
            bandwidth = self.step_bytes * len(self.steps) / seconds / 1e9
            lines.append(f"decode   {rate(tokens, seconds)}, {bandwidth:.1f} GB/s of weights")
        lines.append(f"warm-up  {self.warmup_seconds:.1f} s for the first {WARMUP_STEPS} steps")
        return "\n".join(lines)


def rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:8.1f} tokens/s ({tokens} tokens in {seconds:.2f} s)"


def decode_step(model: Decoder, tokens: Tensor, caches: list[Tensor], batch: Batch) -> Tensor:
    """Logits float32 [S, V] after one new token of each sequence: the step that is compiled."""
    return model(tokens, caches, batch)


def compile_step(device: torch.device) -> Callable[..., Tensor]:
    """The step for this device, for any number of sequences from 2 on and all lengths."""
    if device.type == "cuda":
        return torch.compile(decode_step, fullgraph=True, dynamic=True, mode="reduce-overhead")
    # Frozen weights are repacked for the matrix kernels: a step reads them at twice the speed. A
    # patch, and no option of torch.compile, because Dynamo has to know of it while it traces.
    freeze = torch._inductor.config.patch(freezing=True)
    return freeze(torch.compile(decode_step, fullgraph=True, dynamic=True))


def generate(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    manager: PagedAttentionManager,
    step: Callable[..., Tensor],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    emit: Callable[[int, int | None], None],
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

    Returns:
        How long it took.
    """
    model, device = checkpoint.model, manager.device
    timing = Timing(step_bytes=sum(each.nbytes for each in model.parameters()))
    with torch.no_grad():
        started = time.perf_counter()
        tokens = sampling(prefill(model, prompts, manager))
        generated = tokens.tolist()  # waits for the device
        timing.prefill_seconds = time.perf_counter() - started
        timing.prefill_tokens = sum(map(len, prompts))
        running = list(range(len(prompts)))
        for count in range(1, max_new_tokens + 1):
            kept = settle(running, generated, checkpoint.stop_tokens, count == max_new_tokens, emit)
            for seq_id in set(running) - {running[i] for i in kept}:
                manager.free_sequence(seq_id)
            running = [running[i] for i in kept]
            if not running:
                break
            started = time.perf_counter()
            manager.append(running)
            batch = manager.batch(running, pad_to=2)  # the size 1 would be compiled apart
            inputs = torch.zeros(len(batch.seq_lens), dtype=torch.int64, device=device)
            inputs[: len(kept)] = tokens[kept]
            tokens = sampling(step(model, inputs, manager.caches, batch)[: len(running)])
            generated = tokens.tolist()
            record(timing, count, len(running), time.perf_counter() - started)
    return timing


def prefill(model: Decoder, prompts: list[list[int]], manager: PagedAttentionManager) -> Tensor:
    """Logits float32 [S, V] after the prompts, all in one call."""
    for seq_id, prompt in enumerate(prompts):
        manager.add_sequence(seq_id, len(prompt))
    batch = manager.batch(range(len(prompts)), [len(prompt) for prompt in prompts])
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=manager.device)
    return model(tokens, manager.caches, batch)


def settle(
    running: list[int],
    generated: list[int],
    stop_tokens: frozenset[int],
    last: bool,
    emit: Callable[[int, int | None], None],
) -> list[int]:
    """Emit the new token of each running sequence; return the places of those that go on."""
    kept = []
    for place, (seq_id, token) in enumerate(zip(running, generated, strict=True)):
        if token not in stop_tokens:
            emit(seq_id, token)
        if token in stop_tokens or last:
            emit(seq_id, None)
        else:
            kept.append(place)
    return kept


def record(timing: Timing, count: int, tokens: int, seconds: float) -> None:
    if count <= WARMUP_STEPS:
        timing.warmup_seconds += seconds
    else:
        timing.steps.append((tokens, seconds))


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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("prompts", nargs="*", help="if none: the lines of the standard input")
    parser.add_argument("--model", type=Path, help="a checkpoint folder or GGUF file; SmolLM2-135M")
    parser.add_argument(
        "--raw", action="store_true", help="do not put prompts in the chat template"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a cache block")
    parser.add_argument("--num-blocks", type=int, help="of the cache; default: as many as needed")
    return parser.parse_args(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "block_size", "num_blocks"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be 0 or more, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {arguments.device} cannot be used: {reason}") from None


def read_prompts(given: list[str], lines: Iterable[str]) -> list[str]:
    prompts = given or [line.rstrip("\n") for line in lines if line.strip()]
    if not prompts:
        raise UsageError("no prompt, neither as an argument nor on the standard input")
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("a prompt is empty")
    return prompts


def encode(checkpoint: Checkpoint, prompts: list[str], raw: bool) -> list[list[int]]:
    """Token ids of each prompt, in the model's chat template if it has one."""
    if raw or checkpoint.render_chat is None:
        return [checkpoint.tokenizer.encode(prompt).ids for prompt in prompts]
    texts = [checkpoint.render_chat(prompt) for prompt in prompts]
    return [checkpoint.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


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
    return PagedAttentionManager(
        len(prompts),
        config.num_kv_heads,
        config.head_size,
        arguments.block_size,
        num_blocks,
        arguments.device,
        DTYPES[arguments.dtype],
        config.num_layers,
        max_seq_len=max(lengths),
    )


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    prompts = read_prompts(arguments.prompts, sys.stdin)
    device = torch.device(arguments.device)
    checkpoint = load(arguments.model, DTYPES[arguments.dtype], device)
    tokens = encode(checkpoint, prompts, arguments.raw)
    if not all(tokens):
        raise UsageError("a prompt has no tokens")
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
    )
    print(f"\n{timing.report()}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except (UsageError, CheckpointError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
