"""The worked example runs from a checkpoint folder and a data file to an adapter and a merged model."""

import json
import runpy
from pathlib import Path

import pytest
import transformers as tf
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune.py"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def save_checkpoint(task: str, folder: Path) -> None:
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    tokens = {"vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    if task == "classify":
        tf.BertForSequenceClassification(tf.BertConfig(**SIZES, **tokens)).save_pretrained(folder)
    else:
        tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **tokens)).save_pretrained(folder)


@pytest.mark.parametrize("task", ["classify", "generate"])
def test_the_example_trains_saves_loads_and_merges(task, tmp_path, monkeypatch, capsys):
    save_checkpoint(task, tmp_path / "base")
    lines = [{"text": f"w{i % 5} w{i % 3 + 9}", "label": "abc"[i % 3]} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = [str(SCRIPT), str(tmp_path / "base"), str(tmp_path / "data.jsonl"), "--task", task]
    settings = ["--out", str(tmp_path / "out"), "--epochs", "1", "--rank", "4"]
    monkeypatch.setattr("sys.argv", arguments + settings)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert float(capsys.readouterr().out.rsplit("at most", 1)[1]) < 1e-5
    assert any("snell_A" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert merged.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
