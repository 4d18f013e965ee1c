"""examples/serve_loop.py: each request is answered as if it were alone."""

from __future__ import annotations

import re

import pytest
import torch
from decoder import Decoder
from managers import manager_for
from random_models import SHAPES, random_decoder
from serve_loop import Request, Server, main, make_parser, random_requests

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Decoder:
    return random_decoder(SHAPES["tiny"], torch.float32, CPU)


def requests(*options: str) -> list[Request]:
    return random_requests(make_parser().parse_args(list(options)), vocab_size=512)


def alone(model: Decoder, request: Request) -> list[int]:
    """The prompt in one call, then a token at a time, in a cache of its own."""
    manager = manager_for(model, 32)
    manager.add_sequence(0, len(request.prompt))
    inputs, batch = request.prompt, manager.batch([0], len(request.prompt))
    output: list[int] = []
    while len(output) < request.max_new_tokens:
        logits = model(torch.tensor(inputs), manager.caches, batch)
        output.append(int(logits.argmax()))
        inputs = output[-1:]
        manager.append(0)
        batch = manager.batch([0])
    return output


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    with torch.no_grad():
        return [alone(model, request) for request in requests()]


@pytest.mark.parametrize(
    ("num_blocks", "options", "preempted"),
    [
        (400, {}, False),
        (50, {}, True),
        (50, {"swap": True}, True),
        (42, {"tokens_per_step": 40}, True),
    ],
    ids=["room", "recompute", "swap", "tight"],
)
def test_outputs_equal_those_of_each_alone(model, expected, num_blocks, options, preempted):
    """64 requests with a system prompt of 512 tokens."""
    served = requests()
    manager = manager_for(model, 32, num_blocks, watermark=2)
    server = Server(model, manager, **options)
    report = server.run(served)
    assert [request.new_tokens for request in served] == expected
    assert (report.preemptions > 0) == preempted
    assert manager.num_free_blocks == num_blocks
    assert manager.rows == {}
    assert len({len(request.prompt) for request in served}) > 1
    manager.blocks.check()


def test_shared_prompt_is_computed_once(model):
    served = requests()
    report = Server(model, manager_for(model, 32, 400)).run(served)
    decoded = sum(request.max_new_tokens - 1 for request in served)
    own = sum(len(request.prompt) - 512 for request in served)
    computed_of_shared = report.computed_tokens - decoded - own
    assert report.preemptions == 0
    assert computed_of_shared <= 0.2 * 512 * len(served)
    assert report.tokens_found / report.tokens_asked > 0.8


def test_prompts_are_prefilled_beside_decoding_requests(model):
    """One step computes a chunk of the long prompt and a token of the other."""
    manager = manager_for(model, 32)
    server = Server(model, manager, tokens_per_step=8)
    first, second = Request(0, [1, 2, 3], 10), Request(1, list(range(50)), 2)
    server.submit(first)
    server.step()
    server.submit(second)
    server.step()
    assert (len(first.new_tokens), manager.blocks.length(1)) == (2, 7)


def test_request_that_needs_every_block_runs(model):
    """Though it was preempted, and a watermark is kept back from new requests."""
    manager = manager_for(model, 2, 4, watermark=2)
    served = [Request(0, [1] * 16, 48), Request(1, [2] * 15, 49)]
    wanted = [alone(model, request) for request in served]
    report = Server(model, manager).run(served)
    assert report.preemptions > 0
    assert [request.new_tokens for request in served] == wanted


def test_more_requests_than_rows(model):
    served = [Request(i, [i + 1, 7], 3 + i) for i in range(6)]
    wanted = [alone(model, request) for request in served]
    Server(model, manager_for(model, 2)).run(served)
    assert [request.new_tokens for request in served] == wanted


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(3, [1] * 50, 15), "request 3 must fit the cache of 4 blocks .* got 65 tokens"),
        (Request(3, [], 1), "request 3 must have a prompt"),
        (Request(3, [1], 0), "ask for new tokens"),
    ],
)
def test_refused(model, request_, message):
    with pytest.raises(ValueError, match=message):
        Server(model, manager_for(model, 2, 4)).submit(request_)
    with pytest.raises(ValueError, match="tokens_per_step must be at least 1, got 0"):
        Server(model, manager_for(model, 2, 4), tokens_per_step=0)


COMMAND = ["--device=cpu", "--requests=4", "--shared=32"]


def test_command(capsys):
    main(COMMAND)
    report = capsys.readouterr().out
    assert "prefix hits" in report
    assert re.search(r"computed +\d+ tokens \(prompts have 273\)", report)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    image = tmp_path / "blocks.png"
    main([*COMMAND, f"--plot={image}"])
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--rate 0", "argument --rate: must be at least 0.001, got 0"),
        ("--rate nan", "argument --rate: must be at least 0.001, got nan"),
        ("--shared -1", "argument --shared: must be an integer from 0 to 2147483647, got -1"),
        ("--shared 5000", "argument --shared: must be at most 3984 for this model"),
        ("--requests 0", "argument --requests: must be an integer from 1"),
        ("--model nowhere", "nowhere does not exist"),
        ("--model random:huge", "there are no shapes named huge"),
        ("--device foo", "argument --device: must be cpu or cuda, got foo"),
        ("--device cpu:x", "argument --device: cpu:x cannot be used"),
        ("--watermark 500", "watermark must be at most 400, got 500"),
        ("--num-blocks 4", "argument --num-blocks: must be at least 39"),
        ("--max-running 0", "argument --max-running: must be an integer from 1"),
        ("--tokens-per-step 0", "argument --tokens-per-step: must be an integer from 1"),
        (
            "--seed 2e3",
            "argument --seed: must be an integer from 0 to 18446744073709551615, got 2e3",
        ),
    ],
)
def test_command_refuses_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    line, *others = capsys.readouterr().err.splitlines()
    assert message in line
    assert not others


def test_plot_that_cannot_be_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as exit_:
        main([*COMMAND, f"--plot={tmp_path / 'blocks.nosuch'}"])
    assert exit_.value.code == 2
    assert "blocks.nosuch cannot be written" in capsys.readouterr().err
