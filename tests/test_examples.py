"""The examples: the model against transformers, checkpoints, and the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import generate as generate_command
import gguf
import numpy as np
import pytest
import serve_loop as serve_command
import torch
from decode_loop import Sampling, compile_step, decode_step, keep_nucleus, largest
from decoder import Config, Decoder, rope_frequencies
from generate import encode, generate, main, make_manager, read_prompts
from load import (
    Checkpoint,
    CheckpointError,
    GGUFFile,
    find_default,
    load,
    make_chat_renderer,
    read_config,
)
from managers import manager_for
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Rain fell on the old harbour, and the fishermen",
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def smollm() -> Checkpoint:
    return load(None, torch.float32, CPU)


@pytest.fixture(scope="module")
def hub_smollm() -> LlamaForCausalLM:
    path = find_default()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    model.generation_config.eos_token_id = None
    return model


def run(checkpoint: Checkpoint, prompts: list[list[int]], step=decode_step, **options):
    """The tokens that generate continues each prompt with."""
    outputs: list[list[int]] = [[] for _ in prompts]

    def emit(prompt: int, token: int | None) -> None:
        if token is not None:
            outputs[prompt].append(token)

    settings = {"max_new_tokens": 8, "sampling": Sampling(), **options}
    manager = manager_for(checkpoint.model, len(prompts))
    timing = generate(checkpoint, prompts, manager, step, emit=emit, **settings)
    return outputs, timing


def logits_of(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits after each token, by one prefill with a sequence for every prefix."""
    manager = manager_for(model, len(tokens), num_blocks=len(tokens) * (1 + len(tokens) // 16))
    prefixes = [tokens[: i + 1] for i in range(len(tokens))]
    for seq_id, prefix in enumerate(prefixes):
        manager.add_sequence(seq_id, len(prefix))
    batch = manager.batch(range(len(prefixes)), [len(prefix) for prefix in prefixes])
    packed = torch.cat([torch.tensor(prefix) for prefix in prefixes])
    return model(packed, manager.caches, batch)


def test_logits_equal_those_of_transformers(smollm, hub_smollm):
    tokens = smollm.tokenizer.encode("The quick brown fox jumps over 12 lazy dogs.").ids
    wanted = hub_smollm(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(smollm.model, tokens), wanted, rtol=0, atol=1e-3)


def test_compiled_loop_writes_the_tokens_of_transformers(smollm, hub_smollm):
    """64 greedy tokens of 3 prompts, decoded together; a stop token ends none of them."""
    endless = dataclasses.replace(smollm, stop_tokens=frozenset())
    prompts = [smollm.tokenizer.encode(prompt).ids for prompt in PROMPTS]
    outputs, _ = run(endless, prompts, compile_step(CPU), max_new_tokens=64)
    for prompt, output in zip(prompts, outputs, strict=True):
        wanted = hub_smollm.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=64,
            pad_token_id=0,
        )
        assert output == wanted[0, len(prompt) :].tolist()


def test_tokenizer_and_chat_template_are_those_of_the_file(smollm):
    text = smollm.render_chat("Hi")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm.tokenizer.encode(text, add_special_tokens=False).ids
    assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == text
    sample = "Ünïcode, 12345 numbers,  spaces\n\tand 日本語."
    assert smollm.tokenizer.decode(smollm.tokenizer.encode(sample).ids) == sample
    assert len(smollm.tokenizer.encode("12345").ids) == 5
    assert smollm.tokenizer.token_to_id("<|im_end|>") in smollm.stop_tokens


# A tiny model, for everything that needs no real text.


def tiny_config(**changes) -> LlamaConfig:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": 96,
    }
    return LlamaConfig(**{**sizes, **changes})


def write_tokenizer(folder: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def save_tiny(folder: Path, **changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shard = {"max_shard_size": changes.pop("max_shard_size")} if "max_shard_size" in changes else {}
    model = LlamaForCausalLM(tiny_config(**changes)).eval()
    model.save_pretrained(folder, **shard)
    write_tokenizer(folder)
    return model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder)
    return load(folder, torch.float32, CPU)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        {"rope_parameters": LLAMA3_ROPE},
        {"num_key_value_heads": 6, "head_dim": 8},
        {"max_shard_size": "20KB"},
    ],
    ids=["plain", "tied", "linear", "llama3", "mha", "shards"],
)
def test_safetensors_folder(tmp_path, changes):
    hub_model = save_tiny(tmp_path, **changes)
    assert (tmp_path / "model.safetensors.index.json").exists() == ("max_shard_size" in changes)
    model = load(tmp_path, torch.float32, CPU).model
    tokens = torch.randint(0, 97, (40,)).tolist()
    wanted = hub_model(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(logits_of(model, tokens), wanted, rtol=1e-4, atol=1e-4)


def broken_folder(tmp_path: Path, **changes) -> Path:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling yarn is not supported"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
        ({"quantization_config": {}}, "quantised safetensors are not supported"),
        ({"hidden_size": None}, "config.json .* hidden_size must be a positive int, got nothing"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a positive float, got nothing"),
        ({"vocab_size": "97"}, "vocab_size must be a positive int, got '97'"),
        ({"num_key_value_heads": 4}, "num_attention_heads must be a multiple of 4, got 6"),
        ({"head_dim": 15}, "head_dim must be even, got 15"),
        ({"hidden_size": 64}, r"lm_head.weight must have shape \(97, 64\), got \(97, 48\)"),
        # As many rows in all as before, but not in each part.
        ({"num_attention_heads": 8, "num_key_value_heads": 1}, r"k_proj.* \(16, 48\), got \(32, 4"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "low_freq_factor must be a positive float, got nothing",
        ),
        (
            {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}},
            "high_freq_factor must be above low_freq_factor=1.0, got 1.0",
        ),
    ],
    ids=str,
)
def test_folder_that_cannot_be_read(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        load(broken_folder(tmp_path, **changes), torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "Expecting property name"),
        ("config.json", b"\xff", "codec can't decode"),
        ("config.json", b"[]", "it must be an object of JSON, got list"),
        ("model.safetensors", b"garbage", "header"),
        ("model.safetensors", None, "incomplete|invalid"),
        ("model.safetensors.index.json", b'{"metadata": {}}', "it lacks 'weight_map'"),
        ("tokenizer.json", b"{}", "Model missing"),
        ("generation_config.json", b"{", "Expecting property name"),
        ("tokenizer_config.json", b'{"bos_token": {}}', "it lacks 'content'"),
        (
            "chat_template.jinja",
            b"\n{% bad %}",
            "line 2 of the chat template: .* unknown tag 'bad'",
        ),
    ],
)
def test_broken_file(tmp_path, name, content, message):
    """The file is named; in place of None it loses its end."""
    save_tiny(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    where = tmp_path if name.endswith(".jinja") else path
    with pytest.raises(CheckpointError, match=f"^{where} cannot be read: .*({message})"):
        load(tmp_path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
    ],
)
def test_chat_template_may_use_what_transformers_offers(template, text):
    assert make_chat_renderer(template, {})("Hi") == text


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ nothing.at.all }}"])
def test_chat_template_that_fails(template):
    with pytest.raises(CheckpointError, match=r"the chat template refuses this prompt: .*no"):
        make_chat_renderer(template, {})("Hi")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_folder_that_lacks_a_file(tmp_path, name):
    save_tiny(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load(tmp_path, torch.float32, CPU)


def test_gguf_with_rope_factors_and_no_number_of_kv_heads(tmp_path):
    """As converters write Llama 3.1: the factors are a tensor, which is read for the fields."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b"])
    stored = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)
    writer.add_tensor("rope_freqs.weight", np.array([1, 2, 4, 8], dtype=np.float32))
    writer.add_tensor("blk.0.attn_k.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GGUFFile(path)
    config = read_config(source.fields)
    assert config.rope_scaling == {"rope_type": "factors", "factors": [1.0, 2.0, 4.0, 8.0]}
    assert config.num_kv_heads == 4
    name = "model.layers.0.self_attn.k_proj.weight"
    assert source.shapes == {name: (32, 32)}
    # Of the 8 rows of a head, neighbours in the file are half a head apart.
    in_halves = [head * 8 + row for head in range(4) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert torch.equal(source.tensor(name), torch.tensor(stored[in_halves]))


def test_file_that_is_no_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read: "):
        load(path, torch.float32, CPU)


def test_rope_type_of_a_config_is_checked():
    fields = {**tiny_config().to_dict(), "architectures": ["LlamaForCausalLM"]}
    config = dataclasses.replace(read_config(fields), rope_scaling={"rope_type": "yarn"})
    assert isinstance(config, Config)
    with pytest.raises(ValueError, match="rope_type must be linear, llama3 or factors"):
        rope_frequencies(config, CPU)


def test_mixed_batch_equals_each_alone(tiny):
    """A prefill, a chunk and a decode step in one forward."""
    model = tiny.model
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (20, 13, 7)]
    alone = torch.stack([logits_of(model, prompt)[-1] for prompt in prompts])
    manager = manager_for(model, 3)
    manager.add_sequence(1, 6)
    manager.add_sequence(2, 6)
    model(torch.tensor(prompts[1][:6] + prompts[2][:6]), manager.caches, manager.batch([1, 2], 6))
    manager.add_sequence(0, 20)
    manager.append(1, 7)
    manager.append(2, 1)
    tokens = torch.tensor(prompts[0] + prompts[1][6:] + prompts[2][6:])
    mixed = model(tokens, manager.caches, manager.batch([0, 1, 2], [20, 7, 1]))
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)


def test_the_step_is_compiled_once(tiny):
    """While sequences end (3, 2, 1 in the batch) and all lengths grow past block edges."""
    torch._dynamo.reset()
    counters.clear()
    endless = dataclasses.replace(tiny, stop_tokens=frozenset())
    prompts = [[3, 4, 5], [6], [7, 8]]
    alone = [run(endless, [prompt], max_new_tokens=40)[0][0] for prompt in prompts]
    stops = frozenset({alone[0][20], alone[1][10]})
    stopping = dataclasses.replace(tiny, stop_tokens=stops)
    seen: list[tuple[int, int]] = []
    step = compile_step(CPU)

    def counted(model, caches, state, sampling):
        step(model, caches, state, sampling)
        seen.append((len(state.seq_lens), counters["stats"]["unique_graphs"]))

    outputs, _ = run(stopping, prompts, counted, max_new_tokens=40)
    assert outputs == run(stopping, prompts, max_new_tokens=40)[0]
    assert len({batch_size for batch_size, _ in seen}) > 1
    assert {graphs for _, graphs in seen[2:]} == {seen[1][1]} == {1}


def test_nucleus():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]])
    kept = keep_nucleus(probabilities, 0.7)
    assert kept[0].tolist() == [0.0, 0.5, 0.0, 0.25]
    assert (kept[1] > 0).sum() == 3


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [1, 1024, 5000])
def test_largest_is_the_first_of_equals(size, compiled, device):
    scores = torch.randint(4, (20, size)).float()
    scores[0] = -torch.inf
    scores[1, -1] = torch.inf
    scores[2, size // 2 :] = torch.nan
    find = torch.compile(largest, fullgraph=True, dynamic=False) if compiled else largest
    assert find(scores.to(device)).tolist() == scores.argmax(-1).tolist()


def test_timing_report(tiny):
    _, timing = run(tiny, [[3, 4, 5], [6]], max_new_tokens=6)
    report = timing.report()
    assert timing.prefill_tokens == 4
    assert "prefill" in report
    assert "tokens/s" in report
    assert "GB/s of weights" in report


# The command.

TINY = ["--model", "random:tiny"]


def command(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "examples" / "generate.py")
    return subprocess.run(
        [sys.executable, script, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_answers():
    result = command("What is the capital of France?", "--no-compile", "--max-new-tokens", "20")
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    assert "prefill" in result.stderr
    assert "decode" in result.stderr


def test_command_reads_prompts_from_stdin():
    arguments = [*TINY, "--no-compile", "--raw", "--max-new-tokens", "4"]
    result = command(*arguments, stdin="Red, green,\n\nOne, two,\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.index("> Red, green,") < result.stdout.index("> One, two,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--model", "nowhere.gguf"], "nowhere.gguf does not exist"),
        (["hi", "--model", __file__], "neither a checkpoint folder nor a .gguf file"),
        ([""], "a prompt is empty"),
        ([], "no prompt"),
        (["\udcff"], "a prompt must be UTF-8 text"),
        (["hi", "--max-new-tokens", "0"], "--max-new-tokens: must be an integer from 1"),
        (["hi", "--temperature", "-1"], "--temperature: must be 0 or more, got -1"),
        (["hi", "--temperature", "warm"], "--temperature: must be 0 or more, got warm"),
        (["hi", "--top-p", "0"], "--top-p: must be above 0 and at most 1, got 0"),
        (["hi", "--seed", str(2**64)], f"to {2**64 - 1}, got {2**64}"),
        (["hi", "--check-every", "0"], "--check-every: must be an integer from 1"),
        (["hi", "--device", "cpu:x"], "--device: cpu:x cannot be used"),
        (["hi", "--device", "meta"], "--device: must be cpu or cuda, got meta"),
        (["hi", *TINY, "--block-size", "2000000"], "block_size must be at most 1048576"),
        (["hi", *TINY, "--num-blocks", "2"], "but the cache has 2 (--num-blocks)"),
        (["hi " * 2000, *TINY], "more than the model's context of 4096"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_command_refuses_in_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    sentence, *others = capsys.readouterr().err.splitlines()
    assert sentence.startswith("generate.py: ")
    assert message in sentence
    assert not others


def test_prompts_from_a_file_that_is_no_text(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    with pytest.raises(SystemExit):
        main([])
    assert "a prompt must be UTF-8 text" in capsys.readouterr().err


def test_terminal_is_asked_for_prompts(monkeypatch, capsys):
    terminal = io.StringIO("Red\nBlue\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    assert read_prompts([], terminal) == ["Red", "Blue"]
    assert "type a prompt on each line" in capsys.readouterr().err
    assert read_prompts(["Green"], terminal) == ["Green"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [generate_command, serve_command])
def test_help_says_each_default_once(command):
    """And of each option what it does."""
    for action in command.make_parser()._actions:
        assert action.help, action.dest
        defaults = action.help.count("(default: ")
        assert defaults == (action.dest not in ("help", "prompts")), action.dest


def test_command_exits_with_2_and_no_traceback():
    result = command("hi", "--model", "nowhere.gguf")
    assert result.returncode == 2
    assert result.stderr == "generate.py: nowhere.gguf does not exist\n"
    assert result.stdout == ""


def test_tokens_that_the_model_lacks(tiny):
    assert encode(tiny, ["w5 w96"], raw=True) == [[5, 96]]
    tokenizer = Tokenizer.from_str(tiny.tokenizer.to_str())
    tokenizer.add_tokens(["more"])
    larger = dataclasses.replace(tiny, tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="the tokenizer has token 97, the model only 97"):
        encode(larger, ["w5", "more"], raw=True)


def test_make_manager_holds_the_new_tokens_too(tiny):
    import argparse

    arguments = argparse.Namespace(
        max_new_tokens=30, block_size=16, num_blocks=None, device="cpu", dtype="float32"
    )
    manager = make_manager(arguments, tiny.model, [[1] * 5, [1] * 20])
    assert manager.blocks.num_blocks == 3 + 4
