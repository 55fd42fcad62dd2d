"""Fine-tune a checkpoint of your own with SNELL and transformers' Trainer; save the adapter, load it, merge it.

    python examples/finetune.py CHECKPOINT DATA [--task classify|generate] [--out snell-adapter]

CHECKPOINT is a folder (or model name) that transformers loads: an encoder for ``classify``, a causal language model
for ``generate``. DATA is a file of JSON lines: ``{"text": ..., "label": ...}`` to classify, ``{"text": ...}`` to
continue text. A tenth of the lines is held out to judge by.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from snell.peft import SnellConfig

TASKS = {
    "classify": (tf.AutoModelForSequenceClassification, "SEQ_CLS"),
    "generate": (tf.AutoModelForCausalLM, "CAUSAL_LM"),
}


def read(path: Path, task: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of the data file, labels as numbers, and the names of the labels."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    if task == "generate":
        return [{"text": line["text"]} for line in lines], []
    names = sorted({str(line["label"]) for line in lines})
    return [{"text": line["text"], "label": names.index(str(line["label"]))} for line in lines], names


def tokenise(lines: list[dict[str, Any]], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """What Trainer takes: token numbers, and a label where there is one."""
    encoded = [{**tokenizer(line["text"], truncation=True, max_length=length)} for line in lines]
    return [{**e, "labels": line["label"]} if "label" in line else e for e, line in zip(encoded, lines, strict=True)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("--task", choices=TASKS, default="classify")
    parser.add_argument("--out", type=Path, default=Path("snell-adapter"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text that are read")
    arguments = parser.parse_args()
    tf.set_seed(0)

    lines, names = read(arguments.data, arguments.task)
    random.shuffle(lines)
    tokenizer = tf.AutoTokenizer.from_pretrained(arguments.checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    samples = tokenise(lines, tokenizer, arguments.length)
    held_out = max(len(samples) // 10, 1)

    model_class, task_type = TASKS[arguments.task]
    # A head for other labels than these is replaced; PEFT trains and saves it with the adapter.
    head = {"num_labels": len(names), "ignore_mismatched_sizes": True, "pad_token_id": tokenizer.pad_token_id}
    head = head if names else {}
    base = model_class.from_pretrained(arguments.checkpoint, **head)
    model = get_peft_model(
        base,
        SnellConfig(r=arguments.rank, sparsity=arguments.sparsity, target_modules="all-linear", task_type=task_type),
    )
    model.print_trainable_parameters()

    if names:
        collator: Any = tf.DataCollatorWithPadding(tokenizer)
    else:
        collator = tf.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = tf.Trainer(
        model=model,
        args=tf.TrainingArguments(
            output_dir=str(arguments.out / "checkpoints"),
            learning_rate=arguments.rate,
            num_train_epochs=arguments.epochs,
            per_device_train_batch_size=arguments.batch,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            report_to=[],
        ),
        train_dataset=samples[held_out:],
        eval_dataset=samples[:held_out],
        data_collator=collator,
    )
    trainer.train()
    model.save_pretrained(arguments.out)
    print(f"adapter saved in {arguments.out}")

    # Later, elsewhere: the base again, the adapter on top, and the two made one ordinary model.
    base = model_class.from_pretrained(arguments.checkpoint, **head)
    loaded = PeftModel.from_pretrained(base, arguments.out).eval()
    probe = {key: value for key, value in collator(samples[:2]).items() if key != "labels"}
    with torch.no_grad():
        adapted = loaded(**probe).logits
        merged = loaded.merge_and_unload()
        difference = (merged(**probe).logits - adapted).abs().max().item()
    merged.save_pretrained(arguments.out / "merged")
    tokenizer.save_pretrained(arguments.out / "merged")
    print(f"merged model saved in {arguments.out / 'merged'}; its outputs differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
