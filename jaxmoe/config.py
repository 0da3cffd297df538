"""What the file says about the network, and what the operator says about the engine. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

from jaxmoe.gguf import GGUFError, GGUFFile

ARCHITECTURES: Final = ("qwen3moe",)
CACHE_DTYPES: Final = ("float32", "bfloat16")
MAX_PAGE_LENGTH: Final = 256  # one attention segment; pages are cut from it without a rest

_MAX_CONTEXT: Final = 1 << 24
_INT_KEYS: Final = (
    # field, key after "qwen3moe.", highest sane value
    ("num_layers", "block_count", 1 << 10),
    ("d_model", "embedding_length", 1 << 16),
    ("num_heads", "attention.head_count", 1 << 10),
    ("num_kv_heads", "attention.head_count_kv", 1 << 10),
    ("head_dim", "attention.key_length", 1 << 10),
    ("num_experts", "expert_count", 1 << 12),
    ("experts_per_token", "expert_used_count", 1 << 12),
    ("expert_width", "expert_feed_forward_length", 1 << 16),
    ("context_length", "context_length", _MAX_CONTEXT),
)
_YARN_KEYS: Final = (
    # field, key after "rope.scaling.", lowest sane value: the betas are divided by
    ("beta_fast", "yarn_beta_fast", 1e-3),
    ("beta_slow", "yarn_beta_slow", 1e-3),
    ("ext_factor", "yarn_ext_factor", 0.0),
)
_ATTN_FACTOR_KEYS: Final = ("attn_factor", "yarn_attn_factor")
_ENGINE_RANGES: Final = (
    ("num_slots", 1, 1 << 10),
    ("page_length", 1, MAX_PAGE_LENGTH),
    ("max_waiting", 1, 1 << 20),
)


@dataclass(frozen=True)
class RopeScaling:
    """YaRN's parameters, with ggml's defaults for the keys a file may leave out.

    `factor` is new context over original context; lengths count tokens. Source: Peng et al., "YaRN:
    Efficient Context Window Extension of Large Language Models", 2023, and ggml's `rope_yarn`.
    """

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    ext_factor: float = 1.0
    attn_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Qwen3-MoE network, all of it from its file; letters as in the shape comments."""

    num_layers: int  # L
    d_model: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    num_experts: int  # E
    experts_per_token: int  # A
    expert_width: int  # F
    vocab_size: int  # V
    context_length: int
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    name: str

    @staticmethod
    def from_gguf(file: GGUFFile) -> ModelConfig:
        """Read the configuration; a missing or absurd key raises GGUFError, which names it."""
        arch = read_architecture(file)
        sizes = {name: file.get_int(f"{arch}.{key}", low=1, high=high) for name, key, high in _INT_KEYS}
        _check_sizes(file, arch, sizes)
        return ModelConfig(
            **sizes,
            vocab_size=_read_vocab_size(file),
            norm_eps=file.get_float(f"{arch}.attention.layer_norm_rms_epsilon", low=1e-12, high=0.1),
            rope_base=file.get_float(f"{arch}.rope.freq_base", low=1.001, high=1e12),
            rope_scaling=_read_rope_scaling(file, arch),
            name=file.get_str("general.name", default="") or file.path.stem,
        )

    def weight_shape(self, letters: str) -> tuple[int, ...]:
        """The shape of a weight with these axes; N and K are heads times H, as the matrices have them."""
        lengths = {
            "L": self.num_layers,
            "D": self.d_model,
            "N": self.num_heads * self.head_dim,
            "K": self.num_kv_heads * self.head_dim,
            "H": self.head_dim,
            "E": self.num_experts,
            "F": self.expert_width,
            "V": self.vocab_size,
        }
        return tuple(lengths[letter] for letter in letters)


def read_architecture(file: GGUFFile) -> str:
    """The architecture's name in the file; GGUFError for one that is not supported."""
    arch = file.get_str("general.architecture")
    if arch in ARCHITECTURES:
        return arch
    supported = ", ".join(ARCHITECTURES)
    raise GGUFError(file.path, None, f"architecture {arch[:80]!r} is not supported; supported: {supported}")


def _read_vocab_size(file: GGUFFile) -> int:
    num_tokens = len(file.get_array("tokenizer.ggml.tokens", of=str))
    if num_tokens == 0:
        raise GGUFError(file.path, None, "'tokenizer.ggml.tokens' is empty")
    return num_tokens


def _check_sizes(file: GGUFFile, arch: str, sizes: dict[str, int]) -> None:
    """The rules that tie two keys together."""
    num_heads, num_kv_heads, head_dim = sizes["num_heads"], sizes["num_kv_heads"], sizes["head_dim"]
    if num_heads % num_kv_heads:
        what = f"'{arch}.attention.head_count_kv' must divide {num_heads} heads, got {num_kv_heads}"
        raise GGUFError(file.path, None, what)
    if head_dim % 2:
        raise GGUFError(file.path, None, f"'{arch}.attention.key_length' must be even, got {head_dim}")
    for key in ("attention.value_length", "rope.dimension_count"):
        file.get_int(f"{arch}.{key}", low=head_dim, high=head_dim, default=head_dim)
    file.get_int(f"{arch}.expert_used_count", low=1, high=sizes["num_experts"])


def _read_rope_scaling(file: GGUFFile, arch: str) -> RopeScaling | None:
    prefix = f"{arch}.rope.scaling"
    kind = file.get_str(f"{prefix}.type", default=None)
    if kind not in ("yarn", "none", None):
        raise GGUFError(file.path, None, f"'{prefix}.type' must be yarn or none, got {kind[:80]!r}")
    if kind != "yarn":
        # Without a type a factor would mean linear scaling to ggml: refuse it rather than drop it.
        high = 1.0 if kind is None else 1e4
        file.get_float(f"{prefix}.factor", low=0.0, high=high, default=1.0)
        return None
    given = [row for row in _YARN_KEYS if f"{prefix}.{row[1]}" in file.metadata]
    return RopeScaling(
        factor=file.get_float(f"{prefix}.factor", low=1.0, high=1e4),
        original_context_length=file.get_int(f"{prefix}.original_context_length", low=1, high=_MAX_CONTEXT),
        attn_factor=prod(
            file.get_float(f"{prefix}.{key}", low=0.0, high=1e4, default=1.0) for key in _ATTN_FACTOR_KEYS
        ),
        **{name: file.get_float(f"{prefix}.{key}", low=low, high=1e4) for name, key, low in given},
    )


@dataclass(frozen=True)
class EngineConfig:
    """How the engine uses the device; None means: chosen at load.

    `context_length`, `page_length` and `prefill_chunk` count tokens, `cache_size` bytes.
    Raises ValueError, naming the field, for a value out of range.
    """

    context_length: int | None = None
    num_slots: int = 8
    page_length: int = 64
    cache_size: int | None = None
    cache_dtype: str | None = None
    prefill_chunk: int | None = None
    max_waiting: int = 256
    compilation_cache: bool = True

    def __post_init__(self) -> None:
        for name, low, high in _ENGINE_RANGES:
            _check_int(name, getattr(self, name), low, high)
        if MAX_PAGE_LENGTH % self.page_length:
            raise ValueError(f"page_length must divide {MAX_PAGE_LENGTH}, got {self.page_length}")
        if self.context_length is not None:
            _check_int("context_length", self.context_length, 1, _MAX_CONTEXT)
        if self.prefill_chunk is not None:
            _check_int("prefill_chunk", self.prefill_chunk, 1, 1 << 16)
        if self.cache_size is not None:
            _check_int("cache_size", self.cache_size, 1, 1 << 50)
        if self.cache_dtype not in (*CACHE_DTYPES, None):
            raise ValueError(
                f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}"
            )
        if not isinstance(self.compilation_cache, bool):
            raise ValueError(f"compilation_cache must be true or false, got {self.compilation_cache!r}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer between {low} and {high}, got {value!r}")
