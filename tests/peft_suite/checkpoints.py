"""Small random checkpoints under the names that PEFT's tests load, laid out as the hub's cache is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

_COMMIT = "0" * 40
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {"vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **_TOKENS}
_GATED = {**_DECODER, "num_key_value_heads": 4, "intermediate_size": 64, "head_dim": 4}
_ENCODER = {
    **_DECODER,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 37,
    "max_position_embeddings": 512,
}
_DEBERTA = {**_ENCODER, "relative_attention": True, "pos_att_type": "p2c|c2p", "type_vocab_size": 2}
_GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def _opt() -> tf.PreTrainedModel:
    sizes = {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 128}
    return tf.OPTForCausalLM(tf.OPTConfig(**sizes))


def _gpt2() -> tf.PreTrainedModel:
    return tf.GPT2LMHeadModel(tf.GPT2Config(**_GPT))


def _gptj() -> tf.PreTrainedModel:
    return tf.GPTJForCausalLM(tf.GPTJConfig(**_GPT, rotary_dim=4, n_positions=512))


def _llama() -> tf.PreTrainedModel:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_GATED))


def _gemma() -> tf.PreTrainedModel:
    layers = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GATED, **layers))


def _t5() -> tf.PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=1024, **sizes, **tokens))


def _bart() -> tf.PreTrainedModel:
    side = {"layers": 2, "attention_heads": 4, "ffn_dim": 4}
    sizes = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in side.items()}
    return tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=1024, d_model=16, **sizes, **_TOKENS))


def _bert(kind: type[tf.PreTrainedModel] = tf.BertModel) -> tf.PreTrainedModel:
    return kind(tf.BertConfig(**_ENCODER))


def _roberta(kind: type[tf.PreTrainedModel] = tf.RobertaModel) -> tf.PreTrainedModel:
    return kind(tf.RobertaConfig(**{**_ENCODER, "max_position_embeddings": 514}))


MODELS: dict[str, Callable[[], tf.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama,
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GATED)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GATED)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": _bert,
    "peft-internal-testing/tiny-random-RobertaModel": _roberta,
    "peft-internal-testing/tiny-random-DebertaModel": lambda: tf.DebertaModel(tf.DebertaConfig(**_DEBERTA)),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_DEBERTA)),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: _bert(tf.BertForSequenceClassification),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: _roberta(
        tf.RobertaForSequenceClassification
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**_GATED, num_labels=1)
    ),
}


def _snapshot(hub: Path, name: str, revision: str = "main") -> Path:
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(_COMMIT)
    snapshot = repository / "snapshots" / _COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def build(hub: Path) -> None:
    """Write every checkpoint into ``hub``, a folder that serves as ``HF_HUB_CACHE``."""
    tf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    for name, model in MODELS.items():
        model().save_pretrained(_snapshot(hub, name))
    adapter = _snapshot(hub, "peft-internal-testing/tiny-opt-lora-revision", "test")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None}))
