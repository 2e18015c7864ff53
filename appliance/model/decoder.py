"""The decoder: Llama, SmolLM2, Mistral, Qwen2 and Qwen3 from one set of parameters, over one device's kernels and a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from appliance.errors import ModelError
from appliance.kernels.ops import AttentionBatch, GgufTensor, Linear, Ops, WeightSource
from appliance.model.config import ModelConfig
from appliance.model.layers import AttentionShape, DecoderLayer, Embedding
from appliance.model.mapped_file import ReadAhead
from appliance.model.rope import cos_sin_table
from appliance.model.weights import Weights, open_weights

Progress = Callable[[float], None]


class Decoder:
    """A loaded model. Immutable after loading; not bound to a thread.

    `num_parameters` counts tied embeddings once; `weight_bytes` is what the weights occupy on the device (or, memory-mapped, of the page cache).
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        dtype: torch.dtype,
        embedding: Embedding,
        layers: list[DecoderLayer],
        norm: Tensor,
        head: Linear,
        cos_sin: Tensor,
        num_parameters: int,
        weight_bytes: int,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.num_parameters = num_parameters
        self.weight_bytes = weight_bytes
        self._ops = ops
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._cos_sin = cos_sin
        shape = layers[0].shape
        self._stack = ops.make_decoder_stack(
            [layer.weights() for layer in layers], num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, eps=shape.eps
        )

    @property
    def max_positions(self) -> int:
        """Length of the longest context that positions exist for."""
        return self._cos_sin.shape[0]

    def kv_shape(self, num_blocks: int, block_size: int) -> tuple[int, int, int, int]:
        """Shape of the key cache (and of the value cache) of one layer."""
        return num_blocks, self.config.num_kv_heads, block_size, self.config.head_dim

    def forward(self, batch: AttentionBatch, kv_caches: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Hidden states after the final norm, [B, hidden_size], of each entry's last token. Writes this step's K and V into the caches.

        Launches kernels and returns; with kernels that can, it may be captured into a CUDA graph.
        """
        ops, eps = self._ops, self.config.rms_norm_eps
        residual = self._embedding(batch.input_ids)
        if self._stack is not None and self._stack.accepts(residual.shape[0]):
            residual = self._stack(residual, self._cos_sin, kv_caches, batch)
            if batch.num_decodes < residual.shape[0]:
                residual = residual.index_select(0, batch.logit_index)
            return ops.rms_norm(residual, self._norm, eps)
        hidden = ops.rms_norm(residual, self._layers[0].input_norm, eps)
        last = len(self._layers) - 1
        for index, (layer, kv_cache) in enumerate(zip(self._layers, kv_caches, strict=True)):
            attended = layer.attend(ops, hidden, self._cos_sin, kv_cache, batch)
            if index == last and batch.num_decodes < residual.shape[0]:  # past its attention, only the rows that reach the head are wanted
                attended, residual = attended.index_select(0, batch.logit_index), residual.index_select(0, batch.logit_index)
            added = layer.finish(ops, attended, residual)
            norm = self._norm if index == last else self._layers[index + 1].input_norm
            hidden = ops.add_rms_norm(added, residual, norm, eps)
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[B, vocab_size] for hidden states from `forward`, written into `out` where one is given.

        Of hidden's dtype, or float32 where the head's kernel computes in it anyway: bfloat16 steps of 0.125 at 25 make ties of what is none.
        """
        if getattr(self._head, "computes_float32", False):
            hidden = hidden.to(torch.float32)
        if out is None:
            return self._head(hidden)
        write = getattr(self._head, "write", None)
        return out.copy_(self._head(hidden)) if write is None else write(hidden, out)


def load_model(
    path: str,
    *,
    ops: Ops,
    device: torch.device,
    dtype: torch.dtype,
    quantization: str = "auto",
    seed: int = 0,
    max_positions: int | None = None,
    progress: Progress | None = None,
) -> Decoder:
    """A decoder from a Hugging Face folder, a GGUF file or `dummy:FOLDER`, its weights packed for `device` by `ops`.

    quantization as in Ops.make_linear. max_positions shortens the rotary table where less context will be used. progress is called on this thread
    with the share done, 0-1. Raises ModelError.
    """
    weights = open_weights(path, device=device, dtype=dtype, seed=seed)
    with closing(weights), ReadAhead(weights.maps()):
        return _Loader(weights, ops, device, dtype, quantization, progress or (lambda _: None)).load(max_positions)


class _Loader:
    """Builds a decoder from weights, counting as it goes."""

    def __init__(self, weights: Weights, ops: Ops, device: torch.device, dtype: torch.dtype, quantization: str, progress: Progress) -> None:
        self._weights = weights
        self._config = weights.config
        self._ops = ops
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._progress = progress
        self._num_parameters = 0
        self._num_bytes = 0
        self._read_bytes = 0

    def load(self, max_positions: int | None) -> Decoder:
        config = self._config
        self._progress(0.0)
        embedding = self._embedding()
        shape = AttentionShape(config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps)
        layers = []
        for index in range(config.num_layers):
            layers.append(self._layer(index, shape))
            if not self._weights.num_bytes:
                self._progress((index + 1) / (config.num_layers + 1))
        norm = self._vector("model.norm.weight", config.hidden_size)
        head = self._head(embedding)
        factors = self._weights.get("rope_freqs.weight", (config.rope.width // 2,)) if self._weights.has("rope_freqs.weight") else None
        num_positions = min(max_positions or config.max_positions, config.max_positions)
        cos_sin = cos_sin_table(config.rope, num_positions, self._device, factors if isinstance(factors, Tensor) else None)
        self._progress(1.0)
        return Decoder(
            config,
            self._ops,
            dtype=self._dtype,
            embedding=embedding,
            layers=layers,
            norm=norm,
            head=head,
            cos_sin=cos_sin,
            num_parameters=self._num_parameters,
            weight_bytes=self._num_bytes + cos_sin.nbytes,
        )

    def _embedding(self) -> Embedding:
        table = self._get("model.embed_tokens.weight", (self._config.vocab_size, self._config.hidden_size))
        if isinstance(table, GgufTensor):
            table = GgufTensor(table.kind, table.shape, table.data.to(self._device))
        else:
            table = table.to(self._device, self._dtype)
        embedding = Embedding(table, self._dtype)
        self._num_bytes += embedding.num_bytes
        return embedding

    def _head(self, embedding: Embedding) -> Linear:
        """The output projection; where it is tied and the kernels keep the table's own form, both share its memory.

        Its weights stay as they are where fp8 is asked for, as in published fp8 checkpoints: errors in logits are not averaged by later layers.
        """
        quantization = "none" if self._quantization == "fp8" else self._quantization
        if not self._config.tie_word_embeddings:
            weight = self._get("lm_head.weight", (self._config.vocab_size, self._config.hidden_size))
            head, num_bytes = self._pack([weight], None, quantization)
            self._num_bytes += num_bytes
            return head
        head, num_bytes = self._pack([embedding.table], None, quantization)
        if getattr(head, "weight", None) is not embedding.table:
            self._num_bytes += num_bytes
        return head

    def _layer(self, index: int, shape: AttentionShape) -> DecoderLayer:
        config, base = self._config, f"model.layers.{index}"
        hidden, query, key = config.hidden_size, config.num_heads * config.head_dim, config.kv_heads_size
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        return DecoderLayer(
            shape=shape,
            input_norm=self._vector(f"{base}.input_layernorm.weight", hidden),
            qkv=self._linear(
                attention, ((f"{attention}.q_proj", query), (f"{attention}.k_proj", key), (f"{attention}.v_proj", key)), hidden, config.qkv_bias
            ),
            q_norm=self._vector(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
            k_norm=self._vector(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
            output=self._linear(attention, ((f"{attention}.o_proj", hidden),), query, config.output_bias),
            post_norm=self._vector(f"{base}.post_attention_layernorm.weight", hidden),
            gate_up=self._linear(
                mlp, ((f"{mlp}.gate_proj", config.intermediate_size), (f"{mlp}.up_proj", config.intermediate_size)), hidden, config.mlp_bias
            ),
            down=self._linear(mlp, ((f"{mlp}.down_proj", hidden),), config.intermediate_size, config.mlp_bias),
            sliding_window=config.sliding_windows[index],
        )

    def _linear(self, where: str, parts: tuple[tuple[str, int], ...], in_features: int, has_bias: bool) -> Linear:
        """One projection of several parts (name, out_features), stacked."""
        sources = [self._get(f"{name}.weight", (out_features, in_features)) for name, out_features in parts]
        bias = torch.cat([self._dense(f"{name}.bias", (out_features,)) for name, out_features in parts]) if has_bias else None
        linear, num_bytes = self._pack(sources, bias, self._quantization)
        self._num_bytes += num_bytes
        return linear

    def _pack(self, sources: list[WeightSource], bias: Tensor | None, quantization: str) -> tuple[Linear, int]:
        try:
            return self._ops.make_linear(sources, bias, device=self._device, dtype=self._dtype, quantization=quantization)
        except ValueError as error:
            raise ModelError(f"{self._config.source}: {error}") from error

    def _vector(self, name: str, size: int) -> Tensor:
        """A norm's weight, in the model's dtype."""
        vector = self._dense(name, (size,)).to(self._device, self._dtype)
        self._num_bytes += vector.nbytes
        return vector

    def _dense(self, name: str, shape: tuple[int, ...]) -> Tensor:
        weight = self._get(name, shape)
        if isinstance(weight, GgufTensor):
            raise ModelError(f"{self._config.source}: {name} is quantised ({weight.kind}), which only matrices may be")
        return weight

    def _get(self, name: str, shape: tuple[int, ...]) -> WeightSource:
        weight = self._weights.get(name, shape)
        self._num_parameters += weight.shape[0] * weight.shape[1] if isinstance(weight, GgufTensor) else weight.numel()
        self._read_bytes += weight.data.nbytes
        if self._weights.num_bytes:
            self._progress(min(self._read_bytes / self._weights.num_bytes, 1.0))
        return weight
