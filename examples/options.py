"""What the commands have in common: options with their checks, and errors of one sentence."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch
from decoder import Decoder

from paged_ops import PagedAttentionManager

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Value = TypeVar("Value")


class UsageError(ValueError):
    """What the user asked for cannot be done; the message is one sentence."""


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the usage before it, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def run(
        self, command: Callable[[argparse.Namespace], None], arguments: list[str] | None
    ) -> None:
        """Call a command with its arguments; its UsageErrors end like errors of these."""
        try:
            command(self.parse_args(arguments))
        except UsageError as error:
            self.error(str(error))


def checked(
    parse: Callable[[str], Value], expected: str, holds: Callable[[Value], bool]
) -> Callable[[str], Value]:
    """A type for add_argument, which says what was expected where a value is none or not so."""

    def convert(text: str) -> Value:
        try:
            value = parse(text)
            if holds(value):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text}")

    return convert


def integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    return checked(int, f"an integer from {low} to {high}", lambda value: low <= value <= high)


def usable_device(text: str) -> torch.device:
    """A CPU or a GPU that is here."""
    if text.partition(":")[0] not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text}")
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {reason}") from None


def add_common_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Where and in what the model computes, the blocks of its cache, and the seed."""
    parser.add_argument(
        "--device",
        type=usable_device,
        default=DEFAULT_DEVICE,
        help="cpu or cuda (default: cuda where there is a GPU)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=dtype,
        help="of weights and cache (default: %(default)s)",
    )
    parser.add_argument(
        "--block-size",
        type=integer(1),
        default=16,
        help="tokens of a cache block (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, 2**64 - 1),
        default=0,
        help="of all random choices (default: %(default)s)",
    )


def manager_of(
    model: Decoder,
    arguments: argparse.Namespace,
    num_sequences: int,
    num_blocks: int,
    *,
    max_seq_len: int,
    watermark: int = 0,
) -> PagedAttentionManager:
    """A cache for the model, with the options above; a UsageError says why there cannot be one."""
    config = model.config
    try:
        return PagedAttentionManager(
            num_sequences,
            config.num_kv_heads,
            config.head_size,
            arguments.block_size,
            num_blocks,
            arguments.device,
            DTYPES[arguments.dtype],
            config.num_layers,
            max_seq_len=max_seq_len,
            watermark=watermark,
        )
    except (ValueError, RuntimeError, MemoryError) as error:  # a size, or no room
        reason = str(error).splitlines()[0]
        raise UsageError(f"the cache cannot be made: {reason}") from None
