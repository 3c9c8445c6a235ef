"""What each layer of a Gemma is made of: one reading of its configuration, for memory, FLOPs, sharding and conversion.

Layers are alike in Gemma 1 to 3. In Gemma 4 they differ: full-attention layers have larger heads, fewer of them for
keys and values and sometimes no value projection, the last layers borrow keys and values, and some have a wider MLP.
"""

from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerShape:
    """The sizes of one layer.

    Attributes:
        kind: `full_attention` or `sliding_attention`.
        hidden: features of the residual stream.
        heads, kv_heads, head_dim: of queries; of keys and values; features of each.
        inner: features of the dense MLP.
        kv_source: the layer whose keys and values are attended to; its own number unless it borrows them, and then it
            has no k_proj, v_proj, k_norm and v_norm.
        has_v_proj: False where values are the keys before norm and rotation (`attention_k_eq_v`), or are borrowed.
        norms: RMS norms around attention and MLP: one before each, in Gemma 2 and later one behind each too.
        has_v_norm: values are normed too, without a weight.
        per_layer_input: features of the per-layer embedding that the layer adds; 0: none.
        experts, active_experts, expert_inner: how many there are, how many a token uses, the features of each; 0: none.
    """

    kind: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    kv_source: int
    has_k_proj: bool
    has_v_proj: bool
    norms: int
    has_v_norm: bool
    per_layer_input: int = 0
    experts: int = 0
    active_experts: int = 0
    expert_inner: int = 0

    def linear(self) -> dict[str, tuple[int, int]]:
        """Name → (inputs, outputs) of each linear layer, e.g. `self_attn.q_proj`; experts are not among them."""
        hidden, inner, keys = self.hidden, self.inner, self.kv_heads * self.head_dim
        found = {"self_attn.q_proj": (hidden, self.heads * self.head_dim)}
        if self.has_k_proj:
            found["self_attn.k_proj"] = (hidden, keys)
        if self.has_v_proj:
            found["self_attn.v_proj"] = (hidden, keys)
        found["self_attn.o_proj"] = (self.heads * self.head_dim, hidden)
        found |= {"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)}
        if self.per_layer_input:
            found["per_layer_input_gate"] = (hidden, self.per_layer_input)
            found["per_layer_projection"] = (self.per_layer_input, hidden)
        if self.experts:
            found["router.proj"] = (hidden, self.experts)
        return found

    def expert(self) -> dict[str, tuple[int, int]]:
        """Name → (inputs, outputs) of the matrices of one expert, which lie in one tensor for all: none or two."""
        hidden, inner = self.hidden, self.expert_inner
        two = {"experts.gate_up_proj": (hidden, 2 * inner), "experts.down_proj": (inner, hidden)}
        return two if self.experts else {}


def layer_shapes(config: Any) -> list[LayerShape]:
    """The layers that a transformers configuration of a Gemma text model describes, in order.

    Args:
        config: of Gemma 1, 2, 3, 4, "unified" 4 or VaultGemma; of a whole model, its `get_text_config()`.
    """
    count = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or [FULL] * count
    borrowing = count - (getattr(config, "num_kv_shared_layers", 0) or 0)  # from this layer on
    is_4 = hasattr(config, "num_kv_shared_layers")
    has_experts = bool(getattr(config, "enable_moe_block", False))
    shapes = []
    for number, kind in enumerate(kinds):
        # transformers 5.15 and later refuse to name one head_dim for layers that differ in it
        layer = config.per_layer_config[number] if is_4 else config
        own = number < borrowing
        equal = kind == FULL and bool(getattr(config, "attention_k_eq_v", False))
        wide = bool(getattr(config, "use_double_wide_mlp", False)) and not own
        shapes.append(
            LayerShape(
                kind=kind,
                hidden=config.hidden_size,
                heads=config.num_attention_heads,
                kv_heads=layer.num_key_value_heads,
                head_dim=layer.head_dim,
                inner=config.intermediate_size * (2 if wide else 1),
                kv_source=number if own else max(at for at in range(borrowing) if kinds[at] == kind),
                has_k_proj=own,
                has_v_proj=own and not equal,
                norms=2 if config.model_type in ("gemma", "vaultgemma") else 4,
                has_v_norm=is_4 and own,
                per_layer_input=getattr(config, "hidden_size_per_layer_input", 0) or 0,
                experts=config.num_experts if has_experts else 0,
                active_experts=config.top_k_experts if has_experts else 0,
                expert_inner=config.moe_intermediate_size if has_experts else 0,
            )
        )
    return shapes


def linear_before_layers(config: Any) -> dict[str, tuple[int, int]]:
    """Name → (inputs, outputs) of the linear layers before the first decoder layer: that of per-layer embeddings."""
    size = getattr(config, "hidden_size_per_layer_input", 0) or 0
    return {"per_layer_model_projection": (config.hidden_size, config.num_hidden_layers * size)} if size else {}
